// Package controltest runs a whole control server in process and plays clients against it, for tests.
//
// The server is the real one: SQLite in a temporary directory, Replica, Ledger, Noise over loopback TCP. A Client speaks as tailscaled does,
// and its View applies map responses as tailscaled does, so what a test reads from a View is what a device would believe. Time is real time
// plus what the test adds to the Clock. Nothing sleeps: tests wait for a View, a message or a revision.
//
//	s := controltest.Start(t, controltest.Options{})
//	alice := s.User("alice")
//	c := s.NewClient("laptop")
//	c.Join(s.AuthKey(db.AuthKey{User: alice}))
//	m := c.Poll()
//	m.Wait("a peer", func(v *controltest.View) bool { return len(v.Peers) == 1 })
package controltest

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// Patience is how long a test waits for what should happen at once.
const Patience = 20 * time.Second

// AllowAll lets every device reach every other one.
const AllowAll = `{"tagOwners": {"tag:x": ["alice@"], "tag:y": ["alice@"]}, "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`

// A Clock is real time plus what a test adds. Its zero value works.
type Clock struct{ ahead atomic.Int64 }

// Now is the time of the clock.
func (c *Clock) Now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

// Advance moves the clock on. A step over five minutes makes the server distrust it for key expiry.
func (c *Clock) Advance(d time.Duration) { c.ahead.Add(int64(d)) }

// Options change a Server. The zero value is a server with the policy AllowAll.
type Options struct {
	Policy string                // stored in a new database; "" is AllowAll
	DB     func(*db.Config)      // may be nil
	Change func(*control.Config) // may be nil
	FanOut func(time.Duration)   // see tailnet.ReplicaConfig; may be nil
}

// A Server is a running control server.
type Server struct {
	testing.TB
	*control.Server
	Clock   *Clock
	Store   *db.Store
	Replica *tailnet.Replica
	Ledger  *tailnet.Ledger
	Tailnet db.TailnetID
	Addr    string // of the listener

	opts  Options
	path  string
	noise key.MachinePrivate
	stop  func()
}

// Pools is what nodes get their addresses from.
var Pools = db.Pools{IPv4: netip.MustParsePrefix("100.64.0.0/10"), IPv6: netip.MustParsePrefix("fd7a:115c:a1e0::/48")}

// Start runs a server on a new database until the test ends.
func Start(t testing.TB, opts Options) *Server {
	t.Helper()
	s := &Server{TB: t, Clock: new(Clock), opts: opts, path: filepath.Join(t.TempDir(), "signalbox.db"), noise: key.NewMachine()}
	s.start()
	t.Cleanup(s.Stop)
	return s
}

// Restart ends the server and starts another one on its database, key and clock, at another address.
func (s *Server) Restart() *Server {
	s.Helper()
	s.Stop()
	n := &Server{TB: s.TB, Clock: s.Clock, opts: s.opts, path: s.path, noise: s.noise}
	n.start()
	s.Cleanup(n.Stop)
	return n
}

// Stop ends the server as SIGTERM does. It may be called twice.
func (s *Server) Stop() {
	if s.stop != nil {
		s.stop()
		s.stop = nil
	}
}

// Beside starts another server on the same database, with a clock of its own. It has to end before this one does, which it does by itself at
// the end of the test.
func (s *Server) Beside(name string, clock *Clock) *Server {
	s.Helper()
	return s.beside(name, clock, (*Server).run)
}

// BesideUnwritten is Beside for a server that follows the database, does no duty by itself, and writes no report until its Ledger runs.
func (s *Server) BesideUnwritten(name string, clock *Clock) *Server {
	s.Helper()
	return s.beside(name, clock, func(n *Server, ctx context.Context) error { return n.Replica.Run(ctx) })
}

func (s *Server) run(ctx context.Context) error { return s.Server.Run(ctx) }

