package integration

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"

	"github.com/signalbox-net/signalbox/integration/postgres"
)

// A site is two servers with one name on one PostgreSQL.
type site struct {
	lab   *Lab
	db    *postgres.Server
	lineA *postgres.Line // server a's way to the database
	a, b  *Server
}

func newSite(t *testing.T, env ...string) *site {
	t.Helper()
	x := &site{lab: Open(t), db: postgres.Start(t)}
	x.lineA = x.db.Line()
	x.a = x.lab.Server(t, ServerConfig{TLS: true, Host: "control-a", Env: append(x.lineA.Env(), env...)})
	x.b = x.lab.Server(t, ServerConfig{TLS: true, Host: "control-b", Env: append(x.db.Line().Env(), env...)})
	x.a.SetPolicy(t, everything)
	return x
}

// client makes a client that finds the servers by their name, which has the
// addresses of the given ones, in order.
func (x *site) client(t *testing.T, cfg ClientConfig, servers ...*Server) *Client {
	t.Helper()
	cfg.Env = append(cfg.Env, x.a.Trust()...)
	c := x.lab.Client(t, cfg)
	for _, s := range servers {
		s.Introduce(t, c.Host)
	}
	return c
}

// cut keeps a host from another one, without a word.
func (h *Host) cut(t *testing.T, from netip.Addr) {
	t.Helper()
	err := h.script(fmt.Sprintf("nft -f - <<-END\ntable ip cut {\nchain out { type filter hook output priority -200; ip daddr %s drop; }\n}\nEND\n", from))
	if err != nil {
		t.Fatal(err)
	}
}

// holds says how many streams each server holds, as this one sees it.
func (s *Server) holds(t *testing.T, apiKey string) map[string]int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", s.URL+"/api/signalbox/v1/servers", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+apiKey)
	res, err := s.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("servers: %s %v %s", res.Status, err, body)
	}
	list := decode[struct {
		Servers []struct {
			Name     string
			Sessions int
		}
	}](t, string(body))
	out := map[string]int{}
	for _, i := range list.Servers {
		host, _, _ := strings.Cut(i.Name, " ")
		out[host] = i.Sessions
	}
	return out
}

// TestTwoServers has clients at each of two servers and makes changes at the
// other one; then it kills one server in the middle of a registration and of
// edits of the policy, and takes the database away from the other for a while.
func TestTwoServers(t *testing.T) {
	t.Parallel()
	x := newSite(t)
	key := x.a.Key(t, x.a.User(t, "alice"), "--reusable")
	a := x.client(t, ClientConfig{Name: "at-a", Version: Versions[1]}, x.a, x.b)
	b := x.client(t, ClientConfig{Name: "at-b", Version: Versions[2]}, x.b, x.a)
	for s, c := range map[*Server]*Client{x.a: a, x.b: b} {
		c.Up(t, s, key)
		c.Echo(t, 7000)
	}
	a.AwaitPeers(t, 1)
	b.AwaitPeers(t, 1)
	a.PingDirect(t, b)
	b.PingDirect(t, a)
	apiKey := strings.Trim(strings.TrimSpace(x.b.CLI(t, "apikeys", "create", "-e", "1h", "-o", "json")), `"`)
	if got := x.b.holds(t, apiKey); got["control-a"] != 1 || got["control-b"] != 1 {
		t.Fatalf("streams are held so: %v, want one each", got)
	}
	flow := a.Flow(t, b.IPv4(t), 7000)
	offline := []*Vigil{
		a.Vigil(t, "its peer is offline or gone", func(st *ipnstate.Status) bool { return !peerOnline(st, b) }),
		b.Vigil(t, "its peer is offline or gone", func(st *ipnstate.Status) bool { return !peerOnline(st, a) }),
	}

	x.crossChanges(t, x.b, a, b)
	x.crossChanges(t, x.a, b, a)
	x.crossLogin(t)
	if got := x.b.holds(t, apiKey); got["control-a"] != 1 || got["control-b"] != 1 {
		t.Fatalf("before the kill streams are held so: %v, want one each", got)
	}
	x.killUnderWrites(t, key, a, b)
	if got := x.b.holds(t, apiKey); got["control-b"] != 3 {
		t.Errorf("after the kill streams are held so: %v, want all three at the other server", got)
	}
	x.databaseAway(t, a, b)
	flow.Unbroken(t, 3*time.Second)
	for _, v := range offline {
		v.End(t)
	}
}

