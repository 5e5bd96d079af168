package noise

import (
	"encoding/json"
	"io"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"tailscale.com/tailcfg"
)

// DefaultMaxBody is the largest body that a node may send to a path:
// tailnet-lock messages carry whole chains of updates, map requests a
// Hostinfo, answers to server-to-client calls whatever the node was asked.
func DefaultMaxBody(path string) int64 {
	switch {
	case strings.HasPrefix(path, "/machine/tka/"):
		return 10 << 20
	case path == "/machine/register":
		return 256 << 10
	case path == "/machine/map", strings.HasPrefix(path, "/machine/c2n/"):
		return 1 << 20
	}
	return 256 << 10
}

// openToStrangers names what a machine key without a node may ask. The map
// handler refuses them by itself, since a deleted node gets a last map.
func openToStrangers(path string) bool {
	switch path {
	case "/machine/register", "/machine/whoami", "/machine/map":
		return true
	}
	return false
}

// maxRefusing bounds the requests whose refusal waits to be written.
const maxRefusing = 64

// ServeHTTP passes a request inside Noise to Config.Handler if the limits of
// its machine key allow it.
func (c *session) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	known := c.s.cfg.Known(c.peer.Machine)
	c.setKnown(known, true)
	if !known && !c.enter() {
		c.refuse(w, r)
		return
	}
	if known {
		c.enterKnown()
	}
	defer c.leave()
	defer c.recover(w, r)

	if c.peer.Version < int(c.s.cfg.MinVersion) {
		refuseVersion(w, r)
		return
	}
	if !known && !openToStrangers(r.URL.Path) {
		http.Error(w, "unauthorized", http.StatusUnauthorized)
		return
	}
	if e := r.Header.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
		http.Error(w, "content encoding not supported", http.StatusUnsupportedMediaType)
		return
	}
	limit := c.s.lim.StrangerBody
	if known {
		limit = c.s.cfg.MaxBody(r.URL.Path)
	}
	if r.ContentLength > limit {
		http.Error(w, "request body too large", http.StatusRequestEntityTooLarge)
		return
	}
	if r.Body != nil && r.Body != http.NoBody {
		r.Body = http.MaxBytesReader(w, &steadyBody{
			ReadCloser: r.Body,
			rc:         http.NewResponseController(w),
			stall:      c.s.lim.BodyStall,
		}, limit)
	}
	c.s.cfg.Handler.ServeHTTP(w, r)
	if !known {
		// A stranger has its place until it has taken the answer.
		c.hand(w)
		if c.s.cfg.Known(c.peer.Machine) {
			c.setKnown(true, true)
		}
	}
}

// hand sends an answer within the time of WriteStall.
func (c *session) hand(w http.ResponseWriter) {
	rc := http.NewResponseController(w)
	rc.SetWriteDeadline(time.Now().Add(c.s.lim.WriteStall))
	rc.Flush()
}

// enter takes one of a stranger's places.
func (c *session) enter() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.active >= c.s.lim.StrangerRequests {
		return false
	}
	c.begin()
	return true
}

func (c *session) enterKnown() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begin()
}

func (c *session) begin() {
	c.active++
	if c.idle != nil {
		c.idle.Stop()
	}
}

func (c *session) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.active--
	if c.active == 0 && c.idle != nil {
		c.idle.Reset(c.s.lim.StrangerIdle)
	}
}

// refuse answers a request beyond a stranger's places. The answer waits for
// the peer to read, so its headers are let go, and a peer that lets very many
// refusals wait gets resets instead, which do not.
func (c *session) refuse(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	c.refused++
	tooMany := c.refused > maxRefusing
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		c.refused--
		c.mu.Unlock()
	}()
	if tooMany {
		panic(http.ErrAbortHandler)
	}
	r.Header = nil
	w.Header().Set("Retry-After", "1")
	w.WriteHeader(http.StatusTooManyRequests)
	c.hand(w)
}

// refuseVersion tells clients that are too old why they cannot come in. The
// text of a RegisterResponse is the only one that reaches a person.
func refuseVersion(w http.ResponseWriter, r *http.Request) {
	const text = "this version of Tailscale is too old for the server; update to v1.80 or later"
	if r.URL.Path != "/machine/register" {
		http.Error(w, text, http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(tailcfg.RegisterResponse{Error: text})
}

// recover turns a panic of the handler into an answer without text.
func (c *session) recover(w http.ResponseWriter, r *http.Request) {
	v := recover()
	if v == nil {
		return
	}
	if v == http.ErrAbortHandler {
		panic(v)
	}
	c.s.log.Error("panic in a handler inside noise", "method", r.Method, "path", r.URL.Path, "panic", v, "stack", string(debug.Stack()))
	w.WriteHeader(http.StatusInternalServerError)
}

// steadyBody fails a read when the peer sends nothing for the time of stall.
type steadyBody struct {
	io.ReadCloser
	rc    *http.ResponseController
	stall time.Duration
	armed time.Time
}

func (b *steadyBody) Read(p []byte) (int, error) {
	// Each new deadline is a message to the connection's own goroutine, so a
	// fast body does with the one of its beginning.
	if now := time.Now(); now.Sub(b.armed) > b.stall/10 {
		b.armed = now
		b.rc.SetReadDeadline(now.Add(b.stall))
	}
	return b.ReadCloser.Read(p)
}
