// Package listener opens the server's doors to the world: TCP with or without
// TLS, and the unix socket.
//
// It owns what must hold before a request means anything: how many connections
// there may be and from where (Guard), how long a header, a body or an answer
// may take, how large they may be (request.go), which certificate is shown
// (CertFiles, ACME), and who really sent a request that came through a proxy
// (ClientIP). It routes nothing and knows no tailnet; every Server is given
// the one handler that it serves and never falls back on
// http.DefaultServeMux, where libraries register debug pages.
//
// A connection, step by step: accept, a place in the Guard's count of its
// source, TLS, at most ten seconds for the header of a request, the checks of
// request.go, the handler. A handler that finds out that the other side is
// somebody (a node, a valid API key) calls Identify, and the connection no
// longer counts among the strangers of its source.
//
//	certs := listener.NewCertFiles(certPath, keyPath, log)
//	srv, err := listener.New(listener.Config{
//		Addr:    ":443",
//		TLS:     certs.TLSConfig(),
//		Guard:   guard,
//		Handler: mux,
//	})
//	...
//	err = srv.Listen()
//	...
//	err = srv.Run(ctx)
package listener

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"
)

// Config says what one Server listens on and serves. Handler is required, and
// one of Addr and Unix.
type Config struct {
	// Name appears in logs and errors, as the configuration key of the
	// address does ("listen_addr").
	Name string

	// Addr is host:port. Port 0 takes a free one; see Server.Addr.
	Addr string

	// Unix is the path of a socket, instead of Addr. UnixMode is its file
	// mode; 0 means 0770.
	Unix     string
	UnixMode os.FileMode

	// TLS makes the listener speak TLS; HTTP/2 and HTTP/1.1 are offered.
	TLS *tls.Config

	Handler http.Handler

	// Guard counts the connections of all listeners that share it. Nil means
	// no cap.
	Guard *Guard

	// TrustedProxies may tell the address and the scheme of a request.
	TrustedProxies []netip.Prefix

	// MaxBody is the largest body that a request may have. Nil means
	// DefaultMaxBody.
	MaxBody func(*http.Request) int64

	// Optional lets Listen and Run succeed without a listener when the
	// address is taken or not ours to take.
	Optional bool

	Limits Limits

	Log *slog.Logger // nil means none
}

// Limits are the times and sizes of one request. A zero field means the
// default given with it.
type Limits struct {
	ReadHeader  time.Duration // from accept or first byte to the end of the header: 10 s
	Idle        time.Duration // between requests: 60 s
	Body        time.Duration // for a body, plus 1 s for each 64 KiB: 10 s
	BodyMax     time.Duration // for the largest body: 60 s
	Write       time.Duration // for the answer, from its first byte: 30 s
	Shutdown    time.Duration // for open requests when Run's context ends: 10 s
	HeaderBytes int           // of all headers: 32 KiB
	HeaderLines int           // number of headers: 200
	URL         int           // bytes of the request target: 8 KiB
}

func (l Limits) withDefaults() Limits {
	def(&l.ReadHeader, 10*time.Second)
	def(&l.Idle, 60*time.Second)
	def(&l.Body, 10*time.Second)
	def(&l.BodyMax, 60*time.Second)
	def(&l.Write, 30*time.Second)
	def(&l.Shutdown, 10*time.Second)
	def(&l.HeaderBytes, 32<<10)
	def(&l.HeaderLines, 200)
	def(&l.URL, 8<<10)
	return l
}

