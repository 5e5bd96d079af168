package h2

import (
	"context"
	"io"
	"net/http"
	"os"
	"time"

	"golang.org/x/net/http2"
)

// A stream is one request and its response.
type stream struct {
	c      *Conn
	id     uint32
	ctx    context.Context
	cancel context.CancelFunc
	body   *body // nil when the request has none

	// Guarded by Conn.mu.
	window   int64         // bytes of DATA that the peer takes
	writeBy  time.Time     // the handler's deadline for writes
	writable chan struct{} // one slot: window, writeBy or dead moved; nil until somebody waits
	done     bool          // the peer has sent all of its request
	dead     error         // why nothing may be written any more
}

// wake lets a waiting writer look again. c.mu is held.
func (st *stream) wake() {
	if st.writable == nil {
		return
	}
	select {
	case st.writable <- struct{}{}:
	default:
	}
}

// kill ends a stream for its handler, whose context ends. c.mu is held.
func (st *stream) kill(err error) {
	if st.dead != nil {
		return
	}
	st.dead = err
	if st.body != nil {
		st.body.fail(err)
	}
	st.wake()
	st.cancel()
}

// reserve takes up to want bytes from the windows, at least one. It waits for the peer to open them, if wait; else it returns 0.
func (st *stream) reserve(want int, wait bool) (int, error) {
	c := st.c
	for {
		c.mu.Lock()
		if st.dead != nil {
			err := st.dead
			c.mu.Unlock()
			return 0, err
		}
		left := time.Duration(-1) // to the deadline
		if !st.writeBy.IsZero() {
			if left = time.Until(st.writeBy); left <= 0 {
				c.mu.Unlock()
				return 0, os.ErrDeadlineExceeded
			}
		}
		if n := min(int64(want), st.window, c.window); n > 0 {
			st.window -= n
			c.window -= n
			c.mu.Unlock()
			return int(n), nil
		}
		if !wait {
			c.mu.Unlock()
			return 0, nil
		}
		if st.writable == nil {
			st.writable = make(chan struct{}, 1)
		}
		moved := st.writable
		c.mu.Unlock()
		await(moved, left)
	}
}

// await waits for a signal or, unless left is negative, until left has passed.
func await(signal <-chan struct{}, left time.Duration) {
	if left < 0 {
		<-signal
		return
	}
	t := time.NewTimer(left)
	defer t.Stop()
	select {
	case <-signal:
	case <-t.C:
	}
}

// writeDeadline sets the time at which writes begin to fail.
func (st *stream) writeDeadline(t time.Time) {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	st.writeBy = t
	st.wake()
}

// A body is what the peer sends with a request, as far as it is not read.
type body struct {
	st     *stream
	length int64 // as declared; -1 when it was not

	// Guarded by Conn.mu.
	in       int64 // bytes that the peer may send
	owed     int64 // bytes read and not yet returned to in
	got      int64
	buf      []byte
	err      error // what follows buf
	closed   bool  // nobody reads any more
	readBy   time.Time
	readable chan struct{} // one slot: buf, err or readBy moved; nil until somebody waits
	ask      bool          // the peer waits for 100 (Continue)
}

// wake lets a waiting reader look again. c.mu is held.
func (b *body) wake() {
	if b.readable == nil {
		return
	}
	select {
	case b.readable <- struct{}{}:
	default:
	}
}

// fail ends the body. c.mu is held.
func (b *body) fail(err error) {
	if b.err == nil {
		b.err = err
	}
	b.wake()
}

// takeData files what the peer sends.
func (c *Conn) takeData(f *http2.DataFrame) error {
	n := int64(f.Length)
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.StreamID > c.last {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	if n > c.in {
		return http2.ConnectionError(http2.ErrCodeFlowControl)
	}
	c.in -= n
	data := f.Data()
	var idle error
	if len(data) == 0 && !f.StreamEnded() {
		idle = c.control()
	}
	st := c.find(f.StreamID)
	if st == nil { // ended a moment ago
		c.giveBack(n)
		return idle
	}
	b := st.body
	if st.done || b == nil {
		c.giveBack(n)
		return http2.StreamError{StreamID: st.id, Code: http2.ErrCodeStreamClosed}
	}
	if n > b.in {
		c.giveBack(n)
		return http2.StreamError{StreamID: st.id, Code: http2.ErrCodeFlowControl}
	}
	b.in -= n
	b.got += int64(len(data))
	if b.length >= 0 && (b.got > b.length || f.StreamEnded() && b.got < b.length) {
		c.giveBack(n)
		return http2.StreamError{StreamID: st.id, Code: http2.ErrCodeProtocol}
	}
	st.done = f.StreamEnded()
	if b.closed {
		c.giveBack(n)
		return idle
	}
	b.buf = append(b.buf, data...)
	b.giveBack(n - int64(len(data)))
	if st.done {
		b.err = io.EOF
	}
	b.wake()
	return idle
}

// giveBack returns n read bytes to the peer's window of the connection. c.mu is held.
func (c *Conn) giveBack(n int64) {
	if c.owed += n; c.owed >= giveBack {
		c.out = be32(appendFrame(c.out, 4, http2.FrameWindowUpdate, 0, 0), uint32(c.owed))
		c.in += c.owed
		c.owed = 0
	}
}

// giveBack returns n read bytes to both windows. c.mu is held.
func (b *body) giveBack(n int64) {
	b.st.c.giveBack(n)
	if b.owed += n; b.owed >= giveBack && !b.st.done && b.st.dead == nil {
		c := b.st.c
		c.out = be32(appendFrame(c.out, 4, http2.FrameWindowUpdate, 0, b.st.id), uint32(b.owed))
		b.in += b.owed
		b.owed = 0
	}
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	c := b.st.c
	for {
		c.mu.Lock()
		if b.ask {
			b.ask = false
			if b.st.dead == nil {
				c.out = append(c.out, continueHead(b.st.id)...)
			}
		}
		if b.closed {
			c.mu.Unlock()
			return 0, http.ErrBodyReadAfterClose
		}
		if len(b.buf) > 0 {
			n := copy(p, b.buf)
			if b.buf = b.buf[n:]; len(b.buf) == 0 {
				b.buf = nil
			}
			b.giveBack(int64(n))
			c.mu.Unlock()
			return n, c.flush()
		}
		if b.err != nil {
			err := b.err
			c.mu.Unlock()
			return 0, err
		}
		left := time.Duration(-1)
		if !b.readBy.IsZero() {
			if left = time.Until(b.readBy); left <= 0 {
				c.mu.Unlock()
				return 0, os.ErrDeadlineExceeded
			}
		}
		if b.readable == nil {
			b.readable = make(chan struct{}, 1)
		}
		moved := b.readable
		c.mu.Unlock()
		if err := c.flush(); err != nil {
			return 0, err
		}
		await(moved, left)
	}
}

// Close implements io.Closer. What comes after it is dropped.
func (b *body) Close() error {
	b.st.c.mu.Lock()
	b.close()
	b.st.c.mu.Unlock()
	return b.st.c.flush()
}

// close gives up what was not read. c.mu is held.
func (b *body) close() {
	if b.closed {
		return
	}
	b.closed = true
	b.st.c.giveBack(int64(len(b.buf)))
	b.buf = nil
	b.wake()
}

// readDeadline sets the time at which reads begin to fail.
func (b *body) readDeadline(t time.Time) {
	b.st.c.mu.Lock()
	defer b.st.c.mu.Unlock()
	b.readBy = t
	b.wake()
}
