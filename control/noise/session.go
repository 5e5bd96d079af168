package noise

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/signalbox-net/signalbox/control/h2"
	"github.com/signalbox-net/signalbox/control/limit"
)

// session is one Noise connection. To HTTP/2 it is the net.Conn underneath
// (conn) and the handler above (ServeHTTP in request.go).
type session struct {
	s        *Server
	wire     *wire // nil until the request was answered
	in       recordReader
	out      recordWriter
	peer     Conn
	identify func() // nil once called
	h2       *h2.Conn
	control  rateCounter // of HTTP/2 frames that cost us work and the peer nothing; owned by the reading goroutine
	proven   bool        // owned by the reading goroutine

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
	c.h2.Serve()
}

func (c *session) end() {
	c.close()
	c.mu.Lock()
	c.closed = true
	c.stopTimers()
	c.mu.Unlock()
	c.s.remove(c)
}

func (c *session) close() { c.wire.Close() }

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

// frame counts an HTTP/2 frame that costs us work and the peer nothing. It is false when there were too many.
func (c *session) frame() bool {
	if c.control.allow(c.s.cfg.Now(), 1) {
		return true
	}
	c.s.counts.flooded.Add(1)
	c.s.log.Debug("too many control frames", "machine", c.peer.Machine.ShortString(), "conn", c.peer.ID)
	return false
}

func (c *conn) Read(p []byte) (int, error) {
	n, err := c.in.Read(p)
	if n > 0 && !c.proven {
		c.proven = true
		c.s.list((*session)(c))
	}
	return n, err
}

func (c *conn) Write(p []byte) (int, error)        { return c.out.Write(p) }
func (c *conn) Close() error                       { return c.wire.Close() }
func (c *conn) LocalAddr() net.Addr                { return c.wire.LocalAddr() }
func (c *conn) RemoteAddr() net.Addr               { return remoteAddr(c.peer.Remote) }
func (c *conn) SetDeadline(t time.Time) error      { return c.wire.SetDeadline(t) }
func (c *conn) SetReadDeadline(t time.Time) error  { return c.wire.SetReadDeadline(t) }
func (c *conn) SetWriteDeadline(t time.Time) error { return c.wire.SetWriteDeadline(t) }

type remoteAddr netip.AddrPort

func (remoteAddr) Network() string  { return "tcp" }
func (a remoteAddr) String() string { return netip.AddrPort(a).String() }

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
