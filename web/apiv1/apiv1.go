// Package apiv1 serves /api/v1, the REST interface that Headscale 0.30 has, so
// that its command line habits, dashboards and Terraform provider work here.
//
// It owns the JSON shapes, their validation and the mapping of errors to HTTP.
// It never decides who may call (web/auth does), never writes except through
// the ledger, and keeps no state.
//
// A request takes this way: web/auth names the actor; the handler parses path
// and body into plain values; one ledger transaction changes the rows, appends
// the audit row and reads back what the answer shows; the wrapper waits until
// this server's snapshot includes the revision, so that the caller's next
// request finds what it has just written.
package apiv1

import (
	"context"
	"log/slog"
	"net/http"
	"runtime/debug"
	"time"

	"github.com/go-chi/chi/v5"
	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/web/auth"
)

// Config of the interface. Fields without a stated zero meaning are required.
type Config struct {
	Store    *db.Store
	Tailnet  db.TailnetID
	Ledger   Ledger
	Replica  Replica
	Register Registrar
	Auth     *auth.Checker
	Calls    Caller

	// Instance is this server's row, for the list of servers. 0: unknown.
	Instance int64
	// Streams counts the map streams that are open here. Nil: as the row says.
	Streams func() int64
	// Pools are where backfilled addresses come from. A zero family is not
	// filled.
	Pools db.Pools
	// Reserved are labels that no node may be named, beyond those that db
	// knows. Nil: none.
	Reserved []string
	// PolicyMode is "file" when the policy comes from a file, which this
	// interface then does not replace. Anything else: it does.
	PolicyMode string
	// Now is the clock. Nil: time.Now.
	Now func() time.Time
	// Log gets one line for each answer from 500 on. Nil: nothing is logged.
	Log *slog.Logger
}

// Ledger is the door for writes, *tailnet.Ledger.
type Ledger interface {
	Do(context.Context, db.Actor, func(*db.Tx) error) (db.Revision, error)
}

// Replica follows the change log, *tailnet.Replica.
type Replica interface {
	Current() *tailnet.Snapshot
	WaitFor(context.Context, db.Revision) (*tailnet.Snapshot, error)
	CatchUp(context.Context) (*tailnet.Snapshot, error)
	Fault() error
}

// Registrar completes what a device has begun, *register.Registrar. Its errors
// are those of db and register; each method writes its own audit row.
type Registrar interface {
	// Approve makes the waiting device a node of user.
	Approve(ctx context.Context, actor db.Actor, authID string, user tailcfg.UserID) (*db.Node, error)
	// Confirm and Reject decide a request that has its user already, such as
	// an SSH check.
	Confirm(ctx context.Context, actor db.Actor, authID string) error
	Reject(ctx context.Context, actor db.Actor, authID string) error
}

// A decision is Confirm or Reject.
type decision func(ctx context.Context, actor db.Actor, authID string) error

type server struct {
	Config
	now      func() time.Time
	log      *slog.Logger
	compiles chan struct{} // a slot for each policy that is being compiled
}

// requestTime bounds a request: a write never hangs longer when the database
// does.
const requestTime = 10 * time.Second

// New makes the handler of every path that begins with /api/v1, and of /api/signalbox/v1, where stands what Headscale lacks. It looks at
// whole paths, so it may be mounted under any router.
func New(c Config) http.Handler {
	s := newServer(c)
	mux := s.routes()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), requestTime)
		defer cancel()
		// A chi router around this one would have us see the rest of the path.
		ctx = context.WithValue(ctx, chi.RouteCtxKey, nil)
		mux.ServeHTTP(w, r.WithContext(ctx))
	})
}

func newServer(c Config) *server {
	s := &server{Config: c, now: c.Now, log: c.Log, compiles: make(chan struct{}, 2)}
	if s.now == nil {
		s.now = time.Now
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s
}

// routes is the whole interface. The check of credentials stands in front of
// the root, so no route can be without it, nor an unknown path tell that it is
// unknown.
func (s *server) routes() *chi.Mux {
	m := chi.NewRouter()
	m.Use(s.recover, s.Auth.Middleware(s.refuse), s.current)
	m.NotFound(s.handle(func(*http.Request) (any, error) { return nil, notFound("no such path") }))
	m.MethodNotAllowed(func(w http.ResponseWriter, r *http.Request) {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete} {
			if m.Match(chi.NewRouteContext(), method, routePath(r)) {
				w.Header().Add("Allow", method)
			}
		}
		s.refuse(w, r, &statusError{status: http.StatusMethodNotAllowed, detail: "this path does not know the method " + knownMethod(r.Method)})
	})
	m.Route("/api/signalbox/v1", s.ownRoutes)
	m.Route("/api/v1", func(m chi.Router) {
		m.Get("/health", s.handle(s.health))

		m.Post("/user", s.handleBody(s.createUser))
		m.Get("/user", s.handle(s.listUsers))
		m.Post("/user/{id}/rename/{name}", s.handle(s.renameUser))
		m.Delete("/user/{id}", s.handle(s.deleteUser))

		m.Post("/preauthkey", s.handleBody(s.createPreAuthKey))
		m.Get("/preauthkey", s.handle(s.listPreAuthKeys))
		m.Post("/preauthkey/expire", s.handleBody(s.expirePreAuthKey))
		m.Delete("/preauthkey", s.handle(s.deletePreAuthKey))

		m.Post("/apikey", s.handleBody(s.createAPIKey))
		m.Get("/apikey", s.handle(s.listAPIKeys))
		m.Post("/apikey/expire", s.handleBody(s.expireAPIKey))
		m.Delete("/apikey", s.handle(s.deleteAPIKey))
		m.Delete("/apikey/{prefix}", s.handle(s.deleteAPIKey))

		m.Get("/node", s.handle(s.listNodes))
		m.Get("/node/{id}", s.handle(s.getNode))
		m.Delete("/node/{id}", s.handle(s.deleteNode))
		m.Post("/node/{id}/expire", s.handleBody(s.expireNode))
		m.Post("/node/{id}/rename/{name}", s.handle(s.renameNode))
		m.Post("/node/{id}/tags", s.handleBody(s.setTags))
		m.Post("/node/{id}/approve_routes", s.handleBody(s.approveRoutes))
		m.Post("/node/backfillips", s.handle(s.backfillIPs))
		m.Post("/node/register", s.handle(s.registerNode))
		m.Post("/debug/node", s.handleBody(s.debugNode))

		m.Get("/policy", s.handle(s.getPolicy))
		m.Put("/policy", s.handleBody(s.setPolicy))
		m.Post("/policy/check", s.handleBody(s.checkPolicy))

		m.Post("/auth/register", s.handleBody(s.authRegister))
		m.Post("/auth/approve", s.handleBody(s.authApprove))
		m.Post("/auth/reject", s.handleBody(s.authReject))
	})
	return m
}

