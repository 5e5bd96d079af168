// Package pages serves what a browser, a load balancer or a crawler finds at
// the server's own address: the page that the AuthURL of a login or an SSH
// check opens, the start page, /health, /version and /robots.txt.
//
// A page shows and explains. It decides nothing: approval is an act of an
// administrator elsewhere. The one thing that opening a page changes is the
// request's Opened mark, which keeps strangers from evicting it.
//
// A stock client prints https://HOST/register/<id>. Whoever opens that address
// sees which device asks, from where, and the end of the address in two groups,
// to be compared with the terminal: a link that somebody else sent shows
// another end. The id has 160 random bits and only its SHA-256 is stored, so
// the address itself is the permission to see the page. Every id that is not
// waiting gets the same answer.
package pages

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"html/template"
	"log/slog"
	"net/http"
	"runtime"
	"strconv"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/signalbox-net/signalbox/control/limit"
	"github.com/signalbox-net/signalbox/db"
)

// Config of the pages. Fields without a stated zero meaning are required.
type Config struct {
	Store   *db.Store
	Tailnet db.TailnetID
	Ledger  Ledger

	// ServerURL is the configured address of this server, shown to people. The
	// Host header of a request is never used.
	ServerURL string
	// Build is what /version tells.
	Build Build
	// Checks are further things that must be well for /health to pass, by the
	// name under which a failure is shown to everybody. Nil: the database only.
	Checks map[string]func(context.Context) error
	// Now is the clock. Nil: time.Now.
	Now func() time.Time
	// Log gets one line for each fault. Nil: nothing is logged.
	Log *slog.Logger
}

// Ledger is the door for writes, *tailnet.Ledger.
type Ledger interface {
	Do(context.Context, db.Actor, func(*db.Tx) error) (db.Revision, error)
}

// Build describes the running program. Empty fields are left out.
type Build struct {
	Version   string `json:"version"`
	Commit    string `json:"commit,omitempty"`
	BuildTime string `json:"buildTime,omitempty"`
	Dirty     bool   `json:"dirty"` // built from a changed working tree
}

//go:embed templates/*.html
var templateFS embed.FS

//go:embed assets/page.css
var css []byte

var (
	templates = template.Must(template.New("").ParseFS(templateFS, "templates/*.html"))

	// cssPath changes with the content, so that it can be cached for ever.
	cssPath = func() string {
		sum := sha256.Sum256(css)
		return "/assets/page-" + hex.EncodeToString(sum[:6]) + ".css"
	}()
)

type server struct {
	Config
	now    func() time.Time
	log    *slog.Logger
	misses *limit.Table // ids that were not found, by source
}

// Ids that are not found, for each source.
const missBurst, missRate = 60, 5

// New makes the handler of all pages. Every other path is a 404.
func New(c Config) http.Handler {
	s := &server{Config: c, now: c.Now, log: c.Log, misses: limit.New(missRate, missBurst)}
	if s.now == nil {
		s.now = time.Now
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	m := chi.NewRouter()
	get := func(path string, h http.HandlerFunc) { m.Get(path, h); m.Head(path, h) }
	get("/", s.index)
	get("/health", s.health)
	get("/version", s.version)
	get("/robots.txt", robots)
	get(cssPath, stylesheet)
	get("/register/{id}", s.waiting(db.AuthRequestRegister, "register.html"))
	get("/auth/{id}", s.waiting(db.AuthRequestSSH, "ssh.html"))
	m.NotFound(func(w http.ResponseWriter, r *http.Request) { s.missing(w, r) })
	m.MethodNotAllowed(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Allow", "GET, HEAD")
		s.render(w, r, http.StatusMethodNotAllowed, "message.html", message{"405", "That cannot be done here", "This address only answers to being looked at."})
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		secure(w.Header())
		// A chi router around this one would have us see the rest of the path.
		m.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), chi.RouteCtxKey, nil)))
	})
}

// secure sets what every answer carries. There is no script, no form and no
// foreign content, so the policy allows the style sheet and nothing else.
func secure(h http.Header) {
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Cache-Control", "no-store")
}

// page is what the frame around every page needs.
type page struct {
	Style  string
	Server string // host of the server's address
	URL    string
	Body   any
}

// message is the body of a page that only says something.
type message struct{ Code, Title, Text string }

func (s *server) render(w http.ResponseWriter, r *http.Request, status int, name string, body any) {
	var buf bytes.Buffer
	if err := templates.ExecuteTemplate(&buf, name, page{cssPath, serverHost(s.ServerURL), s.ServerURL, body}); err != nil {
		s.log.Error("render page", "page", name, "err", err)
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(buf.Len()))
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		w.Write(buf.Bytes())
	}
}

func (s *server) index(w http.ResponseWriter, r *http.Request) {
	s.render(w, r, http.StatusOK, "index.html", nil)
}

// missing is the one answer to every address that leads nowhere.
func (s *server) missing(w http.ResponseWriter, r *http.Request) {
	s.render(w, r, http.StatusNotFound, "message.html", message{"404", "Nothing is here",
		"If a device printed this address, its request has expired, was decided already, or the address is incomplete. Run the command on the device again to get a new one."})
}

// health tells load balancers whether this server does its work. What fails is
// named, why is in the log.
func (s *server) health(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	answer := struct {
		Status string   `json:"status"`
		Failed []string `json:"failed,omitempty"`
	}{Status: "pass"}
	status := http.StatusOK
	for _, name := range s.failing(ctx) {
		answer.Status, status = "fail", http.StatusServiceUnavailable
		answer.Failed = append(answer.Failed, name)
	}
	writeJSON(w, status, "application/health+json; charset=utf-8", answer)
}

func (s *server) version(w http.ResponseWriter, _ *http.Request) {
	type goBuild struct {
		Version string `json:"version"`
		OS      string `json:"os"`
		Arch    string `json:"arch"`
	}
	writeJSON(w, http.StatusOK, "application/json; charset=utf-8", struct {
		Build
		Go goBuild `json:"go"`
	}{s.Build, goBuild{runtime.Version(), runtime.GOOS, runtime.GOARCH}})
}

func writeJSON(w http.ResponseWriter, status int, contentType string, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	w.Write(append(b, '\n'))
}

func robots(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "public, max-age=86400")
	w.Write([]byte("User-agent: *\nDisallow: /\n"))
}

func stylesheet(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/css; charset=utf-8")
	w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
	w.Write(css)
}