func def[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

// Server serves one handler on one address.
type Server struct {
	cfg  Config
	log  *slog.Logger
	http *http.Server

	// mu guards the following fields.
	mu sync.Mutex
	l  net.Listener
}

// New checks the configuration. It opens nothing; see Listen.
func New(cfg Config) (*Server, error) {
	if cfg.Handler == nil {
		return nil, fmt.Errorf("%s: no handler", cfg.Name)
	}
	if (cfg.Addr == "") == (cfg.Unix == "") {
		return nil, fmt.Errorf("%s: either an address or a socket path is needed", cfg.Name)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxBody == nil {
		cfg.MaxBody = DefaultMaxBody
	}
	def(&cfg.UnixMode, 0o770)
	cfg.Limits = cfg.Limits.withDefaults()
	s := &Server{cfg: cfg, log: cfg.Log.With("listener", cfg.Name)}
	s.http = &http.Server{
		Handler:           &requests{cfg: &s.cfg, log: s.log},
		ReadHeaderTimeout: cfg.Limits.ReadHeader,
		IdleTimeout:       cfg.Limits.Idle,
		// Only a backstop, and what renews the deadline that the previous
		// response of the connection left behind: an answer gets its own time
		// when it begins.
		WriteTimeout:   cfg.Limits.ReadHeader + cfg.Limits.BodyMax + 2*cfg.Limits.Write,
		MaxHeaderBytes: cfg.Limits.HeaderBytes,
		TLSConfig:      cfg.TLS,
		ErrorLog:       slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		ConnContext:    ConnContext,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams:          100,
			MaxReadFrameSize:              16 << 10,
			MaxReceiveBufferPerConnection: 256 << 10,
			MaxReceiveBufferPerStream:     64 << 10,
			WriteByteTimeout:              cfg.Limits.Write,
		},
	}
	return s, nil
}

// Listen opens the address. The error names the configuration key. Connections
// wait in the kernel until Run.
func (s *Server) Listen() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.l != nil {
		return nil
	}
	var err error
	var l net.Listener
	if s.cfg.Unix != "" {
		l, err = ListenUnix(s.cfg.Unix, s.cfg.UnixMode)
	} else {
		l, err = ListenTCP(context.Background(), s.cfg.Addr)
	}
	if err != nil {
		if s.cfg.Optional && (errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.EACCES)) {
			s.log.Warn("address not available, going on without", "addr", s.cfg.Addr, "err", err)
			return nil
		}
		return fmt.Errorf("%s: %w", s.cfg.Name, err)
	}
	if s.cfg.Guard != nil && s.cfg.Unix == "" {
		l = s.cfg.Guard.Wrap(l)
	}
	s.l = l
	return nil
}

// Addr is the address that Listen opened, with the port that was chosen; nil
// before Listen and when an Optional address was not available.
func (s *Server) Addr() net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.l == nil {
		return nil
	}
	return s.l.Addr()
}

// Run serves until ctx ends and the open requests have ended or used up their
// time. Connections that handlers took over are theirs to end. It returns nil
// after such an end.
func (s *Server) Run(ctx context.Context) error {
	if err := s.Listen(); err != nil {
		return err
	}
	s.mu.Lock()
	l := s.l
	s.mu.Unlock()
	if l == nil {
		<-ctx.Done()
		return nil
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-ctx.Done()
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.Limits.Shutdown)
		defer cancel()
		if s.http.Shutdown(stop) != nil {
			s.http.Close()
		}
	}()
	var err error
	if s.cfg.TLS != nil {
		err = s.http.ServeTLS(l, "", "")
	} else {
		err = s.http.Serve(l)
	}
	if ctx.Err() == nil {
		l.Close()
		return fmt.Errorf("%s: %w", s.cfg.Name, err)
	}
	<-done
	return nil
}

// ListenTCP opens a TCP address whose connections notice a vanished peer:
// keep-alive after 30 s, three times, and 60 s for unacknowledged data.
func ListenTCP(ctx context.Context, addr string) (net.Listener, error) {
	lc := net.ListenConfig{
		KeepAliveConfig: net.KeepAliveConfig{
			Enable:   true,
			Idle:     30 * time.Second,
			Interval: 30 * time.Second,
			Count:    3,
		},
		Control: func(_, _ string, c syscall.RawConn) error {
			var serr error
			err := c.Control(func(fd uintptr) { serr = setUserTimeout(fd, 60*time.Second) })
			return errors.Join(err, serr)
		},
	}
	return lc.Listen(ctx, "tcp", addr)
}
