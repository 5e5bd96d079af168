package control_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control"
	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

type rig struct {
	*controltest.Server
	key string // reusable, of alice's
}

func start(t *testing.T, opts controltest.Options) *rig {
	t.Helper()
	s := controltest.Start(t, opts)
	return &rig{s, s.AuthKey(db.AuthKey{User: s.User("alice"), Reusable: true})}
}

func quick(c *control.Config) { c.Grace = 100 * time.Millisecond }

func (g *rig) join(name string) *controltest.Client {
	g.Helper()
	return g.NewClient(name).Join(g.key)
}

func online(n *tailcfg.Node, want bool) bool { return n != nil && n.Online != nil && *n.Online == want }

func TestInsideNoiseDeniesByDefault(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	member, stranger := g.join("a"), g.NewClient("stranger")
	for _, path := range []string{
		"/", "/metrics", "/debug", "/debug/pprof/", "/health", "/version", "/api/v1/node", "/key", "/machine", "/machine/", "/machine/tka/init/begin",
		"/machine/set-dns", "/machine/id-token", "/machine/../metrics", "//machine/map", "/machine/map/", "/MACHINE/MAP", "/machine/ssh/action/x",
	} {
		for _, method := range []string{"GET", "POST", "PATCH", "TRACE"} {
			if status, text := stranger.Do(method, path, "{}"); status != http.StatusUnauthorized {
				t.Errorf("stranger: %s %s: status %d %q", method, path, status, text)
			}
			if status, text := member.Do(method, path, "{}"); status < 400 || status >= 500 || len(text) > 200 {
				t.Errorf("member: %s %s: status %d %.200q", method, path, status, text)
			}
		}
	}
	for path, body := range map[string]string{
		"/machine/audit-log": `{"Action": "x"}`, "/machine/feature/query": `{"Feature": "serve"}`, "/machine/update-health": `{}`,
	} {
		if status, _ := stranger.Do("POST", path, body); status != http.StatusUnauthorized {
			t.Errorf("stranger: %s: status %d", path, status)
		}
	}
	if status, text := stranger.Do("GET", "/machine/whoami", ""); status != 200 || strings.Contains(text, "node") {
		t.Errorf("whoami of a stranger: %d %q", status, text)
	}
	if status, text := member.Do("GET", "/machine/whoami", ""); status != 200 || !strings.Contains(text, "a.mesh.test.") {
		t.Errorf("whoami of a node: %d %q", status, text)
	}
}

func TestForeignNodeKeyHasOneTextEverywhere(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a, b := g.join("a"), g.join("b")
	gone := g.join("gone")
	g.DeleteNode(gone.ID())
	for name, k := range map[string]key.NodePublic{"another's": a.Node.Public(), "nobody's": key.NewNode().Public(), "deleted": gone.Node.Public()} {
		for path, body := range map[string]any{
			"/machine/map":           &tailcfg.MapRequest{Version: 142, NodeKey: k, OmitPeers: true},
			"/machine/audit-log":     &tailcfg.AuditLogRequest{Version: 142, NodeKey: k, Action: "DISCONNECT_NODE"},
			"/machine/feature/query": &tailcfg.QueryFeatureRequest{Feature: "serve", NodeKey: k},
		} {
			if status, text := b.Do("POST", path, body); status != http.StatusUnauthorized || text != "node not found\n" {
				t.Errorf("%s node key at %s: status %d %q", name, path, status, text)
			}
		}
	}
}

func TestClientsReportsAreKept(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.join("a")
	if status, _ := a.Do("POST", "/machine/audit-log", &tailcfg.AuditLogRequest{Version: 142, NodeKey: a.Node.Public(), Action: "DISCONNECT_NODE", Details: "a\x00b" + strings.Repeat("x", 9000)}); status != 200 {
		t.Errorf("audit record: status %d", status)
	}
	if status, _ := a.Do("POST", "/machine/update-health", `{"Subsys": "x"}`); status != 204 {
		t.Errorf("health: status %d", status)
	}
	if status, text := a.Do("POST", "/machine/feature/query", &tailcfg.QueryFeatureRequest{Feature: "funnel", NodeKey: a.Node.Public()}); status != 200 || !strings.Contains(text, "not available") {
		t.Errorf("feature: status %d %q", status, text)
	}
	var last *db.AuditEvent
	err := g.Store.View(g.Context(), func(r *db.Reader) error {
		list, err := r.In(g.Tailnet).AuditEvents(0, 100)
		if len(list) > 0 {
			last = list[len(list)-1]
		}
		return err
	})
	if err != nil || last.Action != "client.report" || last.Actor.Kind != "node" || last.Actor.ID != int64(a.ID()) || len(last.After) > 5000 {
		t.Errorf("%v: %+v", err, last)
	}
	limited := false
	for i := 0; i < 100 && !limited; i++ {
		status, _ := a.Do("POST", "/machine/audit-log", &tailcfg.AuditLogRequest{NodeKey: a.Node.Public(), Action: "x"})
		limited = status == http.StatusTooManyRequests
	}
	if !limited {
		t.Error("one node may fill the audit log")
	}
}

