package noise

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
	"tailscale.com/control/controlhttp/controlhttpcommon"

	"github.com/signalbox-net/signalbox/control/h2"
	"github.com/signalbox-net/signalbox/control/limit"
)

const (
	// base64 of 101 bytes with padding.
	initiationBase64 = (initiationSize + 2) / 3 * 4

	// webSocketMessage bounds what a WebSocket peer can make us buffer.
	webSocketMessage = 64 << 10
)

// refusal is an answer to an upgrade request that gets no connection.
type refusal struct {
	status int
	retry  time.Duration
	text   string
}

func (e *refusal) write(w http.ResponseWriter) {
	if e.retry > 0 {
		seconds := int64((e.retry + time.Second - 1) / time.Second)
		w.Header().Set("Retry-After", strconv.FormatInt(seconds, 10))
	}
	// What a refused client sends next on this connection is of no interest.
	w.Header().Set("Connection", "close")
	http.Error(w, e.text, e.status)
}

// ServeHTTP answers /ts2021: the native upgrade by POST and the WebSocket one
// by GET. It needs HTTP/1.1, since the connection is taken over.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	upgrade := r.Header.Get("Upgrade")
	switch {
	case r.Method != http.MethodPost && r.Method != http.MethodGet:
		w.Header().Set("Allow", "GET, POST")
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
	case r.ProtoMajor != 1:
		http.Error(w, "make this request over HTTP/1.1", http.StatusBadRequest)
	case upgrade == "":
		w.Header().Set("Upgrade", controlhttpcommon.UpgradeHeaderValue)
		w.Header().Set("Connection", "Upgrade")
		http.Error(w, "this address speaks the Tailscale control protocol", http.StatusUpgradeRequired)
	case r.ContentLength != 0:
		(&refusal{status: http.StatusRequestEntityTooLarge, text: "unexpected body"}).write(w)
	case r.Method == http.MethodPost && strings.EqualFold(upgrade, controlhttpcommon.UpgradeHeaderValue):
		s.serveNative(w, r)
	case r.Method == http.MethodGet && strings.EqualFold(upgrade, "websocket"):
		s.serveWebSocket(w, r)
	default:
		http.Error(w, "unknown upgrade protocol", http.StatusBadRequest)
	}
}

func (s *Server) serveNative(w http.ResponseWriter, r *http.Request) {
	c, response, no := s.handshake(r, r.Header.Get(controlhttpcommon.HandshakeHeaderName))
	if no != nil {
		no.write(w)
		return
	}
	raw, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, "make this request over HTTP/1.1", http.StatusBadRequest)
		return
	}
	const head = "HTTP/1.1 101 Switching Protocols\r\n" +
		"Upgrade: " + controlhttpcommon.UpgradeHeaderValue + "\r\n" +
		"Connection: Upgrade\r\n\r\n"
	if s.start(c, raw, append([]byte(head), response...), buffered(rw.Reader)) {
		// Returning lets net/http give up its buffers and this goroutine.
		go c.serve()
	}
}

// start gives a session its connection: head ends with the Noise response and
// goes out in one write, early is what was read already. The peer has the time
// of Setup for its first record.
func (s *Server) start(c *session, raw net.Conn, head, early []byte) bool {
	raw.SetDeadline(time.Now().Add(s.lim.Setup))
	if _, err := raw.Write(head); err != nil {
		raw.Close()
		return false
	}
	c.wire = &wire{Conn: raw, stall: s.lim.WriteStall, early: early}
	c.in.w, c.out.w = c.wire, c.wire
	c.h2 = h2.New((*conn)(c), h2.Config{
		Handler: c, Context: WithPeer(s.base, c.peer), Setup: s.lim.Setup, Stall: s.lim.WriteStall, Frame: 4 * maxPlaintext, Control: c.frame, Log: s.log,
	})
	if !s.add(c) {
		c.close()
		return false
	}
	return true
}

func (s *Server) serveWebSocket(w http.ResponseWriter, r *http.Request) {
	if !offers(r.Header, controlhttpcommon.UpgradeHeaderValue) {
		// Refused before the upgrade: the close handshake of an accepted
		// WebSocket has no limit on what it reads.
		(&refusal{status: http.StatusBadRequest, text: "unknown WebSocket subprotocol"}).write(w)
		return
	}
	c, response, no := s.handshake(r, r.URL.Query().Get(controlhttpcommon.HandshakeHeaderName))
	if no != nil {
		no.write(w)
		return
	}
	pings := rateCounter{limit: s.lim.ControlFrames}
	var flood sync.Once
	hj := &hijackCatcher{ResponseWriter: w}
	ws, err := websocket.Accept(hj, r, &websocket.AcceptOptions{
		Subprotocols: []string{controlhttpcommon.UpgradeHeaderValue},
		// Noise authenticates; a browser client may live on any page.
		InsecureSkipVerify: true,
		CompressionMode:    websocket.CompressionDisabled,
		OnPingReceived: func(context.Context, []byte) bool {
			if pings.allow(s.cfg.Now(), 1) {
				return true
			}
			// More pings may be in the read buffer already.
			flood.Do(func() {
				s.counts.flooded.Add(1)
				hj.conn.Close()
			})
			return false
		},
	})
	if err != nil {
		s.log.Debug("websocket upgrade", "err", err)
		return
	}
	ws.SetReadLimit(webSocketMessage)
	if s.start(c, &webSocketConn{Conn: hj.conn, ws: ws}, response, nil) {
		// The WebSocket library reads through net/http's buffers, so the
		// handler stays with it.
		c.serve()
	}
}

