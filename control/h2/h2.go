// Package h2 serves HTTP/2 (RFC 9113) on a connection that is there already, for peers that hold one stream open for days and say little on it.
//
// golang.org/x/net/http2 serves everybody; it keeps three goroutines, a frame of 8 to 16 KiB and a write buffer for each connection, and passes
// every write through the connection's own goroutine. Here a connection has one goroutine, which reads, and each request has one. A handler
// writes straight to the connection, under a lock that is held for one frame; buffers are lent for as long as something is in them. What arrives is
// parsed by x/net's Framer and HPACK decoder. What leaves needs no state: responses name their header fields in full.
//
// A request, step by step:
//
//  1. The reading goroutine parses HEADERS (request.go) and starts the handler.
//  2. DATA goes into the body's buffer, which the peer's window bounds. What the handler reads is returned to the peer's windows.
//  3. The handler's writes are collected into one DATA frame, which leaves when it is full, on Flush, and at the end (response.go). Its size is
//     Config.Frame, so that whatever lies below can cut it without a remainder.
//  4. Control frames (SETTINGS and PING answers, RST_STREAM, WINDOW_UPDATE) wait in a small buffer for whoever holds the write lock (write.go), so
//     that reading seldom waits for writing.
//
// The package bounds what a peer can make it keep: streams, header lists, unread bytes, unsent answers. Frames that cost work and the peer
// nothing are reported to Config.Control, which may end the connection.
//
// There is no server push, no prioritisation and no trailers: those of a request are read and dropped.
package h2

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	// maxStreams is how many requests a peer may have open, and how many handlers run for it at once: those of streams that it reset included.
	maxStreams = 250
	// maxHeaders bounds the header list of a request, in bytes as RFC 9113 (6.5.2) counts them.
	maxHeaders = 16 << 10
	// maxFrame is the largest frame that is read.
	maxFrame = 16 << 10
	// window is what the peer may send before it is read, on a stream and on the connection: HTTP/2's initial value.
	window = 65535
	// giveBack is how much of a window is returned at a time.
	giveBack = window / 4
	// maxOut bounds the control frames that wait to be written. A peer that makes more of them and reads none loses the connection.
	maxOut = 64 << 10
	// linger is the time that a peer has to close a connection which has ended from here, so that the last answer is not lost.
	linger = time.Second
)

// Config configures a Conn.
type Config struct {
	// Handler answers the requests. Required.
	Handler http.Handler
	// Context is the parent of the requests' contexts; its end does not end the connection. Nil means context.Background.
	Context context.Context
	// Setup is the time that the peer has for the client preface and its SETTINGS; 0 means 10 s.
	Setup time.Duration
	// Stall is how long the rest of an answer may wait for the peer's windows after its handler has returned; 0 means 30 s. A handler that set a
	// deadline for its writes is held to that instead.
	Stall time.Duration
	// Frame is the size of full DATA frames, header included; 0 means 16 KiB, the most that HTTP/2 lets us send unasked.
	Frame int
	// Control is called for each frame that costs work and the peer nothing: RST_STREAM, PING, SETTINGS, PRIORITY, empty DATA, and frames that are
	// answered with a reset. When it returns false the connection ends. Nil allows all.
	Control func() bool
	// Log hears of panics in handlers. Nil discards.
	Log *slog.Logger
}

// A Conn is the server's end of one HTTP/2 connection.
type Conn struct {
	cfg    Config
	nc     net.Conn
	ctx    context.Context // of all requests
	cancel context.CancelFunc

	// Owned by the goroutine of Serve.
	fr  *http2.Framer
	dec *hpack.Decoder

	wmu sync.Mutex // held by who writes to nc

	mu       sync.Mutex // guards the following fields
	streams  []*stream
	handlers int
	flushing bool   // Serve has a flush under way
	last     uint32 // the highest stream that the peer opened
	window   int64  // bytes of DATA that the peer takes on the connection
	initial  int64  // the same on a new stream, from its SETTINGS
	in       int64  // bytes of DATA that it may send us
	owed     int64  // bytes read and not yet returned to in
	out      []byte // control frames to be written
	shrink   bool   // header blocks have to say that their table is empty
	away     bool   // GOAWAY was sent
	err      error  // why the connection ended
}

var (
	errReset  = errors.New("h2: the peer reset the stream")
	errClosed = errors.New("h2: the connection has ended")
	errFlood  = errors.New("h2: too many control frames")
)

