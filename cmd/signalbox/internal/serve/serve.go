// Package serve runs the server: it wires the packages of Signalbox together as the configuration says.
//
// A start goes: open the database (first.go makes the tailnet in an empty one), take the secrets from it (secrets.go), bind the main listener
// and the relay so that their real ports are known, store what the configuration says of the tailnet (settings.go), load the picture of the
// tailnet, bind the other listeners (listen.go), and run everything until the context ends. Nothing is answered before the last of these worked, and nothing here
// opens a connection to another host unless the configuration names it.
package serve

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/cmd/signalbox/internal/config"
	"github.com/signalbox-net/signalbox/control"
	"github.com/signalbox-net/signalbox/control/netmap"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/derp"
	"github.com/signalbox-net/signalbox/web/auth"
	"github.com/signalbox-net/signalbox/web/listener"
)

// A server is one run.
type server struct {
	cfg     *config.Config
	log     *slog.Logger
	started time.Time

	plainPort string           // of the listener beside https; empty is 80
	plainAt   int              // the port that it has; 0 without
	hangup    <-chan os.Signal // SIGHUP; nil never comes

	store   *db.Store
	tailnet db.TailnetID
	secrets secrets
	self    db.Instance

	replica *tailnet.Replica
	ledger  *tailnet.Ledger
	control *control.Server
	relay   *derp.Server // nil without one
	regions *derp.Loader
	checker *auth.Checker
	guard   *listener.Guard
	certs   *listener.CertFiles             // nil without certificate files
	tls     *tls.Config                     // of the main listener; nil for plain HTTP
	http01  func(http.Handler) http.Handler // answers ACME's challenges of that kind; nil without
	main    http.Handler                    // of the main listener, set before anything runs
	doors   []*listener.Server
	files   []*follower
	times   *times // nil: nothing is timed

	lookupIP func(ctx context.Context, host string) ([]netip.Addr, error) // of relays that ask; nil means the system's resolver
}

// exitDamaged is the exit code of a start that found the database damaged.
const exitDamaged = 3

type damaged struct{ error }

func (d damaged) ExitCode() int { return exitDamaged }
func (d damaged) Unwrap() error { return d.error }

// Run serves until ctx ends. The line for joining a device goes to stdout, the log to stderr.
func Run(ctx context.Context, cfg *config.Config, stdout, stderr io.Writer) error {
	s := newServer(cfg, stderr)
	netmap.Frames.SetLimit(int64(cfg.FrameCacheMiB) << 20)
	// From the first moment on: a hangup while the database opens must not kill the server. One that comes before it runs is done then.
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	s.hangup = hangup
	for _, w := range cfg.Warnings {
		s.log.Warn(w)
	}
	if err := s.open(ctx); err != nil {
		return err
	}
	defer s.close()
	if err := s.build(ctx); err != nil {
		return err
	}
	line, err := s.joinLine(ctx)
	if err != nil {
		return err
	}
	fmt.Fprint(stdout, line)
	s.log.Info("serving", "url", s.cfg.ServerURL, "listen", s.doors[0].Addr().String(), "version", Version())
	return s.run(ctx)
}

func newServer(cfg *config.Config, stderr io.Writer) *server {
	return &server{cfg: cfg, log: newLog(cfg.Log, stderr), started: time.Now(), times: newTimes(), guard: listener.NewGuard(listener.GuardConfig{})}
}