// peerOnline says whether the other client is an online peer, whatever its
// name.
func peerOnline(st *ipnstate.Status, c *Client) bool {
	for _, p := range st.Peer {
		if p.HostName == c.Name {
			return p.Online
		}
	}
	return false
}

// crossChanges makes changes at a server that the client far has no stream of.
func (x *site) crossChanges(t *testing.T, s *Server, far, near *Client) {
	t.Helper()
	name := "renamed-by-" + s.Name
	s.CLI(t, "nodes", "rename", "-i", s.Node(t, near.IPv4(t)).ID, name)
	_, took := far.Await(t, name, 5*time.Second, func(st *ipnstate.Status) bool {
		p := Peer(st, near.IPv4(t))
		return p != nil && strings.HasPrefix(p.DNSName, name+".")
	})
	t.Logf("%s sees a new name %v after %s answered", far.Name, took.Round(time.Millisecond), s.Name)

	route := netip.MustParsePrefix("10.99.0.0/24")
	near.Tailscale(t, "set", "--advertise-routes="+route.String())
	probe(t, 10*time.Second, "the advertised route at "+s.Name, func(context.Context) error {
		if out := s.CLI(t, "nodes", "list-routes", "-o", "json"); !strings.Contains(out, route.String()) {
			return fmt.Errorf("routes are %s", out)
		}
		return nil
	})
	id := s.Node(t, near.IPv4(t)).ID
	s.CLI(t, "nodes", "approve-routes", "-i", id, "-r", route.String())
	has := func(want bool) func(st *ipnstate.Status) bool {
		return func(st *ipnstate.Status) bool {
			p := Peer(st, near.IPv4(t))
			return p != nil && p.AllowedIPs != nil && slices.Contains(p.AllowedIPs.AsSlice(), route) == want
		}
	}
	_, took = far.Await(t, "the approved route", 5*time.Second, has(true))
	t.Logf("%s sees a route %v after %s approved it", far.Name, took.Round(time.Millisecond), s.Name)
	near.Tailscale(t, "set", "--advertise-routes=")
	far.Await(t, "the route's end", 10*time.Second, has(false))

	near.Echo(t, 7100)
	far.AwaitTCP(t, near.IPv4(t), 7100, 5*time.Second)
	s.SetPolicy(t, fmt.Sprintf(`{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:7000"]}]} // %s`+"\n", s.Name))
	probe(t, 5*time.Second, "a port that is closed by policy", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
		if far.exchange(ctx, netip.AddrPortFrom(near.IPv4(t), 7100)) == nil {
			return fmt.Errorf("it still answers")
		}
		return nil
	})
	s.SetPolicy(t, everything)
	took = far.AwaitTCP(t, near.IPv4(t), 7100, 5*time.Second)
	t.Logf("%s reaches a port %v after %s allowed it", far.Name, took.Round(time.Millisecond), s.Name)
}

// crossLogin begins an interactive login at one server and approves it at the
// other.
func (x *site) crossLogin(t *testing.T) {
	t.Helper()
	c := x.client(t, ClientConfig{Name: "visitor"}, x.a)
	page, wait := c.Login(t, x.a)
	x.b.CLI(t, "auth", "register", "--user", "alice", "--auth-id", path.Base(page))
	approved := time.Now()
	wait()
	c.AwaitRunning(t)
	t.Logf("running %v after the approval at the other server", time.Since(approved).Round(time.Millisecond))
	c.Tailscale(t, "logout")
	x.b.CLI(t, "nodes", "delete", "-i", func() string {
		for _, n := range x.b.Nodes(t) {
			if n.Name == "visitor" {
				return n.ID
			}
		}
		t.Fatal("the node of the login is not there")
		return ""
	}(), "--force")
}

