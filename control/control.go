// Package control is the control server: it joins the parts of the protocol into one handler and does what has to be done without being
// asked, such as ending keys on their day.
//
// Inside Noise it denies by default: a machine key proves nothing but itself, so a key without a node reaches registration, its own
// farewell and whoami, and everything else is for the nodes of that machine.
//
// It owns no state of its own. What it decides on a timer becomes a revision, like everything else.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/go-chi/chi/v5"
	"golang.org/x/sync/errgroup"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control/c2n"
	"github.com/signalbox-net/signalbox/control/limit"
	"github.com/signalbox-net/signalbox/control/noise"
	"github.com/signalbox-net/signalbox/control/poll"
	"github.com/signalbox-net/signalbox/control/register"
	"github.com/signalbox-net/signalbox/control/sshaction"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// Config configures a Server. Fields without a remark are required.
type Config struct {
	Store    *db.Store
	Replica  *tailnet.Replica
	Ledger   *tailnet.Ledger
	NoiseKey key.MachinePrivate
	IDKey    []byte      // see register.Config
	Instance db.Instance // this server's row

	ServerURL        string
	Pools            db.Pools
	NodeExpiry       time.Duration // 0: never
	EphemeralTimeout time.Duration // 0: ephemeral nodes are removed only when they log out
	MaxNodes         int           // see register.Config
	Reserved         []string      // labels that no device may have

	// Revoke closes the relay connections of a node key. Nil when there is no relay.
	Revoke func(key.NodePublic)

	Source   func(*http.Request) netip.AddrPort // see noise.Config
	Identify func(*http.Request) func()         // see noise.Config

	Log *slog.Logger     // nil discards
	Now func() time.Time // nil means time.Now

	// ReturnGrace is how long after a start, or after another server's last sign of life, nodes that had their stream there stay online;
	// 0 means 90 s.
	ReturnGrace time.Duration

	// ProbeInterval is the time between two probes of a router that shares a route with another one; 0 means 10 s, less than 0 that there are
	// none. ProbeTimeout is how long an answer may take; 0 means 5 s. Two misses in a row make a router unhealthy.
	ProbeInterval, ProbeTimeout time.Duration

	KeepAlive, Grace, Stall time.Duration // see poll.Config
	CallTimeout             time.Duration // see c2n.Config
}

// A Server is the control server.
type Server struct {
	cfg      Config
	log      *slog.Logger
	Noise    *noise.Server
	Poll     *poll.Server
	Register *register.Registrar
	C2N      *c2n.Server
	ssh      *sshaction.Server
	reports  *limit.Table // audit records of clients
	started  time.Time
	rival    atomic.Bool
	probes   probes
	signs    signs

	// The following fields are owned by duties.
	alarms                  map[string]bool // what was warned of and still holds
	sick                    bool            // the last look at the database found a fault
	nextExpiry, nextRemoval date
}

// New joins the parts. It starts nothing.
func New(cfg Config) (*Server, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.ReturnGrace == 0 {
		cfg.ReturnGrace = 90 * time.Second
	}
	if cfg.ProbeInterval == 0 {
		cfg.ProbeInterval = 10 * time.Second
	}
	if cfg.ProbeTimeout == 0 {
		cfg.ProbeTimeout = 5 * time.Second
	}
	s := &Server{cfg: cfg, log: cfg.Log, reports: limit.New(1, 60), started: cfg.Now()}
	s.Poll = poll.New(poll.Config{Store: cfg.Store, Replica: cfg.Replica, Ledger: cfg.Ledger, Log: cfg.Log, Now: cfg.Now, KeepAlive: cfg.KeepAlive, Grace: cfg.Grace, Stall: cfg.Stall})
	s.Register = register.New(register.Config{
		Store: cfg.Store, Replica: cfg.Replica, Ledger: cfg.Ledger, ServerURL: cfg.ServerURL, IDKey: cfg.IDKey, Pools: cfg.Pools,
		NodeExpiry: cfg.NodeExpiry, MaxNodes: cfg.MaxNodes, Reserved: cfg.Reserved, FarewellDue: s.Poll.FarewellDue, Log: cfg.Log, Now: cfg.Now,
	})
	s.ssh = sshaction.New(sshaction.Config{
		Store: cfg.Store, Replica: cfg.Replica, Ledger: cfg.Ledger, Registrar: s.Register, ServerURL: cfg.ServerURL, Log: cfg.Log, Now: cfg.Now,
	})
	s.C2N = c2n.New(c2n.Config{
		Store: cfg.Store, Replica: cfg.Replica, Ledger: cfg.Ledger, Instance: cfg.Instance.ID, Streams: s.Poll, Timeout: cfg.CallTimeout, Log: cfg.Log,
	})
	var err error
	s.Noise, err = noise.New(noise.Config{
		PrivateKey: cfg.NoiseKey, Handler: s.inside(), Known: func(m key.MachinePublic) bool { return cfg.Replica.Current().HasMachine(m) },
		Source: cfg.Source, Identify: cfg.Identify, Log: cfg.Log, Now: cfg.Now,
	})
	if err != nil {
		return nil, err
	}
	cfg.Replica.OnPublish(s.revoke)
	return s, nil
}

