package h2

import (
	"errors"
	"sync"

	"golang.org/x/net/http2"
)

const frameHeader = 9

func appendFrame(b []byte, length int, t http2.FrameType, flags http2.Flags, id uint32) []byte {
	return append(b, byte(length>>16), byte(length>>8), byte(length), byte(t), byte(flags), byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
}

func be32(b []byte, v uint32) []byte { return append(b, byte(v>>24), byte(v>>16), byte(v>>8), byte(v)) }

var errUnread = errors.New("h2: the peer reads none of the answers it asks for")

// write sends whole frames, after the control frames that wait, SETTINGS first of all, and before those that come up meanwhile.
func (c *Conn) write(b []byte) error {
	c.wmu.Lock()
	c.mu.Lock()
	first := c.out
	c.out = nil
	c.mu.Unlock()
	var err error
	if len(first) > 0 {
		_, err = c.nc.Write(first)
	}
	if err == nil && len(b) > 0 {
		_, err = c.nc.Write(b)
	}
	c.wmu.Unlock()
	if err != nil {
		c.end(err)
		return err
	}
	return c.flush()
}

// flush writes the waiting control frames, unless somebody else is writing: who writes flushes afterwards.
func (c *Conn) flush() error { return c.flushAs(false) }

func (c *Conn) flushAs(serve bool) error {
	for {
		c.mu.Lock()
		if len(c.out) == 0 || !c.wmu.TryLock() {
			if serve {
				c.flushing = false
			}
			c.mu.Unlock()
			return nil
		}
		b := c.out
		c.out = nil
		c.mu.Unlock()
		_, err := c.nc.Write(b)
		c.wmu.Unlock()
		if err != nil {
			c.end(err)
			return err
		}
	}
}

// kick has the waiting control frames written. Serve calls it, which must not wait for a peer that reads nothing while it writes.
func (c *Conn) kick() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.out) > maxOut {
		return errUnread
	}
	if len(c.out) == 0 || c.flushing || c.err != nil {
		return nil
	}
	c.flushing = true
	go c.flushAs(true)
	return nil
}

// room is what a chunk keeps free before its payload, for the frame headers and the head of a response.
const room = 512

// chunk is a buffer of a response: room, and a full frame's payload.
type chunk [room + maxFrame]byte

var chunks = sync.Pool{New: func() any { return new(chunk) }}