func TestKeyExpiryOnItsDay(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: func(c *control.Config) { c.NodeExpiry = 2 * time.Minute }})
	a := g.join("a")
	b := g.NewClient("b").Join(g.AuthKey(db.AuthKey{Tags: []string{"tag:x"}}))
	st, peer := a.Poll(), b.Poll()
	st.Wait("b", func(v *controltest.View) bool { return v.Peer("b") != nil })
	g.Clock.Advance(2 * time.Minute)
	st.Wait("itself alone, expired", func(v *controltest.View) bool { return len(v.Peers) == 0 && v.Node.Expired })
	peer.Wait("a expired", func(v *controltest.View) bool { return v.Peer("a") != nil && v.Peer("a").Expired })
	if g.Admit(a.Node.Public()) || !g.Admit(b.Node.Public()) {
		t.Error("the relay admits an expired node, or not a living one")
	}
}

// jumps is a log handler that tells of jumps of the clock.
type jumps chan struct{}

func (j jumps) Enabled(context.Context, slog.Level) bool { return true }
func (j jumps) WithAttrs([]slog.Attr) slog.Handler       { return j }
func (j jumps) WithGroup(string) slog.Handler            { return j }
func (j jumps) Handle(_ context.Context, r slog.Record) error {
	if strings.HasPrefix(r.Message, "the clock jumped") {
		close(j)
	}
	return nil
}

func TestClockJumpExpiresNobody(t *testing.T) {
	t.Parallel()
	jumped := make(jumps)
	g := start(t, controltest.Options{Policy: routePolicy, Change: func(c *control.Config) { c.NodeExpiry, c.Log = time.Hour, slog.New(jumped) }})
	a := g.join("a")
	g.Clock.Advance(24 * time.Hour)
	select {
	case <-jumped:
	case <-time.After(controltest.Patience):
		t.Fatal("the jump goes unnoticed")
	}
	// The duties go on: this one comes after the expiry of the tick that saw the jump.
	r := g.router("r", "10.1.2.0/24")
	g.WaitNode(r.ID(), "approval", func(n *tailnet.Node) bool { return len(n.ApprovedRoutes) == 1 })
	if g.Replica.Current().Node(a.ID()).Expired {
		t.Error("one jump of the clock expired a node")
	}
}

func TestEphemeralNodesAreRemoved(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: func(c *control.Config) { c.Grace, c.EphemeralTimeout = 100*time.Millisecond, 2*time.Minute }})
	k := g.AuthKey(db.AuthKey{User: g.User("alice"), Reusable: true, Ephemeral: true})
	watcher := g.join("watcher").Poll()
	never := g.NewClient("never") // registers, and never polls
	if resp, _ := never.Register(never.RegisterRequest(k)); resp == nil || resp.Error != "" {
		t.Fatalf("%+v", resp)
	}
	id := never.ID()
	left, stays := g.NewClient("left").Join(k), g.NewClient("stays").Join(k)
	ls, ss := left.Poll(), stays.Poll()
	watcher.Wait("both online", func(v *controltest.View) bool { return online(v.Peer("left"), true) && online(v.Peer("stays"), true) })
	ls.Close()
	watcher.Wait("one offline", func(v *controltest.View) bool { return online(v.Peer("left"), false) })
	g.Clock.Advance(2*time.Minute + time.Second)
	g.WaitNode(id, "removal", func(n *tailnet.Node) bool { return n == nil })
	watcher.Wait("one removed", func(v *controltest.View) bool { return v.Peer("left") == nil && online(v.Peer("stays"), true) })
	if ss.Ended() {
		t.Error("the node with a stream lost it")
	}
}