func newLog(c config.Log, w io.Writer) *slog.Logger {
	opts := &slog.HandlerOptions{Level: c.Slog()}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// open opens the database and what has to come out of it before anything else can be built.
func (s *server) open(ctx context.Context) error {
	if err := os.MkdirAll(s.cfg.DataDir, 0o750); err != nil {
		return fmt.Errorf("data_dir: %w", err)
	}
	c, err := s.database()
	if err != nil {
		return err
	}
	s.store, err = db.Open(ctx, c)
	if errors.Is(err, db.ErrCorrupt) {
		return damaged{fmt.Errorf("%w; restore the newest backup of %s, nothing was changed", err, c.Path)}
	}
	if err != nil {
		return fmt.Errorf("open database: %w", err)
	}
	if err := s.first(ctx); err != nil {
		s.store.Close()
		return err
	}
	return nil
}

func (s *server) close() {
	if s.relay != nil {
		s.relay.Close()
	}
	if err := s.store.Close(); err != nil {
		s.log.Error("close database", "err", err)
	}
}

// build makes all parts and binds all sockets.
func (s *server) build(ctx context.Context) error {
	if err := s.bindMain(); err != nil {
		return err
	}
	if err := s.buildRelay(); err != nil {
		return err
	}
	if err := s.storeSettings(ctx); err != nil {
		return err
	}
	var err error
	s.replica, err = tailnet.NewReplica(ctx, tailnet.ReplicaConfig{Store: s.store, Tailnet: s.tailnet, Log: s.log, Gap: s.gap, FanOut: s.times.fannedOut})
	if err != nil {
		return err
	}
	s.ledger = tailnet.NewLedger(tailnet.LedgerConfig{Store: s.store, Tailnet: s.tailnet, Replica: s.replica, Instance: s.self.ID, Reserved: s.reserved(), Log: s.log})
	cfg := control.Config{
		Store: s.store, Replica: s.replica, Ledger: s.ledger, NoiseKey: s.secrets.noise, IDKey: s.secrets.id, Instance: s.self,
		ServerURL: s.cfg.ServerURL, Pools: s.pools(), NodeExpiry: s.cfg.Node.Expiry, EphemeralTimeout: s.cfg.Node.Ephemeral.InactivityTimeout,
		Reserved: s.reserved(), Source: listener.ClientAddr, Identify: listener.Identifier, Log: s.log,
		ProbeInterval: s.cfg.Node.Routes.HA.ProbeInterval, ProbeTimeout: s.cfg.Node.Routes.HA.ProbeTimeout,
	}
	if cfg.ProbeInterval == 0 {
		cfg.ProbeInterval = -1 // none
	}
	if s.relay != nil {
		cfg.Revoke = s.relay.Revoke
	}
	if s.control, err = control.New(cfg); err != nil {
		return err
	}
	s.checker = auth.New(auth.Config{Store: s.store, Ledger: s.ledger, Log: s.log})
	s.files = s.followers()
	return s.buildDoors()
}

// gap spaces announcements so that, while changes never pause, writing them takes a small part of the time and the rest is left for the work that
// brings them: a change costs a session 10 to 30 us. A change that comes alone is announced at once.
func (s *server) gap() (least, most time.Duration) {
	sessions := time.Duration(s.control.Poll.Sessions.Load())
	return min(sessions*100*time.Microsecond, 250*time.Millisecond), min(sessions*500*time.Microsecond, 500*time.Millisecond)
}

// buildRelay makes the relay and binds its sockets.
func (s *server) buildRelay() error {
	c := &s.cfg.DERP
	var embedded *tailcfg.DERPRegion
	if c.Server.Enabled {
		cfg, err := s.relayConfig()
		if err != nil {
			return err
		}
		if s.relay, err = derp.New(cfg); err != nil {
			return err
		}
		if err := s.relay.Listen(); err != nil {
			return err
		}
		if c.Server.AutomaticallyAddEmbeddedDERPRegion {
			embedded = s.relay.Region()
		}
	}
	var err error
	s.regions, err = derp.NewLoader(derp.LoaderConfig{
		Embedded: embedded, URLs: c.URLs, Paths: c.Paths, AutoUpdate: c.AutoUpdateEnabled, Interval: c.UpdateFrequency,
		OnChange: s.putDERPMap, Log: s.log,
		// A map's URL must not reach into the tailnet, where this machine may be a device.
		Refuse: func(a netip.Addr) bool { return s.cfg.Prefixes.V4.Contains(a) || s.cfg.Prefixes.V6.Contains(a) },
	})
	return err
}

// admit reports whether a node key may use the relay. Before the tailnet is loaded nobody may.
func (s *server) admit(k key.NodePublic) bool { return s.control != nil && s.control.Admit(k) }

// stopWithin is what open requests and streams get for their end.
const stopWithin = 5 * time.Second

// run does the work until ctx ends or a part fails.
func (s *server) run(ctx context.Context) error { return s.control.Run(ctx, s.doorsAndDuties) }

// doorsAndDuties runs what takes requests and what writes by itself. It ends with ctx, when what was begun is finished or has used up its time.
func (s *server) doorsAndDuties(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.checker.Run(ctx) })
	g.Go(func() error { return s.regions.Run(ctx) })
	if s.relay != nil {
		g.Go(func() error { return s.relay.Run(ctx) })
	}
	for _, d := range s.doors {
		g.Go(func() error { return d.Run(ctx) })
	}
	for _, f := range s.files {
		g.Go(func() error { return f.run(ctx) })
	}
	g.Go(func() error { return s.mesh(ctx) })
	g.Go(func() error { return s.keepMap(ctx) })
	g.Go(func() error { return s.settle(ctx) })
	g.Go(func() error { return s.signals(ctx) })
	g.Go(func() error {
		<-ctx.Done()
		s.log.Info("stopping")
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopWithin)
		defer cancel()
		return ignoreDeadline(s.control.Noise.Shutdown(end))
	})
	return g.Wait()
}

func ignoreDeadline(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	return err
}

// signals reloads on SIGHUP what can be reloaded: certificates, the policy file, extra records, relay maps.
func (s *server) signals(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.hangup:
		}
		s.log.Info("reloading")
		if s.certs != nil {
			if err := s.certs.Reload(); err != nil {
				s.log.Error("keeping the old certificate", "err", err)
			}
		}
		for _, f := range s.files {
			f.kick()
		}
		s.regions.Reload()
	}
}

// checks are what /health looks at besides the database.
func (s *server) checks() map[string]func(context.Context) error {
	m := map[string]func(context.Context) error{
		"replica": func(context.Context) error { return s.replica.Fault() },
		"name":    func(context.Context) error { return s.control.Rival() },
		"policy":  func(context.Context) error { return s.replica.Current().Policy().Err },
	}
	for _, f := range s.files {
		m[f.name] = func(context.Context) error { return f.fault() }
	}
	return m
}