// Routes mounts what clients reach without Noise.
func (s *Server) Routes(r chi.Router) {
	r.Get("/key", s.Noise.ServeKey)
	r.Post("/ts2021", s.Noise.ServeHTTP)
	r.Get("/ts2021", s.Noise.ServeHTTP)
}

// inside is the router of requests that came through Noise.
func (s *Server) inside() http.Handler {
	r := chi.NewRouter()
	r.Post("/machine/register", s.Register.ServeHTTP)
	r.Post("/machine/map", s.Poll.ServeHTTP)
	r.Get("/machine/whoami", s.whoami)
	r.Group(func(r chi.Router) {
		r.Use(s.members)
		r.Post("/machine/update-health", s.health)
		r.Post("/machine/audit-log", s.auditLog)
		r.Post("/machine/feature/query", s.feature)
		s.ssh.Routes(r)
		s.C2N.Routes(r)
	})
	return r
}

// members lets only machines with a node pass.
func (s *Server) members(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, ok := noise.Peer(r.Context())
		if !ok || !s.cfg.Replica.Current().HasMachine(c.Machine) {
			http.Error(w, "node not found", http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// caller finds the node that a request inside Noise speaks for: its key must belong to the machine that asks.
func (s *Server) caller(r *http.Request, k key.NodePublic) *tailnet.Node {
	c, ok := noise.Peer(r.Context())
	n := s.cfg.Replica.Current().ByNodeKey(k)
	if !ok || n == nil || n.MachineKey != c.Machine {
		return nil
	}
	return n
}

func (s *Server) whoami(w http.ResponseWriter, r *http.Request) {
	c, ok := noise.Peer(r.Context())
	if !ok {
		http.Error(w, "not a Noise connection", http.StatusBadRequest)
		return
	}
	fmt.Fprintf(w, "machine %s\n", c.Machine.String())
	for _, n := range s.cfg.Replica.Current().ByMachineKey(c.Machine) {
		fmt.Fprintf(w, "node %d %s\n", n.ID, n.FQDN)
	}
}

// health takes the warnings of clients before 1.90. They repeat them a dozen times in seconds, so nothing is logged.
func (s *Server) health(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, 16<<10))
	w.WriteHeader(http.StatusNoContent)
}

// auditLog keeps what Windows and macOS clients report of their users' acts. A client drops its record for good on any refusal but a few,
// so what cannot be stored now is answered with one of those.
func (s *Server) auditLog(w http.ResponseWriter, r *http.Request) {
	var req tailcfg.AuditLogRequest
	if !decode(w, r, &req) {
		return
	}
	n := s.caller(r, req.NodeKey)
	if n == nil {
		http.Error(w, "node not found", http.StatusUnauthorized)
		return
	}
	if !s.reports.Allow(limit.Key(n.ID), s.cfg.Now()) {
		w.Header().Set("Retry-After", "10")
		http.Error(w, "too many audit records", http.StatusTooManyRequests)
		return
	}
	c, _ := noise.Peer(r.Context())
	actor := db.Actor{Kind: "node", ID: int64(n.ID), Name: n.GivenName, Source: c.Remote.Addr().String()}
	_, err := s.cfg.Ledger.Do(r.Context(), actor, func(tx *db.Tx) error {
		detail := map[string]string{"action": cut(string(req.Action)), "details": cut(req.Details)}
		return tx.Audit("client.report", fmt.Sprintf("node:%d", n.ID), nil, detail)
	})
	if err != nil {
		w.Header().Set("Retry-After", "5")
		http.Error(w, "the record could not be stored", http.StatusServiceUnavailable)
		return
	}
	w.WriteHeader(http.StatusOK)
}

// decode reads a small JSON body to its end. It answers and returns false when it cannot.
func decode(w http.ResponseWriter, r *http.Request, v any) bool {
	body := http.MaxBytesReader(w, r.Body, 16<<10)
	err := json.NewDecoder(body).Decode(v)
	if err == nil {
		_, err = io.Copy(io.Discard, body)
	}
	tooBig := (*http.MaxBytesError)(nil)
	switch {
	case err == nil:
		return true
	case errors.As(err, &tooBig):
		http.Error(w, "the request is larger than 16 KiB", http.StatusRequestEntityTooLarge)
	default:
		http.Error(w, "the request is not valid JSON", http.StatusBadRequest)
	}
	return false
}

// cut bounds a client's text for the audit log.
func cut(s string) string {
	const most = 4096
	if len(s) > most {
		return s[:most]
	}
	return s
}

// feature answers `tailscale serve` and `tailscale funnel`, which ask how to switch on what their node lacks.
func (s *Server) feature(w http.ResponseWriter, r *http.Request) {
	var req tailcfg.QueryFeatureRequest
	if !decode(w, r, &req) {
		return
	}
	if s.caller(r, req.NodeKey) == nil {
		http.Error(w, "node not found", http.StatusUnauthorized)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(&tailcfg.QueryFeatureResponse{Text: "HTTPS certificates and Funnel are not available on this server."})
}

// revoke takes the relay from nodes whose key no longer counts.
func (s *Server) revoke(prev, now *tailnet.Snapshot) {
	if s.cfg.Revoke == nil {
		return
	}
	for _, n := range prev.Nodes() {
		if n == nil || n.Dead() {
			continue
		}
		cur := now.Node(n.ID)
		if cur != nil && cur.Node == n.Node {
			continue
		}
		if cur == nil || cur.Dead() || cur.NodeKey != n.NodeKey {
			s.cfg.Revoke(n.NodeKey)
		}
	}
}

// Admit reports whether a node key may use a relay: that of a living node. It reads the current snapshot and never blocks.
func (s *Server) Admit(k key.NodePublic) bool {
	n := s.cfg.Replica.Current().ByNodeKey(k)
	return n != nil && !n.Dead()
}

// Run works until ctx ends: it writes reports, follows the log, watches streams and does the duties. Beside them it runs doors: whatever else
// takes work that may write. When ctx ends, or one of them fails, the stop goes in phases: streams, duties and doors end, and what they have
// begun is finished; then the last reports are written; then the log is left. So a request whose change was committed still sees it.
func (s *Server) Run(ctx context.Context, doors ...func(context.Context) error) error {
	follow, leave := context.WithCancel(context.WithoutCancel(ctx))
	defer leave()
	write, seal := context.WithCancel(context.WithoutCancel(ctx))
	defer seal()
	var replica, ledger errgroup.Group
	replica.Go(func() error { return s.cfg.Replica.Run(follow) })
	ledger.Go(func() error { return s.cfg.Ledger.Run(write) })
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.Poll.Run(ctx) })
	g.Go(func() error { return s.C2N.Run(ctx) })
	g.Go(func() error { return s.watchRouters(ctx) })
	g.Go(func() error { return s.duties(ctx) })
	for _, run := range doors {
		g.Go(func() error { return run(ctx) })
	}
	err := g.Wait()
	seal()
	err = errors.Join(err, ledger.Wait())
	leave()
	return errors.Join(err, replica.Wait())
}
