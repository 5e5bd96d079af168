package listener

import (
	"bufio"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"strings"
	"time"
)

// requests is what every request passes before the handler.
type requests struct {
	cfg *Config
	log *slog.Logger
}

// DefaultMaxBody is the largest body by path: what the routes that take one
// need, and nothing for all others.
func DefaultMaxBody(r *http.Request) int64 {
	p := r.URL.Path
	switch {
	case p == "/verify":
		return 4 << 10
	case strings.HasPrefix(p, "/api/v2/oauth/"):
		return 16 << 10
	case strings.HasPrefix(p, "/api/"):
		if strings.Contains(p, "/policy") || strings.Contains(p, "/acl") {
			return 2 << 20
		}
		return 256 << 10
	}
	if ct, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";"); ct == "application/x-www-form-urlencoded" {
		return 16 << 10
	}
	return 0
}

func (q *requests) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	lim := &q.cfg.Limits
	a := &answer{ResponseWriter: w, rc: http.NewResponseController(w), limit: lim.Write}
	defer q.recover(a, r)

	if status := q.check(r); status != 0 {
		if status != http.StatusMethodNotAllowed || r.ContentLength != 0 {
			// Nothing that follows on this connection is worth reading.
			a.Header().Set("Connection", "close")
		}
		if status == http.StatusMethodNotAllowed {
			a.Header().Set("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
		}
		http.Error(a, strings.ToLower(http.StatusText(status)), status)
		return
	}
	if len(r.TransferEncoding) > 0 {
		// Behind a proxy that believes a Content-Length beside it, what follows
		// could be somebody else's. RFC 9112 section 6.1 wants the connection
		// closed then, and net/http hides whether there was one.
		a.Header().Set("Connection", "close")
	}
	if r.Body != nil && r.Body != http.NoBody {
		r.Body = http.MaxBytesReader(w, &timedBody{
			ReadCloser: r.Body,
			rc:         a.rc,
			start:      time.Now(),
			base:       lim.Body,
			most:       lim.BodyMax,
			size:       r.ContentLength,
		}, q.cfg.MaxBody(r))
	}
	q.cfg.Handler.ServeHTTP(a, withOrigin(r, q.cfg.TrustedProxies))
}

// check returns the status of a request that goes no further, or 0.
func (q *requests) check(r *http.Request) int {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions:
	default:
		return http.StatusMethodNotAllowed
	}
	if len(r.RequestURI) > q.cfg.Limits.URL {
		return http.StatusRequestURITooLong
	}
	lines := 0
	for _, v := range r.Header {
		lines += len(v)
	}
	if lines > q.cfg.Limits.HeaderLines {
		return http.StatusRequestHeaderFieldsTooLarge
	}
	for _, e := range r.Header.Values("Content-Encoding") {
		if e != "" && !strings.EqualFold(e, "identity") {
			return http.StatusUnsupportedMediaType
		}
	}
	if r.ContentLength != 0 {
		if most := q.cfg.MaxBody(r); r.ContentLength > most || most == 0 {
			return http.StatusRequestEntityTooLarge
		}
	}
	return 0
}

// recover answers a handler's panic without text: what went wrong is for the
// log only.
func (q *requests) recover(a *answer, r *http.Request) {
	v := recover()
	if v == nil {
		return
	}
	if err, ok := v.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		panic(v)
	}
	q.log.Error("panic in a handler", "method", r.Method, "path", r.URL.Path, "panic", v, "stack", string(debug.Stack()))
	if a.begun || a.taken {
		// The client must not take half an answer for a whole one.
		panic(http.ErrAbortHandler)
	}
	a.WriteHeader(http.StatusInternalServerError)
}

// answer gives each response its own time from its first byte on.
type answer struct {
	http.ResponseWriter
	rc     *http.ResponseController
	limit  time.Duration
	begun  bool
	taken  bool
	stream bool
}

func (a *answer) begin() {
	if a.begun {
		return
	}
	a.begun = true
	if !a.stream {
		a.rc.SetWriteDeadline(time.Now().Add(a.limit))
	}
}

func (a *answer) WriteHeader(status int) {
	if status >= 200 {
		a.begin()
	}
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(p []byte) (int, error) {
	a.begin()
	return a.ResponseWriter.Write(p)
}

func (a *answer) Flush() {
	a.begin()
	a.rc.Flush()
}

func (a *answer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := a.rc.Hijack()
	a.taken = err == nil
	return c, rw, err
}

func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// Stream lifts the time limit of a response that goes on for as long as both
// sides want. Each single write still has to end within the limit: call it
// before each of them.
func Stream(w http.ResponseWriter) {
	rc, limit := http.NewResponseController(w), 30*time.Second
	for v := w; ; {
		if a, ok := v.(*answer); ok {
			a.stream, a.begun = true, true
			limit = a.limit
			break
		}
		u, ok := v.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			break
		}
		v = u.Unwrap()
	}
	rc.SetWriteDeadline(time.Now().Add(limit))
}

// timedBody gives a body its base time plus a second for each 64 KiB that were
// announced or, without an announced size, have arrived.
type timedBody struct {
	io.ReadCloser
	rc         *http.ResponseController
	start      time.Time
	base, most time.Duration
	size       int64 // -1 when not announced
	read       int64
	armed      time.Duration
}

func (b *timedBody) Read(p []byte) (int, error) {
	if d := min(b.base+time.Duration(max(b.size, b.read)>>16)*time.Second, b.most); d != b.armed {
		b.armed = d
		b.rc.SetReadDeadline(b.start.Add(d))
	}
	n, err := b.ReadCloser.Read(p)
	b.read += int64(n)
	if err == io.EOF {
		// net/http goes on reading to notice a client that leaves, and would
		// take the end of this time for one.
		b.rc.SetReadDeadline(time.Time{})
	}
	return n, err
}
