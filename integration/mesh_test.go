package integration

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"tailscale.com/ipn/ipnstate"
)

// everything is a policy under which every node reaches every other.
const everything = `{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`

// ports is a policy under which every node reaches the given ports of every
// other, and nothing else but ICMP.
func ports(list string) string {
	return fmt.Sprintf(`{
		// One rule, so that a change of it is a change of this list only.
		"acls": [{"action": "accept", "src": ["*"], "dst": ["*:%s"]}],
	}`, list)
}

// TestPrintedLineJoins starts a server with nothing but a URL for each version,
// and runs the line that it prints, unchanged.
func TestPrintedLineJoins(t *testing.T) {
	lab := Open(t)
	for _, version := range Versions {
		t.Run(version, func(t *testing.T) {
			server := lab.Server(t, ServerConfig{})
			c := lab.Client(t, ClientConfig{Version: version})
			start := time.Now()
			c.Join(t, server.JoinLine(t))
			t.Logf("running after %v", time.Since(start).Round(time.Millisecond))
			if n := server.Node(t, c.IPv4(t)); !n.Online || n.GivenName != c.Name {
				t.Errorf("the server lists %+v", n)
			}
		})
	}
}

// TestFirstMesh joins a client of each version to a server that was started
// with nothing but a URL, and lets every one talk to every other. The server
// meanwhile opens no connection to anybody.
func TestFirstMesh(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	server.Stop(t)
	opened := server.CountOutbound(t)
	server.Start(t)
	// The user that a first start makes; its default policy lets a person's
	// own devices reach each other.
	key := server.Key(t, "admin", "--reusable")
	var clients []*Client
	for _, version := range Versions {
		c := lab.Client(t, ClientConfig{Version: version})
		start := time.Now()
		c.Up(t, server, key)
		t.Logf("%s joined in %v", version, time.Since(start).Round(time.Millisecond))
		c.Echo(t, 7000)
		clients = append(clients, c)
	}
	v4 := netip.MustParsePrefix("100.64.0.0/10")
	v6 := netip.MustParsePrefix("fd7a:115c:a1e0::/48")
	seen := make(map[netip.Addr]bool)
	for i, c := range clients {
		c.AwaitPeers(t, len(clients)-1)
		for _, a := range []netip.Addr{c.IPv4(t), c.IPv6(t)} {
			if seen[a] || !v4.Contains(a) && !v6.Contains(a) {
				t.Errorf("%s has address %v, which is another's or in no pool", c.Name, a)
			}
			seen[a] = true
		}
		if want := c.Name + ".mesh.internal"; c.DNSName(t) != want {
			t.Errorf("client %d is named %q, want %q", i, c.DNSName(t), want)
		}
	}
	for _, from := range clients {
		for _, to := range clients {
			if from == to {
				continue
			}
			t.Run(from.Version+" to "+to.Version, func(t *testing.T) {
				Meet(t, from, to)
				if via := from.PingDirect(t, to); via.Addr() != to.Addr {
					t.Errorf("direct path goes to %v, want %v", via, to.Addr)
				}
				from.Ping(t, to.IPv4(t))
				from.Ping(t, to.IPv6(t))
				from.AwaitTCP(t, to.IPv4(t), 7000, 10*time.Second)
				from.AwaitTCP(t, to.IPv6(t), 7000, 10*time.Second)
				from.AwaitName(t, to.DNSName(t), to.IPv4(t))
				from.AwaitName(t, to.Name, to.IPv4(t)) // by the search domain
			})
		}
	}
	if n := opened(); n != 0 {
		t.Errorf("the server sent %d packets that nobody had asked for", n)
	}
	// The counter counts: an attempt of the same machine is seen.
	if c, err := server.Dial(t.Context(), "tcp", netip.AddrPortFrom(clients[0].Addr, 7000).String()); err == nil {
		c.Close()
	}
	if opened() == 0 {
		t.Error("a connection from the server's machine was not counted")
	}
}

// TestDefaultPolicyKeepsUsersApart checks that the policy of a first start lets
// a person's devices reach each other and not those of somebody else.
func TestDefaultPolicyKeepsUsersApart(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	alice := server.Key(t, server.User(t, "alice"), "--reusable")
	bob := server.Key(t, server.User(t, "bob"))
	a1 := lab.Client(t, ClientConfig{Name: "a1"})
	a2 := lab.Client(t, ClientConfig{Name: "a2"})
	b := lab.Client(t, ClientConfig{Name: "b"})
	a1.Up(t, server, alice)
	b.Up(t, server, bob)
	a2.Up(t, server, alice)
	a2.Echo(t, 7000)
	b.Echo(t, 7000)

	st := a1.AwaitPeers(t, 1)
	if Peer(st, a2.IPv4(t)) == nil {
		t.Fatalf("a1 does not see a2:\n%s", describe(st))
	}
	a1.AwaitTCP(t, a2.IPv4(t), 7000, 10*time.Second)
	if st := b.Status(t); len(st.Peer) != 0 {
		t.Errorf("b sees devices of alice:\n%s", describe(st))
	}
	a1.RefusedTCP(t, b.IPv4(t), 7000)
}