func TestRestartShowsNobodyOffline(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: quick})
	a, b, c := g.join("a"), g.join("b"), g.join("c")
	st := a.Poll()
	b.Poll()
	c.Poll()
	st.Wait("all online", func(v *controltest.View) bool { return online(v.Peer("b"), true) && online(v.Peer("c"), true) })
	next := g.Restart()
	st = a.On(next).Poll()
	st.Wait("a map", func(v *controltest.View) bool { return len(v.Peers) == 2 })
	b.On(next).Poll() // c does not come back
	grace := next.Clock.Now().Add(89 * time.Second)
	next.Reap(next.Context(), grace)
	next.WaitNode(b.ID(), "a stream", func(n *tailnet.Node) bool { return next.Poll.Attached(n.ID) })
	st.Look(func(v *controltest.View) {
		if !online(v.Peer("b"), true) || !online(v.Peer("c"), true) {
			t.Error("told offline within the grace")
		}
	})
	next.Reap(next.Context(), grace.Add(2*time.Second))
	st.Wait("c offline after the grace", func(v *controltest.View) bool { return online(v.Peer("c"), false) && online(v.Peer("b"), true) })
	messages, _ := st.Messages()
	for _, m := range messages {
		for _, p := range m.PeersChangedPatch {
			if p.NodeID == b.ID() && p.Online != nil && !*p.Online {
				t.Error("b was told offline")
			}
		}
	}
}

func TestRelayIsRevoked(t *testing.T) {
	t.Parallel()
	revoked := make(chan key.NodePublic, 10)
	g := start(t, controltest.Options{Change: func(c *control.Config) { c.Revoke = func(k key.NodePublic) { revoked <- k } }})
	expect := func(what string, want key.NodePublic) {
		t.Helper()
		select {
		case got := <-revoked:
			if got != want {
				t.Errorf("%s: revoked %v, want %v", what, got.ShortString(), want.ShortString())
			}
		case <-time.After(controltest.Patience):
			t.Fatalf("%s: nothing was revoked", what)
		}
		if g.Admit(want) {
			t.Errorf("%s: the key is admitted", what)
		}
	}
	a, b, c, d := g.join("a"), g.join("b"), g.join("c"), g.join("d")
	g.DeleteNode(a.ID())
	expect("deletion", a.Node.Public())
	g.EditNode(b.ID(), func(n *db.Node) { n.Expiry, n.Expired = g.Clock.Now(), true })
	expect("expiry", b.Node.Public())
	c.Register(&tailcfg.RegisterRequest{Version: 142, NodeKey: c.Node.Public(), Expiry: time.Unix(123, 0)})
	expect("logout", c.Node.Public())
	old := d.Rekey()
	d.Join(g.key)
	expect("new key", old)
	if !g.Admit(d.Node.Public()) {
		t.Error("the new key is not admitted")
	}
}

const routePolicy = `{
	"tagOwners": {"tag:x": ["alice@"]},
	"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
	"autoApprovers": {"routes": {"10.1.0.0/16": ["tag:x"]}, "exitNode": ["tag:x"]},
}`

func (g *rig) router(name string, routes ...string) *controltest.Client {
	g.Helper()
	c := g.NewClient(name)
	for _, r := range routes {
		c.Info.RoutableIPs = append(c.Info.RoutableIPs, netip.MustParsePrefix(r))
	}
	return c.Join(g.AuthKey(db.AuthKey{Tags: []string{"tag:x"}}))
}

func allowed(n *tailcfg.Node, route string) bool {
	if n == nil {
		return false
	}
	for _, p := range n.AllowedIPs {
		if p.String() == route {
			return true
		}
	}
	return false
}

