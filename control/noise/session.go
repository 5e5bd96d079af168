package noise

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"tailscale.com/control/controlbase"

	"github.com/signalbox-net/signalbox/control/limit"
)

// session is one Noise connection. To HTTP/2 it is the net.Conn underneath
// (conn) and the handler above (ServeHTTP in request.go).
type session struct {
	s        *Server
	nc       *controlbase.Conn
	wire     *wire
	peer     Conn
	identify func() // nil once called
	frames   frameCounter
	proven   bool // owned by the reading goroutine

	// Guarded by Server.mu.
	next   *session
	listed bool

	// mu guards the following fields.
	mu      sync.Mutex
	known   bool
	closed  bool
	active  int  // requests being answered
	refused int  // requests being refused
	charged bool // the source paid for this connection of a stranger
	idle    *time.Timer
	life    *time.Timer
}

// serve runs HTTP/2 until the connection ends.
func (c *session) serve() {
	defer c.end()
	c.setKnown(c.s.cfg.Known(c.peer.Machine), false)
	c.s.h2.serve(WithPeer(c.s.base, c.peer), (*conn)(c), c)
}

func (c *session) end() {
	c.close()
	c.mu.Lock()
	c.closed = true
	c.stopTimers()
	c.mu.Unlock()
	c.s.remove(c)
}

func (c *session) close() { c.nc.Close() }

// setKnown moves the connection between the limits for strangers and those
// for nodes. A key may get its node, or lose it, while the connection lasts.
// The connection is a node's only once it has asked something: until then it
// may be a replay.
func (c *session) setKnown(known, asked bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	if known {
		c.stopTimers()
		if c.charged {
			c.charged = false
			c.s.sources.Refund(limit.Addr(c.peer.Remote.Addr()), c.s.cfg.Now(), 1)
		}
		if asked && c.identify != nil {
			c.identify()
			c.identify = nil
		}
	} else if c.life == nil {
		c.life = time.AfterFunc(c.s.lim.StrangerLife, c.expire)
		c.idle = time.AfterFunc(c.s.lim.StrangerIdle, c.expireIdle)
		if c.active > 0 {
			c.idle.Stop()
		}
	}
	c.known = known
}

func (c *session) stopTimers() {
	if c.life != nil {
		c.life.Stop()
		c.idle.Stop()
		c.life, c.idle = nil, nil
	}
}

// expire ends the connection unless its key got a node in the meantime.
func (c *session) expire() {
	if c.s.cfg.Known(c.peer.Machine) {
		c.setKnown(true, false)
		return
	}
	c.close()
}

func (c *session) expireIdle() {
	c.mu.Lock()
	busy := c.active > 0
	c.mu.Unlock()
	if !busy {
		c.expire()
	}
}

// conn is the plaintext side of a session, as HTTP/2 sees it.
type conn session

var errFlood = errors.New("noise: too many control frames")

func (c *conn) Read(p []byte) (int, error) {
	n, err := c.nc.Read(p)
	if n > 0 {
		if !c.proven {
			c.proven = true
			c.wire.Conn.SetReadDeadline(time.Time{})
			c.s.list((*session)(c))
		}
		if !c.frames.count(p[:n], c.s.cfg.Now) {
			c.s.counts.flooded.Add(1)
			c.s.log.Debug("too many control frames", "machine", c.peer.Machine.ShortString(), "conn", c.peer.ID)
			return 0, errFlood
		}
	}
	return n, err
}

// maxPlaintext is what fits into one Noise frame.
const maxPlaintext = 4096 - 3 - 16

func (c *conn) Write(p []byte) (int, error) {
	if len(p) <= maxPlaintext {
		return c.nc.Write(p)
	}
	c.wire.startCork()
	n, err := c.nc.Write(p)
	if ferr := c.wire.uncork(); err == nil && ferr != nil {
		err = ferr
	}
	return n, err
}

func (c *conn) Close() error                       { return c.nc.Close() }
func (c *conn) LocalAddr() net.Addr                { return c.nc.LocalAddr() }
func (c *conn) RemoteAddr() net.Addr               { return remoteAddr(c.peer.Remote) }
func (c *conn) SetDeadline(t time.Time) error      { return c.nc.SetDeadline(t) }
func (c *conn) SetReadDeadline(t time.Time) error  { return c.nc.SetReadDeadline(t) }
func (c *conn) SetWriteDeadline(t time.Time) error { return c.nc.SetWriteDeadline(t) }

type remoteAddr netip.AddrPort

func (remoteAddr) Network() string  { return "tcp" }
func (a remoteAddr) String() string { return netip.AddrPort(a).String() }

// HTTP/2 frame types (RFC 9113, 6) that cost us work and the peer nothing.
const (
	framePriority  = 0x2
	frameRSTStream = 0x3
	frameSettings  = 0x4
	framePing      = 0x6
)

const flagAck = 0x1

// frameCounter follows the frames of an HTTP/2 byte stream and counts the
// control frames among them. The http2 package itself bounds CONTINUATION
// frames, open and waiting streams and unsent answers, but not these.
type frameCounter struct {
	rate    rateCounter
	begun   int // bytes of the client preface seen
	header  [9]byte
	have    int    // bytes of header
	payload uint32 // bytes of the frame still to come
}

// count is false when the stream has too many control frames.
func (f *frameCounter) count(p []byte, now func() time.Time) bool {
	if rest := len(http2.ClientPreface) - f.begun; rest > 0 {
		n := min(rest, len(p))
		f.begun += n
		p = p[n:]
	}
	control := 0
	for len(p) > 0 {
		if f.payload > 0 {
			n := min(f.payload, uint32(len(p)))
			f.payload -= n
			p = p[n:]
			continue
		}
		n := copy(f.header[f.have:], p)
		f.have += n
		p = p[n:]
		if f.have < len(f.header) {
			break
		}
		f.have = 0
		f.payload = binary.BigEndian.Uint32(f.header[:]) >> 8
		switch f.header[3] {
		case framePriority, frameRSTStream:
			control++
		case frameSettings, framePing:
			if f.header[4]&flagAck == 0 {
				control++
			}
		}
	}
	return control == 0 || f.rate.allow(now(), control)
}

// rateCounter counts events in spans of ten seconds. It is used by one
// goroutine.
type rateCounter struct {
	limit int
	since time.Time
	n     int
}

func (r *rateCounter) allow(now time.Time, n int) bool {
	if now.Sub(r.since) >= 10*time.Second {
		r.since, r.n = now, 0
	}
	r.n += n
	return r.n <= r.limit
}