// TestPolicyChangeReachesClients changes the policy under connected clients: a
// port opens within a second and closes again, a policy that is refused changes
// nothing, and nobody restarts.
func TestPolicyChangeReachesClients(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	server.SetPolicy(t, ports("7000"))
	key := server.Key(t, server.User(t, "alice"), "--reusable")
	a := lab.Client(t, ClientConfig{Version: Versions[1]})
	b := lab.Client(t, ClientConfig{Version: Versions[2]})
	old := lab.Client(t, ClientConfig{Version: Versions[0]})
	for _, c := range []*Client{a, b, old} {
		c.Up(t, server, key)
		c.Echo(t, 7000)
		c.Echo(t, 7001)
	}
	a.AwaitPeers(t, 2)
	for _, to := range []*Client{b, old} {
		Meet(t, a, to)
		a.AwaitTCP(t, to.IPv4(t), 7000, 10*time.Second)
		a.RefusedTCP(t, to.IPv4(t), 7001)
	}

	if out, err := server.TrySetPolicy(`{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:7001"]}`); err == nil {
		t.Errorf("a policy that lacks its end was accepted: %s", out)
	}
	if out, err := server.TrySetPolicy(`{"acls": [{"action": "accept", "src": ["group:none"], "dst": ["*:7001"]}]}`); err == nil {
		t.Errorf("a policy that names an unknown group was accepted: %s", out)
	}
	a.AwaitTCP(t, b.IPv4(t), 7000, 2*time.Second)
	a.RefusedTCP(t, b.IPv4(t), 7001)

	flow := a.Flow(t, b.IPv4(t), 7000)
	server.SetPolicy(t, ports("7000-7001"))
	start := time.Now()
	for _, to := range []*Client{b, old} {
		a.AwaitTCP(t, to.IPv4(t), 7001, time.Second)
		t.Logf("open to %s %v after the new policy was stored", to.Version, time.Since(start).Round(time.Millisecond))
	}
	flow.Unbroken(t, 2*time.Second)

	server.SetPolicy(t, ports("7000"))
	target := b.IPv4(t)
	probe(t, 2*time.Second, "port 7001 is closed again", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 250*time.Millisecond)
		defer cancel()
		if a.exchange(ctx, netip.AddrPortFrom(target, 7001)) == nil {
			return errors.New("it is open")
		}
		return nil
	})
	a.AwaitTCP(t, b.IPv4(t), 7000, 2*time.Second)
	if got := server.CLI(t, "policy", "get"); strings.TrimSpace(got) != strings.TrimSpace(ports("7000")) {
		t.Errorf("policy get prints\n%s\nwant the text that was stored\n%s", got, ports("7000"))
	}
}

// TestGroupsDecideWhoIsSeen checks that a node sees exactly the peers that the
// policy lets it talk to or be reached by.
func TestGroupsDecideWhoIsSeen(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	keys := make(map[string]string)
	for _, user := range []string{"ann", "ben", "cyd"} {
		keys[user] = server.Key(t, server.User(t, user))
	}
	policy := func(members string) string {
		return fmt.Sprintf(`{
			"groups": {"group:ops": [%s]},
			"acls": [{"action": "accept", "src": ["group:ops"], "dst": ["cyd@:7000"]}],
		}`, members)
	}
	server.SetPolicy(t, policy(`"ann@"`))
	clients := make(map[string]*Client)
	for user, key := range keys {
		c := lab.Client(t, ClientConfig{Name: user, Version: Versions[1]})
		c.Up(t, server, key)
		c.Echo(t, 7000)
		clients[user] = c
	}
	ann, ben, cyd := clients["ann"], clients["ben"], clients["cyd"]
	sees := func(c *Client, want ...*Client) {
		t.Helper()
		c.Await(t, fmt.Sprintf("%d right peers", len(want)), 10*time.Second, func(st *ipnstate.Status) bool {
			for _, w := range want {
				if Peer(st, w.IPv4(t)) == nil {
					return false
				}
			}
			return len(st.Peer) == len(want)
		})
	}
	sees(ann, cyd)
	sees(cyd, ann)
	sees(ben)
	ann.AwaitTCP(t, cyd.IPv4(t), 7000, 10*time.Second)
	cyd.RefusedTCP(t, ann.IPv4(t), 7000) // a rule has a direction
	ben.RefusedTCP(t, cyd.IPv4(t), 7000)

	server.SetPolicy(t, policy(`"ben@"`))
	sees(ben, cyd)
	sees(cyd, ben)
	sees(ann)
	ben.AwaitTCP(t, cyd.IPv4(t), 7000, 10*time.Second)
	ann.RefusedTCP(t, cyd.IPv4(t), 7000)
}