// New returns a Conn on nc. Nothing is read or written until Serve.
func New(nc net.Conn, cfg Config) *Conn {
	if cfg.Context == nil {
		cfg.Context = context.Background()
	}
	if cfg.Setup == 0 {
		cfg.Setup = 10 * time.Second
	}
	if cfg.Stall == 0 {
		cfg.Stall = 30 * time.Second
	}
	if cfg.Frame == 0 {
		cfg.Frame = maxFrame
	}
	if cfg.Control == nil {
		cfg.Control = func() bool { return true }
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Conn{cfg: cfg, nc: nc, window: window, initial: window, in: window, dec: hpack.NewDecoder(4096, nil)}
	c.ctx, c.cancel = context.WithCancel(cfg.Context)
	c.newFramer()
	return c
}

func (c *Conn) newFramer() {
	c.fr = http2.NewFramer(nil, c.nc)
	c.fr.SetMaxReadFrameSize(maxFrame)
	c.fr.MaxHeaderListSize = maxHeaders
	c.fr.ReadMetaHeaders = c.dec
}

// Serve answers requests until the connection ends. Handlers that are at work then have their context cancelled; they are not waited for.
func (c *Conn) Serve() {
	err := c.read()
	code := http2.ErrCodeNo
	var ce http2.ConnectionError
	switch {
	case errors.As(err, &ce):
		code = http2.ErrCode(ce)
	case errors.Is(err, http2.ErrFrameTooLarge):
		code = http2.ErrCodeFrameSize
	case errors.Is(err, errFlood):
		code = http2.ErrCodeEnhanceYourCalm
	}
	if code != http2.ErrCodeNo {
		c.mu.Lock()
		c.goAway(code)
		c.mu.Unlock()
		// The peer is to hear why. Closing a connection with something unread in it would take that from it.
		late := time.AfterFunc(linger, func() { c.end(err) })
		if c.write(nil) == nil {
			_, _ = io.Copy(io.Discard, c.nc)
		}
		late.Stop()
	}
	c.end(err)
}

// GoAway tells the peer to make no new requests here. Those that it has made are answered, and then the connection ends.
func (c *Conn) GoAway() {
	c.mu.Lock()
	c.goAway(http2.ErrCodeNo)
	c.lingerIfDone()
	c.mu.Unlock()
	c.flush()
}

// goAway queues GOAWAY once. c.mu is held.
func (c *Conn) goAway(code http2.ErrCode) {
	if c.away && code == http2.ErrCodeNo {
		return
	}
	c.away = true
	c.out = appendFrame(c.out, 8, http2.FrameGoAway, 0, 0)
	c.out = be32(be32(c.out, c.last), uint32(code))
}

// lingerIfDone gives the peer a moment to close a connection that has nothing more to do. c.mu is held.
func (c *Conn) lingerIfDone() {
	if c.away && c.handlers == 0 && len(c.streams) == 0 {
		_ = c.nc.SetReadDeadline(time.Now().Add(linger))
	}
}

// end closes the connection and lets every stream know. Only the first call counts.
func (c *Conn) end(err error) {
	if err == nil || errors.Is(err, io.EOF) {
		err = errClosed
	}
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	for _, st := range c.streams {
		st.kill(err)
	}
	c.streams = nil
	c.mu.Unlock()
	c.cancel()
	_ = c.nc.Close()
}

// read is the reading goroutine's work.
func (c *Conn) read() error {
	_ = c.nc.SetReadDeadline(time.Now().Add(c.cfg.Setup))
	var settings []byte
	for _, s := range []http2.Setting{
		{ID: http2.SettingMaxFrameSize, Val: maxFrame}, {ID: http2.SettingMaxConcurrentStreams, Val: maxStreams},
		{ID: http2.SettingMaxHeaderListSize, Val: maxHeaders}, {ID: http2.SettingInitialWindowSize, Val: window},
	} {
		settings = be32(append(settings, byte(s.ID>>8), byte(s.ID)), s.Val)
	}
	settings = append(appendFrame(nil, len(settings), http2.FrameSettings, 0, 0), settings...)
	c.mu.Lock()
	c.out = append(settings, c.out...) // nothing may come before it
	c.mu.Unlock()
	if err := c.kick(); err != nil {
		return err
	}
	var preface [len(http2.ClientPreface)]byte
	if _, err := io.ReadFull(c.nc, preface[:]); err != nil {
		return err
	}
	if string(preface[:]) != http2.ClientPreface {
		return errors.New("h2: no client preface")
	}
	f, err := c.fr.ReadFrame()
	if err != nil {
		return err
	}
	if s, ok := f.(*http2.SettingsFrame); !ok || s.IsAck() {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	c.mu.Lock()
	_ = c.nc.SetReadDeadline(time.Time{})
	c.lingerIfDone()
	c.mu.Unlock()
	for {
		err := c.take(f)
		if stream := (http2.StreamError{}); errors.As(err, &stream) {
			err = c.refuse(stream.StreamID, stream.Code)
		}
		if err != nil {
			return err
		}
		if err := c.kick(); err != nil {
			return err
		}
		// The Framer keeps a buffer of the largest frame that it has read, which CONTINUATION may have been.
		if _, headers := f.(*http2.MetaHeadersFrame); f == nil || headers || f.Header().Length > 256 {
			c.newFramer()
		}
		if f, err = c.fr.ReadFrame(); err != nil {
			stream := http2.StreamError{}
			if !errors.As(err, &stream) {
				return err
			}
			// A malformed request: its stream is used up.
			if f = nil; stream.StreamID%2 == 1 {
				c.mu.Lock()
				c.last = max(c.last, stream.StreamID)
				c.mu.Unlock()
			}
			if err := c.refuse(stream.StreamID, stream.Code); err != nil {
				return err
			}
		}
	}
}

// refuse resets a stream for an error of the peer.
func (c *Conn) refuse(id uint32, code http2.ErrCode) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if id > c.last || id == 0 {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	if st := c.find(id); st != nil {
		st.kill(http2.StreamError{StreamID: id, Code: code})
		c.forget(st)
	}
	c.reset(id, code)
	return c.control()
}

// reset queues RST_STREAM. c.mu is held.
func (c *Conn) reset(id uint32, code http2.ErrCode) {
	c.out = be32(appendFrame(c.out, 4, http2.FrameRSTStream, 0, id), uint32(code))
}

func (c *Conn) control() error {
	if !c.cfg.Control() {
		return errFlood
	}
	return nil
}

// find is the open stream with that id; nil when there is none. c.mu is held.
func (c *Conn) find(id uint32) *stream {
	for _, st := range c.streams {
		if st.id == id {
			return st
		}
	}
	return nil
}

// forget takes a stream out of the list. c.mu is held.
func (c *Conn) forget(st *stream) {
	if i := slices.Index(c.streams, st); i >= 0 {
		c.streams = slices.Delete(c.streams, i, i+1)
	}
}

// take does what a frame says. A nil frame says nothing.
func (c *Conn) take(f http2.Frame) error {
	switch f := f.(type) {
	case *http2.MetaHeadersFrame:
		return c.takeHeaders(f)
	case *http2.DataFrame:
		return c.takeData(f)
	case *http2.WindowUpdateFrame:
		return c.takeWindow(f)
	case *http2.SettingsFrame:
		return c.takeSettings(f)
	case *http2.PingFrame:
		if f.IsAck() {
			return nil
		}
		c.mu.Lock()
		c.out = append(appendFrame(c.out, 8, http2.FramePing, http2.FlagPingAck, 0), f.Data[:]...)
		c.mu.Unlock()
		return c.control()
	case *http2.RSTStreamFrame:
		return c.takeReset(f)
	case *http2.PriorityFrame:
		return c.control()
	case *http2.PushPromiseFrame:
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	return nil // GOAWAY, and what this package does not know
}

func (c *Conn) takeReset(f *http2.RSTStreamFrame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.StreamID > c.last {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	if st := c.find(f.StreamID); st != nil {
		st.kill(errReset)
		c.forget(st)
	}
	return c.control()
}

func (c *Conn) takeSettings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	if f.HasDuplicates() {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	err := f.ForeachSetting(func(s http2.Setting) error {
		if err := s.Valid(); err != nil {
			return err
		}
		switch s.ID {
		case http2.SettingHeaderTableSize:
			c.shrink = c.shrink || s.Val < 4096
		case http2.SettingInitialWindowSize:
			more := int64(s.Val) - c.initial
			c.initial = int64(s.Val)
			for _, st := range c.streams {
				if st.window += more; st.window > maxWindow {
					return http2.ConnectionError(http2.ErrCodeFlowControl)
				}
				st.wake()
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	c.out = appendFrame(c.out, 0, http2.FrameSettings, http2.FlagSettingsAck, 0)
	return c.control()
}

// maxWindow is the largest flow-control window (RFC 9113, 6.9.1).
const maxWindow = 1<<31 - 1

func (c *Conn) takeWindow(f *http2.WindowUpdateFrame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.StreamID == 0 {
		was := c.window
		if c.window += int64(f.Increment); c.window > maxWindow {
			return http2.ConnectionError(http2.ErrCodeFlowControl)
		}
		for _, st := range c.streams {
			if was <= 0 && st.window > 0 {
				st.wake()
			}
		}
		return nil
	}
	if f.StreamID > c.last {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	if st := c.find(f.StreamID); st != nil {
		if st.window += int64(f.Increment); st.window > maxWindow {
			return http2.StreamError{StreamID: st.id, Code: http2.ErrCodeFlowControl}
		}
		st.wake()
	}
	return nil
}