// current has requests see what was answered by another server before, such as
// the last request of a script behind a balancer. While the database is away
// they see what is known here.
func (s *server) current(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.Replica.Fault() == nil {
			_, _ = s.Replica.CatchUp(r.Context())
		}
		next.ServeHTTP(w, r)
	})
}

// handle serves a handler that reads no body.
func (s *server) handle(h func(*http.Request) (any, error)) http.HandlerFunc {
	return s.handleBody(func(_ http.ResponseWriter, r *http.Request) (any, error) { return h(r) })
}

// handleBody serves a handler that reads the body. The handler never writes to
// w; decode needs it to end a connection whose body is too long.
func (s *server) handleBody(h func(http.ResponseWriter, *http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		v, err := h(w, r)
		if err != nil {
			s.refuse(w, r, err)
			return
		}
		if t, ok := v.(tagged); ok {
			w.Header().Set("ETag", t.tag)
			v = t.body
		}
		writeJSON(w, http.StatusOK, "application/json", v)
	}
}

// tagged is an answer with an ETag, for If-Match of the next request.
type tagged struct {
	body any
	tag  string
}

// recover turns a panic into an answer that says nothing of it.
func (s *server) recover(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if p := recover(); p != nil {
				if p == http.ErrAbortHandler {
					panic(p)
				}
				s.log.Error("api v1 panic", "method", r.Method, "route", pattern(r), "panic", p, "stack", string(debug.Stack()))
				writeJSON(w, http.StatusInternalServerError, "application/problem+json", newProblem(http.StatusInternalServerError, "internal error", nil))
			}
		}()
		next.ServeHTTP(w, r)
	})
}

// write runs fn in a transaction of the calling actor and waits until reads
// from this server show it.
func (s *server) write(r *http.Request, fn func(*db.Tx) error) error {
	rev, err := s.Ledger.Do(r.Context(), actor(r), fn)
	if err != nil {
		return err
	}
	// The change is durable. A replica that lags must not turn it into an
	// error, so the answer is given in any case.
	if _, err := s.Replica.WaitFor(r.Context(), rev); err != nil {
		s.log.Warn("api v1 answers ahead of the snapshot", "rev", rev, "err", err)
	}
	return nil
}

// view reads from the tailnet's rows what a snapshot does not hold.
func (s *server) view(r *http.Request, fn func(*db.Reader) error) error {
	return s.Store.View(r.Context(), func(rd *db.Reader) error { return fn(rd.In(s.Tailnet)) })
}

// catchUp waits until the snapshot includes everything that is committed by
// now, after a write that this package did not make itself.
func (s *server) catchUp(r *http.Request) {
	var rev db.Revision
	err := s.view(r, func(rd *db.Reader) (err error) {
		rev, err = rd.Revision()
		return err
	})
	if err == nil {
		_, err = s.Replica.WaitFor(r.Context(), rev)
	}
	if err != nil {
		s.log.Warn("api v1 answers ahead of the snapshot", "rev", rev, "err", err)
	}
}

// actor is who auth found behind the request.
func actor(r *http.Request) db.Actor {
	a, _ := auth.Actor(r.Context())
	return a
}

// pattern is the route that a request took, for logs.
func pattern(r *http.Request) string {
	if c := chi.RouteContext(r.Context()); c != nil {
		return c.RoutePattern()
	}
	return ""
}

// routePath is the path that chi matches.
func routePath(r *http.Request) string {
	if r.URL.RawPath != "" {
		return r.URL.RawPath
	}
	return r.URL.Path
}

// knownMethod keeps a made-up method out of the answer.
func knownMethod(m string) string {
	switch m {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions, http.MethodTrace, http.MethodConnect:
		return m
	}
	return "of the request"
}

// health is for callers with a key; the public page is /health.
func (s *server) health(r *http.Request) (any, error) {
	if err := s.Store.Healthy(r.Context()); err != nil {
		return nil, err
	}
	return HealthResponse{DatabaseConnectivity: true}, nil
}