func (s *Server) beside(name string, clock *Clock, run func(*Server, context.Context) error) *Server {
	s.Helper()
	n := &Server{TB: s.TB, Clock: clock, Store: s.Store, Tailnet: s.Tailnet, opts: s.opts, noise: s.noise}
	self := db.Instance{Name: name, Started: clock.Now()}
	_, err := s.Store.Update(s.Context(), s.Tailnet, db.Actor{Kind: "system"}, func(tx *db.Tx) error { return tx.Heartbeat(&self) })
	s.check(err)
	ctx, cancel := context.WithCancel(context.Background())
	n.serve(ctx, cancel, self, func() error { return nil }, run)
	s.Cleanup(n.Stop)
	return n
}

func (s *Server) start() {
	s.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	self := s.open(ctx)
	s.serve(ctx, cancel, self, s.Store.Close, (*Server).run)
}

func (s *Server) serve(ctx context.Context, cancel context.CancelFunc, self db.Instance, closeStore func() error, run func(*Server, context.Context) error) {
	s.Helper()
	var err error
	s.Replica, err = tailnet.NewReplica(ctx, tailnet.ReplicaConfig{Store: s.Store, Tailnet: s.Tailnet, FanOut: s.opts.FanOut})
	s.check(err)
	reserved := []string{"reserved-label"}
	s.Ledger = tailnet.NewLedger(tailnet.LedgerConfig{Store: s.Store, Tailnet: s.Tailnet, Replica: s.Replica, Instance: self.ID, Reserved: reserved})
	cfg := control.Config{
		Store: s.Store, Replica: s.Replica, Ledger: s.Ledger, NoiseKey: s.noise, IDKey: []byte("controltest"), Instance: self,
		ServerURL: "http://127.0.0.1", Pools: Pools, Reserved: reserved, Source: source, Now: s.Clock.Now,
	}
	if s.opts.Change != nil {
		s.opts.Change(&cfg)
	}
	s.Server, err = control.New(cfg)
	s.check(err)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	s.check(err)
	s.Addr = ln.Addr().String()
	r := chi.NewRouter()
	s.Routes(r)
	web := &http.Server{Handler: r}
	ran := make(chan error, 1)
	go func() { ran <- run(s, ctx) }()
	go func() { _ = web.Serve(ln) }()
	s.stop = func() {
		cancel()
		if err := <-ran; err != nil {
			s.Errorf("server: %v", err)
		}
		_ = web.Close()
		_ = s.Noise.Shutdown(ctx) // ctx is over, so this cuts connections off
		if err := closeStore(); err != nil {
			s.Errorf("close database: %v", err)
		}
	}
}

func (s *Server) open(ctx context.Context) db.Instance {
	s.Helper()
	cfg := db.Config{Path: s.path, Now: s.Clock.Now}
	if s.opts.DB != nil {
		s.opts.DB(&cfg)
	}
	var err error
	s.Store, err = db.Open(ctx, cfg)
	s.check(err)
	s.Tailnet, _, err = s.Store.Bootstrap(ctx, "default", func(tx *db.Tx) error {
		dns := []byte(`{"magicDNS": true, "baseDomain": "mesh.test"}`)
		if _, err := tx.PutSetting(tailnet.SettingDNS, dns); err != nil {
			return err
		}
		derp := []byte(`{"Regions": {"901": {"RegionID": 901, "RegionCode": "t", "Nodes": [{"Name": "901a", "RegionID": 901, "HostName": "127.0.0.1"}]}}}`)
		if _, err := tx.PutSetting(tailnet.SettingDERPMap, derp); err != nil {
			return err
		}
		for _, name := range []string{"alice", "bob", "carol"} {
			if err := tx.CreateUser(&db.User{Name: name, DisplayName: "Dr. " + name, Role: "member"}); err != nil {
				return err
			}
		}
		policy := s.opts.Policy
		if policy == "" {
			policy = AllowAll
		}
		_, err := tx.SetPolicy([]byte(policy), "", nil)
		return err
	})
	s.check(err)
	self := db.Instance{Name: "test", Started: s.Clock.Now(), Heartbeat: s.Clock.Now()}
	_, err = s.Store.Update(ctx, s.Tailnet, db.Actor{Kind: "system"}, func(tx *db.Tx) error { return tx.Heartbeat(&self) })
	s.check(err)
	return self
}

// sourceHeader carries the address that a Client pretends to come from.
const sourceHeader = "X-Test-Source"