func TestRoutesAreApprovedByPolicyOnly(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Policy: routePolicy})
	st := g.join("a").Poll()
	r := g.router("r", "10.1.2.0/24", "10.2.0.0/16", "0.0.0.0/0", "::/0")
	mine := r.Poll()
	st.Wait("the approved routes", func(v *controltest.View) bool {
		return allowed(v.Peer("r"), "10.1.2.0/24") && allowed(v.Peer("r"), "0.0.0.0/0") && allowed(v.Peer("r"), "::/0")
	})
	mine.Wait("its own approved routes", func(v *controltest.View) bool { return allowed(v.Node, "10.1.2.0/24") })
	person := g.NewClient("person")
	person.Info.RoutableIPs = []netip.Prefix{netip.MustParsePrefix("10.1.3.0/24"), netip.MustParsePrefix("0.0.0.0/0")}
	person.Join(g.key)
	st.Wait("a person's device", func(v *controltest.View) bool { return v.Peer("person") != nil })
	st.Look(func(v *controltest.View) {
		if allowed(v.Peer("r"), "10.2.0.0/16") || len(v.Peer("person").AllowedIPs) > 2 {
			t.Errorf("unapproved routes are in effect: %v, %v", v.Peer("r").AllowedIPs, v.Peer("person").AllowedIPs)
		}
	})
	// What is approved but no longer advertised is not in effect; it is again when it comes back.
	g.EditNode(person.ID(), func(n *db.Node) {
		n.ApprovedRoutes = []netip.Prefix{netip.MustParsePrefix("10.1.3.0/24"), netip.MustParsePrefix("10.9.0.0/16")}
	})
	st.Wait("the route approved by hand", func(v *controltest.View) bool { return allowed(v.Peer("person"), "10.1.3.0/24") })
	st.Look(func(v *controltest.View) {
		if allowed(v.Peer("person"), "10.9.0.0/16") {
			t.Error("a route that is not advertised is in effect")
		}
	})
	person.Info.RoutableIPs = nil
	person.Report()
	st.Wait("the route gone", func(v *controltest.View) bool { return !allowed(v.Peer("person"), "10.1.3.0/24") })
	person.Info.RoutableIPs = []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}
	person.Report()
	st.Wait("the other route", func(v *controltest.View) bool { return allowed(v.Peer("person"), "10.9.0.0/16") })
}

func TestPrimaryRouterFailsOverAndStays(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Policy: routePolicy, Change: quick})
	const route = "10.1.0.0/16"
	st := g.join("a").Poll()
	first, second := g.router("first", route), g.router("second", route)
	one, two := first.Poll(), second.Poll()
	primary := func(name, other string) {
		t.Helper()
		st.Wait(name+" is primary", func(v *controltest.View) bool { return allowed(v.Peer(name), route) && !allowed(v.Peer(other), route) })
	}
	st.Wait("both online", func(v *controltest.View) bool { return online(v.Peer("first"), true) && online(v.Peer("second"), true) })
	primary("first", "second")
	one.Close()
	primary("second", "first")
	one = first.Poll()
	st.Wait("the first is back", func(v *controltest.View) bool { return online(v.Peer("first"), true) })
	g.WaitTick()
	primary("second", "first") // it stays
	two.Close()
	primary("first", "second")
	g.DeleteNode(first.ID())
	st.Wait("the only one left", func(v *controltest.View) bool { return v.Peer("first") == nil && allowed(v.Peer("second"), route) })
	one.WaitEnd()
}

func TestNoMapCarriesAPersonsIDForATaggedNode(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	people := map[tailcfg.UserID]bool{g.User("alice"): true, g.User("bob"): true, g.User("carol"): true}
	g.join("a")
	old := g.NewClient("old")
	old.Version = 113
	old.Join(g.key)
	var tagged []*controltest.Client
	for i := range 5 { // more nodes than people, so that ids meet
		tagged = append(tagged, g.NewClient(fmt.Sprintf("t%d", i)).Join(g.AuthKey(db.AuthKey{User: g.User("alice"), Tags: []string{"tag:x"}})))
	}
	for _, c := range tagged {
		st := c.Poll()
		st.Wait("all peers", func(v *controltest.View) bool { return len(v.Peers) == 6 })
		st.Look(func(v *controltest.View) {
			for _, n := range append([]*tailcfg.Node{v.Node}, v.Peer("t0"), v.Peer("t1"), v.Peer("t2"), v.Peer("t3"), v.Peer("t4")) {
				if n != nil && (people[n.User] || n.User == v.Node.User && n != v.Node) {
					t.Errorf("%s sees %s with the user %d", v.Node.Name, n.Name, n.User)
				}
			}
			if v.Peer("old").Cap != 113 || v.Peer("a").Cap != controltest.Version {
				t.Errorf("capability versions %d and %d are not the peers' own", v.Peer("old").Cap, v.Peer("a").Cap)
			}
			if h := v.Peer("a").Hostinfo; h.BackendLogID() != "" || h.IPNVersion() != "" || h.OS() != "linux" {
				t.Errorf("peers are told %+v", h)
			}
		})
	}
}
