package noise

import (
	"context"
	"log/slog"
	"net"
	"net/http"

	"golang.org/x/net/http2"
)

//lint:file-ignore SA1019 http.Server can only serve a listener: behind one, an idle session costs 72 KB instead of 45.

// http2Server serves HTTP/2 on connections that are there already.
type http2Server struct {
	base *http.Server // carries the settings; never listens
	h2   *http2.Server
}

func newHTTP2(log *slog.Logger) (*http2Server, error) {
	s := &http2Server{
		base: &http.Server{
			// net/http adds 320 bytes for ten headers to what it announces.
			MaxHeaderBytes: 16<<10 - 320,
			ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug),
			// The windows hold what one connection can make us keep: 64 KiB.
			// They are the same for everybody, since HTTP/2 fixes them before
			// a stranger can register and turn into a node on the same
			// connection.
			HTTP2: &http.HTTP2Config{
				MaxConcurrentStreams:          250,
				MaxReadFrameSize:              16 << 10,
				MaxReceiveBufferPerConnection: 65535,
				MaxReceiveBufferPerStream:     65535,
			},
		},
		h2: new(http2.Server),
	}
	// Ties the connections to base, whose Shutdown sends GOAWAY.
	if err := http2.ConfigureServer(s.base, s.h2); err != nil {
		return nil, err
	}
	return s, nil
}

// serve returns when the connection has ended.
func (s *http2Server) serve(ctx context.Context, c net.Conn, h http.Handler) {
	s.h2.ServeConn(c, &http2.ServeConnOpts{Context: ctx, BaseConfig: s.base, Handler: h})
}

// goAway asks every peer to make no new requests, and does not wait.
func (s *http2Server) goAway(ctx context.Context) { s.base.Shutdown(ctx) }