func source(r *http.Request) netip.AddrPort {
	if a, err := netip.ParseAddr(r.Header.Get(sourceHeader)); err == nil {
		return netip.AddrPortFrom(a, 1)
	}
	a, _ := netip.ParseAddrPort(r.RemoteAddr)
	return a
}

func (s *Server) check(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// Context ends with the test's patience.
func (s *Server) Context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	s.Cleanup(cancel)
	return ctx
}

// Update writes as an administrator and returns the snapshot that has it.
func (s *Server) Update(fn func(*db.Tx) error) *tailnet.Snapshot {
	s.Helper()
	snap, err := s.Ledger.DoWait(s.Context(), db.Actor{Kind: "cli"}, fn)
	s.check(err)
	return snap
}

// CatchUp waits until the server's snapshot has everything that is committed.
func (s *Server) CatchUp() {
	s.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	var rev db.Revision
	s.check(s.Store.View(ctx, func(r *db.Reader) (err error) {
		rev, err = r.In(s.Tailnet).Revision()
		return err
	}))
	_, err := s.Replica.WaitFor(ctx, rev)
	s.check(err)
}

// User is the id of "alice", "bob" or "carol".
func (s *Server) User(name string) tailcfg.UserID {
	s.Helper()
	u := s.Replica.Current().UserByName(name)
	if u == nil {
		s.Fatalf("no user %s", name)
	}
	return u.ID
}

// AuthKey stores k and returns its secret.
func (s *Server) AuthKey(k db.AuthKey) string {
	s.Helper()
	var secret string
	secret, k.KeyID, k.Hash = db.NewKey(db.KeyAuth)
	s.Update(func(tx *db.Tx) error {
		stored := k
		return tx.CreateAuthKey(&stored)
	})
	return secret
}

// SetPolicy makes text the policy.
func (s *Server) SetPolicy(text string) {
	s.Helper()
	snap := s.Update(func(tx *db.Tx) error {
		_, err := tx.SetPolicy([]byte(text), "", nil)
		return err
	})
	if err := snap.Policy().Err; err != nil {
		s.Fatalf("policy: %v", err)
	}
}

// EditNode changes the row of a node.
func (s *Server) EditNode(id tailcfg.NodeID, change func(*db.Node)) {
	s.Helper()
	s.Update(func(tx *db.Tx) error {
		n, err := tx.Node(id)
		if err != nil {
			return err
		}
		change(n)
		return tx.PutNode(n)
	})
}

// DeleteNode deletes a node.
func (s *Server) DeleteNode(id tailcfg.NodeID) {
	s.Helper()
	s.Update(func(tx *db.Tx) error { return tx.DeleteNode(id) })
}

// WaitNode waits until the node is as cond says. A node that does not exist is nil.
func (s *Server) WaitNode(id tailcfg.NodeID, what string, cond func(*tailnet.Node) bool) {
	s.Helper()
	timeout := time.NewTimer(Patience)
	defer timeout.Stop()
	for {
		news := s.Replica.Announced()
		if cond(s.Replica.Current().Node(id)) {
			return
		}
		select {
		case <-news:
		case <-timeout.C:
			s.Fatalf("node %d: waited in vain for: %s", id, what)
		}
	}
}

// WaitTick waits until the server has done its duties of a second: it gives them one to do.
func (s *Server) WaitTick() {
	s.Helper()
	var n *db.Node
	s.Update(func(tx *db.Tx) error {
		v4, v6, err := tx.AllocateAddrs(Pools)
		if err != nil {
			return err
		}
		name, err := tx.FreeName("tick", "tick")
		if err != nil {
			return err
		}
		n = &db.Node{
			MachineKey: key.NewMachine().Public(), NodeKey: key.NewNode().Public(), User: s.User("carol"), GivenName: name, IPv4: v4, IPv6: v6,
			Expiry: tx.Now().Add(-time.Second),
		}
		return tx.CreateNode(n)
	})
	s.WaitNode(n.ID, "expiry", func(n *tailnet.Node) bool { return n.Expired })
	s.DeleteNode(n.ID)
}