// handshake checks and computes a handshake, and returns the session with the
// answer to the client. No lock is held and nothing is kept for a refusal.
func (s *Server) handshake(r *http.Request, b64 string) (*session, []byte, *refusal) {
	s.mu.Lock()
	draining := s.draining
	s.mu.Unlock()
	if draining {
		return nil, nil, &refusal{status: http.StatusServiceUnavailable, retry: time.Second, text: "shutting down"}
	}
	init, err := decodeInitiation(b64)
	if err != nil {
		s.counts.malformed.Add(1)
		return nil, nil, &refusal{status: http.StatusBadRequest, text: err.Error()}
	}
	if no := s.enter(r.Context()); no != nil {
		s.counts.busy.Add(1)
		return nil, nil, no
	}
	agreed, err := respond(s.private, init)
	s.gate.Release(1)
	if err != nil {
		s.counts.malformed.Add(1)
		s.log.Debug("noise handshake", "err", err)
		return nil, nil, &refusal{status: http.StatusBadRequest, text: "invalid handshake"}
	}
	c := &session{
		s:   s,
		in:  recordReader{aead: agreed.in},
		out: recordWriter{aead: agreed.out},
		peer: Conn{
			Machine: agreed.machine,
			Version: agreed.version,
			Remote:  s.cfg.Source(r),
			ID:      s.lastID.Add(1),
		},
		control: rateCounter{limit: s.lim.ControlFrames},
	}
	if no := s.admit(c); no != nil {
		s.counts.limited.Add(1)
		return nil, nil, no
	}
	if s.cfg.Identify != nil {
		c.identify = s.cfg.Identify(r)
	}
	s.counts.handshakes.Add(1)
	if s.log.Enabled(r.Context(), slog.LevelDebug) {
		s.log.Debug("noise connection", "machine", c.peer.Machine.ShortString(), "version", c.peer.Version, "conn", c.peer.ID)
	}
	return c, agreed.response, nil
}

// admit charges the source of a machine key that has no node. Nodes come back
// free of charge, and a stranger who becomes one is given back what it paid: a
// whole company may reconnect, or enrol, from one address.
func (s *Server) admit(c *session) *refusal {
	if s.cfg.Known(c.peer.Machine) {
		return nil
	}
	if s.cfg.Overloaded() {
		return &refusal{status: http.StatusServiceUnavailable, retry: 10 * time.Second, text: "try again later"}
	}
	k, now := limit.Addr(c.peer.Remote.Addr()), s.cfg.Now()
	if !s.sources.Allow(k, now) {
		return &refusal{status: http.StatusTooManyRequests, retry: s.sources.Wait(k, now), text: "too many new clients from this address"}
	}
	c.charged = true
	return nil
}

// enter waits for a turn at the gate. The caller releases it.
func (s *Server) enter(ctx context.Context) *refusal {
	if s.gate.TryAcquire(1) {
		return nil
	}
	busy := &refusal{status: http.StatusServiceUnavailable, retry: 2 * time.Second, text: "too many handshakes"}
	if s.waiting.Add(1) > int64(s.lim.HandshakeQueue) {
		s.waiting.Add(-1)
		return busy
	}
	defer s.waiting.Add(-1)
	ctx, cancel := context.WithTimeout(ctx, s.lim.HandshakeWait)
	defer cancel()
	if s.gate.Acquire(ctx, 1) != nil {
		return busy
	}
	return nil
}

func decodeInitiation(b64 string) ([]byte, error) {
	if b64 == "" {
		return nil, fmt.Errorf("missing %s", controlhttpcommon.HandshakeHeaderName)
	}
	if len(b64) > initiationBase64 {
		return nil, fmt.Errorf("%s is too long", controlhttpcommon.HandshakeHeaderName)
	}
	init, err := base64.StdEncoding.DecodeString(b64)
	if err != nil || len(init) != initiationSize || init[2] != initiationType ||
		binary.BigEndian.Uint16(init[3:]) != initiationSize-initiationHeader {
		return nil, fmt.Errorf("invalid %s", controlhttpcommon.HandshakeHeaderName)
	}
	return init, nil
}

func offers(h http.Header, protocol string) bool {
	for _, line := range h.Values("Sec-WebSocket-Protocol") {
		for p := range strings.SplitSeq(line, ",") {
			if strings.EqualFold(strings.TrimSpace(p), protocol) {
				return true
			}
		}
	}
	return false
}

// buffered returns what net/http has read beyond the request.
func buffered(r *bufio.Reader) []byte {
	n := r.Buffered()
	if n == 0 {
		return nil
	}
	b, _ := r.Peek(n)
	return append([]byte(nil), b...)
}

// hijackCatcher remembers the connection that the WebSocket library takes
// over, since the library offers no deadline of its own.
type hijackCatcher struct {
	http.ResponseWriter
	conn net.Conn
}

func (h *hijackCatcher) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	h.conn = c
	return c, rw, err
}

func (h *hijackCatcher) Unwrap() http.ResponseWriter { return h.ResponseWriter }