// killUnderWrites kills server a while a client registers there and the policy
// is edited there.
func (x *site) killUnderWrites(t *testing.T, key string, a, b *Client) {
	t.Helper()
	c := x.client(t, ClientConfig{Name: "late", Version: Versions[0]}, x.a, x.b)
	edited := x.policyEdits(t)
	acknowledged, editing := 0, make(chan struct{})
	var edits, joins sync.WaitGroup
	edits.Go(func() {
		for n := 1; ; n++ {
			if _, err := x.a.TrySetPolicy(fmt.Sprintf("// edit %d\n%s", n, everything)); err != nil {
				return
			}
			if acknowledged = n; n == 2 {
				close(editing)
			}
		}
	})
	<-editing
	var joinErr error
	joins.Go(func() { _, joinErr = c.TryTailscale("up", "--login-server", x.a.URL, "--auth-key", key) })
	<-time.After(150 * time.Millisecond) // the registration is under way, or about to be
	killed := time.Now()
	x.a.Kill()
	edits.Wait()

	name := fmt.Sprintf("back-%d", killed.UnixMilli()%1000)
	x.b.CLI(t, "nodes", "rename", "-i", x.b.Node(t, a.IPv4(t)).ID, name)
	a.Await(t, "the name "+name, 30*time.Second, func(st *ipnstate.Status) bool {
		return st.Self != nil && strings.HasPrefix(st.Self.DNSName, name+".")
	})
	took := time.Since(killed)
	t.Logf("%s is back %v after the kill, with %d acknowledged edits", a.Version, took.Round(time.Millisecond), acknowledged)
	if took > 10*time.Second {
		t.Errorf("the client is back after %v, want 10 s", took)
	}
	policy := x.b.CLI(t, "policy", "get")
	if !strings.Contains(policy, fmt.Sprintf("// edit %d\n", acknowledged)) && !strings.Contains(policy, fmt.Sprintf("// edit %d\n", acknowledged+1)) {
		t.Errorf("edit %d was acknowledged, the policy is\n%s", acknowledged, policy)
	}
	if got := x.policyEdits(t) - edited; got < acknowledged || got > acknowledged+1 {
		t.Errorf("%d edits were acknowledged, the audit log has %d", acknowledged, got)
	}
	joins.Wait()
	if joinErr != nil {
		t.Errorf("the registration that was interrupted: %v", joinErr)
	}
	c.Await(t, "running", 30*time.Second, func(st *ipnstate.Status) bool { return st.BackendState == ipn.Running.String() })
	c.AwaitPeers(t, 2)
	c.AwaitTCP(t, a.IPv4(t), 7000, 20*time.Second)
	c.AwaitTCP(t, b.IPv4(t), 7000, 20*time.Second)
	owner := map[netip.Addr]string{}
	for _, n := range x.b.Nodes(t) {
		for _, ip := range n.IPAddresses {
			if owner[ip] != "" {
				t.Errorf("%v is %s's and %s's", ip, owner[ip], n.GivenName)
			}
			owner[ip] = n.GivenName
		}
	}
	x.a.Start(t)
}

// policyEdits counts the edits of the policy in the audit log, in which every
// event has to follow the one before.
func (x *site) policyEdits(t *testing.T) (n int) {
	t.Helper()
	events := decode[[]struct {
		Number           int64 `json:",string"`
		Action, PrevHash string
	}](t, x.b.CLI(t, "audit", "-n", "1000", "-o", "json"))
	hashes := map[string]bool{}
	for i, e := range events {
		if e.Number != int64(i+1) || hashes[e.PrevHash] {
			t.Errorf("audit event %d (%s) is number %d, or has another one's hash", i+1, e.Action, e.Number)
		}
		hashes[e.PrevHash] = true
		if e.Action == "policy.set" {
			n++
		}
	}
	return n
}

// outage is how long servers are without their database.
const outage = 30 * time.Second

// databaseAway stops PostgreSQL for a while.
func (x *site) databaseAway(t *testing.T, a, b *Client) {
	t.Helper()
	x.db.Stop()
	stopped := time.Now()
	if out, err := x.b.TryCLI("users", "create", "refused"); err == nil {
		t.Errorf("a write without a database was taken: %s", out)
	}
	if err := a.exchange(t.Context(), netip.AddrPortFrom(b.IPv4(t), 7000)); err != nil {
		t.Errorf("a new connection while the database is away: %v", err)
	}
	<-time.After(outage - time.Since(stopped))
	x.db.Start()
	started := time.Now()
	probe(t, 10*time.Second, "a write", func(context.Context) error {
		_, err := x.b.TryCLI("nodes", "rename", "-i", x.b.Node(t, b.IPv4(t)).ID, "healed")
		return err
	})
	for _, c := range []*Client{a, b} {
		c.Await(t, "a name that was given after the database came back", 10*time.Second, func(st *ipnstate.Status) bool {
			p := Peer(st, b.IPv4(t))
			return p != nil && strings.HasPrefix(p.DNSName, "healed.") || st.Self != nil && strings.HasPrefix(st.Self.DNSName, "healed.")
		})
	}
	t.Logf("everything works %v after the database's start", time.Since(started).Round(time.Millisecond))
}

