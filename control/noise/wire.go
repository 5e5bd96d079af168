package noise

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/coder/websocket"
)

// corkSize holds a full HTTP/2 DATA frame and the head of its response as Noise
// frames (19 bytes more for each 4,077). It stays below 32 KiB, the largest
// WebSocket message that clients read.
const corkSize = 17 << 10

var corkPool = sync.Pool{New: func() any { return new([corkSize]byte) }}

// wire is the connection below Noise. controlbase writes each of its frames
// by itself; between cork and uncork they are collected and leave together.
//
// Before attach there is no connection, and what is written is kept: the
// handshake is computed before the HTTP request is answered.
//
// HTTP/2 has one writer at a time (h2.Conn.wmu), which is who owns cork and corked.
type wire struct {
	net.Conn
	stall    time.Duration
	response []byte // Noise message 2 until takeResponse
	early    []byte // read together with the HTTP request

	cork   *[corkSize]byte
	corked int
}

var errNotAttached = errors.New("noise: connection not attached")

func (w *wire) takeResponse() []byte {
	b := w.response
	w.response = nil
	return b
}

func (w *wire) attach(c net.Conn, early []byte) {
	w.Conn = c
	w.early = early
}

func (w *wire) Read(p []byte) (int, error) {
	if len(w.early) > 0 {
		n := copy(p, w.early)
		if w.early = w.early[n:]; len(w.early) == 0 {
			w.early = nil
		}
		return n, nil
	}
	if w.Conn == nil {
		return 0, errNotAttached
	}
	return w.Conn.Read(p)
}

func (w *wire) Write(p []byte) (int, error) {
	if w.Conn == nil {
		w.response = append(w.response, p...)
		return len(p), nil
	}
	if w.cork == nil {
		return w.send(p)
	}
	if len(p) > corkSize-w.corked {
		if err := w.flush(); err != nil {
			return 0, err
		}
	}
	w.corked += copy(w.cork[w.corked:], p)
	return len(p), nil
}

// startCork makes writes collect until uncork.
func (w *wire) startCork() {
	w.cork = corkPool.Get().(*[corkSize]byte)
}

func (w *wire) uncork() error {
	err := w.flush()
	corkPool.Put(w.cork)
	w.cork = nil
	return err
}

func (w *wire) flush() error {
	if w.corked == 0 {
		return nil
	}
	n := w.corked
	w.corked = 0
	_, err := w.send(w.cork[:n])
	return err
}

// send gives each write its own time: a peer that takes nothing for that long
// loses the connection, however little was queued for it.
func (w *wire) send(p []byte) (int, error) {
	w.Conn.SetWriteDeadline(time.Now().Add(w.stall))
	return w.Conn.Write(p)
}

func (w *wire) Close() error {
	if w.Conn == nil {
		return nil
	}
	return w.Conn.Close()
}

func (w *wire) SetDeadline(t time.Time) error {
	if w.Conn == nil {
		return nil
	}
	return w.Conn.SetDeadline(t)
}

// webSocketConn is a stream over binary WebSocket messages. Deadlines and
// addresses are those of the connection underneath.
type webSocketConn struct {
	net.Conn
	ws *websocket.Conn
	r  io.Reader // the message being read
}

func (c *webSocketConn) Read(p []byte) (int, error) {
	for {
		if c.r == nil {
			kind, r, err := c.ws.Reader(context.Background())
			if err != nil {
				if s := websocket.CloseStatus(err); s == websocket.StatusNormalClosure || s == websocket.StatusGoingAway {
					return 0, io.EOF
				}
				return 0, err
			}
			if kind != websocket.MessageBinary {
				return 0, errors.New("noise: text message on a WebSocket")
			}
			c.r = r
		}
		n, err := c.r.Read(p)
		if err == io.EOF {
			c.r, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (c *webSocketConn) Write(p []byte) (int, error) {
	if err := c.ws.Write(context.Background(), websocket.MessageBinary, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close does without the close handshake, which would wait for the peer.
func (c *webSocketConn) Close() error { return c.ws.CloseNow() }
