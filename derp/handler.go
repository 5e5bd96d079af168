package derp

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
	tsderp "tailscale.com/derp"
	"tailscale.com/derp/derpserver"
	"tailscale.com/net/wsconn"
)

// onceFlag is a flag that is only ever set.
type onceFlag struct{ v atomic.Bool }

func (f *onceFlag) set()      { f.v.Store(true) }
func (f *onceFlag) get() bool { return f.v.Load() }

// Handler serves the relay's paths for the main listener: /derp, /derp/probe,
// /derp/latency-check, /bootstrap-dns and /generate_204. Mount it at the root
// of those paths; requests to /derp stay in it as long as the connection lives.
func (s *Server) Handler() http.Handler {
	return s.routes(func(r *http.Request) bool { return r.TLS != nil && s.metaOnMain.get() })
}

// routes is the handler of one listener. MetaCert tells whether a request came
// over a handshake that presented the meta certificate: only its readers may
// ask for a fast start.
func (s *Server) routes(metaCert func(*http.Request) bool) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /derp", func(w http.ResponseWriter, r *http.Request) {
		s.serveRelay(w, r, metaCert(r))
	})
	mux.HandleFunc("GET /derp/probe", bounded(derpserver.ProbeHandler))
	mux.HandleFunc("GET /derp/latency-check", bounded(derpserver.ProbeHandler))
	mux.HandleFunc("GET /generate_204", bounded(derpserver.ServeNoContent))
	mux.HandleFunc("GET /bootstrap-dns", bounded(s.names.ServeHTTP))
	return mux
}

// bounded gives the answer 30 s to leave. The relay itself must not have it.
func bounded(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		// Not every ResponseWriter has deadlines; the server's limits stand then.
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(30 * time.Second))
		h(w, r)
	}
}

// httpServer serves the own TLS listener.
func (s *Server) httpServer() *http.Server {
	return &http.Server{
		Handler:           s.routes(func(r *http.Request) bool { return r.TLS != nil }),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       60 * time.Second,
		MaxHeaderBytes:    32 << 10,
		ConnContext:       s.cfg.ConnContext,
		ErrorLog:          log.New(slogWriter{s.cfg.Log}, "", 0),
	}
}

// slogWriter turns net/http's chatter about bad handshakes into debug lines.
type slogWriter struct{ log *slog.Logger }

func (w slogWriter) Write(p []byte) (int, error) {
	w.log.Debug("relay http", "msg", strings.TrimSpace(string(p)))
	return len(p), nil
}

// serveRelay upgrades a request to /derp and relays until it ends.
func (s *Server) serveRelay(w http.ResponseWriter, r *http.Request, metaCert bool) {
	up := strings.ToLower(r.Header.Get("Upgrade"))
	if up != "derp" && up != "websocket" {
		w.Header().Set("Upgrade", "DERP")
		http.Error(w, "DERP requires connection upgrade", http.StatusUpgradeRequired)
		return
	}
	remote := s.cfg.Source(r)
	release, ok := s.sources.begin(remote.Addr(), s.cfg.Now())
	if !ok {
		s.stats.limited.Add(1)
		w.Header().Set("Retry-After", "60")
		w.Header().Set("Connection", "close")
		http.Error(w, "too many unidentified relay connections", http.StatusTooManyRequests)
		return
	}
	var once sync.Once
	c := &conn{srv: s, req: r, remote: remote, release: func(failed bool) {
		once.Do(func() { release(failed, s.cfg.Now()) })
	}}
	// Browsers ask for the subprotocol; early native clients said "websocket"
	// and spoke plain DERP.
	if up == "websocket" && strings.Contains(r.Header.Get("Sec-WebSocket-Protocol"), "derp") {
		s.serveWebSocket(w, r, c)
		return
	}
	s.serveNative(w, r, c, metaCert)
}

func (s *Server) serveNative(w http.ResponseWriter, r *http.Request, c *conn, metaCert bool) {
	nc, brw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		c.release(false)
		http.Error(w, "DERP requires HTTP/1.1", http.StatusUpgradeRequired)
		return
	}
	c.Conn, c.hard = nc, transport(nc)
	// What came along with the request is in brw already. A fast start
	// sends its first frame without waiting for ours.
	ahead, _ := brw.Reader.Peek(brw.Reader.Buffered())
	c.r = io.MultiReader(strings.NewReader(string(ahead)), nc)
	if len(ahead) == 0 {
		c.r = nc
	}
	if !metaCert || r.Header.Get(tsderp.FastStartHeader) != "1" {
		// Left in the buffer: it goes out with the server's key frame.
		fmt.Fprintf(brw.Writer, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n"+
			"Derp-Version: %d\r\nDerp-Public-Key: %s\r\n\r\n",
			tsderp.ProtocolVersion, s.relay.PublicKey().UntypedHexString())
	} else {
		s.stats.fastStarts.Add(1)
	}
	s.serve(withIdealNode(r), c, brw.Writer)
}

func (s *Server) serveWebSocket(w http.ResponseWriter, r *http.Request, c *conn) {
	hw := &hijackWriter{ResponseWriter: w}
	ws, err := websocket.Accept(hw, r, &websocket.AcceptOptions{
		Subprotocols: []string{"derp"},
		// The relay authenticates by node key; a foreign page gains nothing.
		OriginPatterns: []string{"*"},
		// Relayed packets are encrypted already.
		CompressionMode: websocket.CompressionDisabled,
	})
	if err != nil {
		c.release(true)
		return
	}
	// The library's closing handshake has no deadline that holds against a
	// hostile peer: close the socket under it, then let it clean up.
	defer ws.CloseNow()
	defer hw.conn.Close()
	if ws.Subprotocol() != "derp" {
		c.release(true)
		return
	}
	s.stats.webSockets.Add(1)
	nc := wsconn.NetConn(r.Context(), ws, websocket.MessageBinary, r.RemoteAddr)
	ws.SetReadLimit(2 * tsderp.MaxPacketSize)
	c.Conn, c.r, c.hard = nc, nc, transport(hw.conn)
	s.serve(withIdealNode(r), c, bufio.NewWriter(c))
}

// hijackWriter remembers the connection that websocket.Accept takes over.
type hijackWriter struct {
	http.ResponseWriter
	conn net.Conn
}

// Hijack implements http.Hijacker.
func (w *hijackWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	nc, brw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	w.conn = nc
	return nc, brw, err
}

// withIdealNode passes on that the client would rather be elsewhere in its
// region, which derpserver counts.
func withIdealNode(r *http.Request) context.Context {
	if v := r.Header.Get(tsderp.IdealNodeHeader); v != "" {
		return derpserver.IdealNodeContextKey.WithValue(r.Context(), v)
	}
	return r.Context()
}

// remoteAddr is the default Config.Source.
func remoteAddr(r *http.Request) netip.AddrPort {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
