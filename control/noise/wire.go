package noise

import (
	"context"
	"errors"
	"io"
	"net"
	"time"

	"github.com/coder/websocket"
)

// wire is the connection below Noise.
type wire struct {
	net.Conn
	stall time.Duration
	early []byte // read together with the HTTP request
}

func (w *wire) Read(p []byte) (int, error) {
	if len(w.early) > 0 {
		n := copy(p, w.early)
		if w.early = w.early[n:]; len(w.early) == 0 {
			w.early = nil
		}
		return n, nil
	}
	return w.Conn.Read(p)
}

// send gives each write its own time: a peer that takes nothing for that long
// loses the connection, however little was queued for it.
func (w *wire) send(p []byte) (int, error) {
	w.Conn.SetWriteDeadline(time.Now().Add(w.stall))
	return w.Conn.Write(p)
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