// TestRelaysOfTwoServers joins clients of which each reaches one server only,
// and nothing by UDP.
func TestRelaysOfTwoServers(t *testing.T) {
	t.Parallel()
	x := newSite(t)
	key := x.b.Key(t, x.b.User(t, "alice"), "--reusable")
	a := x.client(t, ClientConfig{Name: "at-a", Version: Versions[2], NoUDP: true}, x.a)
	b := x.client(t, ClientConfig{Name: "at-b", Version: Versions[1], NoUDP: true}, x.b)
	a.cut(t, x.b.Addr)
	b.cut(t, x.a.Addr)
	for s, c := range map[*Server]*Client{x.a: a, x.b: b} {
		c.Up(t, s, key)
		c.Echo(t, 7000)
	}
	a.AwaitPeers(t, 1)
	b.AwaitPeers(t, 1)
	for _, pair := range [][2]*Client{{a, b}, {b, a}} {
		pair[0].PingRelayed(t, pair[1], pair[1].Status(t).Self.Relay)
		pair[0].AwaitTCP(t, pair[1].IPv4(t), 7000, 10*time.Second)
	}

	x.serverCutOff(t, a, b)

	// The mesh comes again after one of its sides was gone.
	x.a.Kill()
	x.a.Start(t)
	a.AwaitTCP(t, b.IPv4(t), 7000, 40*time.Second)
	b.AwaitTCP(t, a.IPv4(t), 7000, 20*time.Second)
}

// serverCutOff takes the database away from server a alone, whose client
// cannot go to another one: it keeps its stream, its peers and its relay, and
// learns afterwards what was changed at server b.
func (x *site) serverCutOff(t *testing.T, a, b *Client) {
	t.Helper()
	flow := a.Flow(t, b.IPv4(t), 7000)
	offline := []*Vigil{
		a.Vigil(t, "its peer is offline or gone", func(st *ipnstate.Status) bool { return !peerOnline(st, b) }),
		b.Vigil(t, "its peer is offline or gone", func(st *ipnstate.Status) bool { return !peerOnline(st, a) }),
	}
	x.lineA.Cut()
	cut := time.Now()
	if out, err := x.a.TryCLI("users", "create", "refused", "--timeout", "20s"); err == nil {
		t.Errorf("a write at the server that is cut off was taken: %s", out)
	}
	if code := x.a.health(t); code != http.StatusServiceUnavailable {
		t.Errorf("the health of the server that is cut off is %d", code)
	}
	x.b.CLI(t, "nodes", "rename", "-i", x.b.Node(t, b.IPv4(t)).ID, "meanwhile")
	<-time.After(outage - time.Since(cut))
	x.lineA.Mend()
	mended := time.Now()
	a.Await(t, "the name that was given meanwhile", 15*time.Second, func(st *ipnstate.Status) bool {
		p := Peer(st, b.IPv4(t))
		return p != nil && strings.HasPrefix(p.DNSName, "meanwhile.")
	})
	t.Logf("what was missed is there %v after the cut", time.Since(mended).Round(time.Millisecond))
	probe(t, 10*time.Second, "a write at the server that was cut off", func(context.Context) error {
		_, err := x.a.TryCLI("nodes", "rename", "-i", x.a.Node(t, a.IPv4(t)).ID, "healed")
		return err
	})
	b.Await(t, "the name that was given after the cut", 10*time.Second, func(st *ipnstate.Status) bool {
		p := Peer(st, a.IPv4(t))
		return p != nil && strings.HasPrefix(p.DNSName, "healed.")
	})
	flow.Unbroken(t, 3*time.Second)
	for _, v := range offline {
		v.End(t)
	}
}

// health is the status of the server's answer to /health.
func (s *Server) health(t *testing.T) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", s.URL+"/health", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := s.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	return res.StatusCode
}
