package integration

import (
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tailcfg"
)

// needsLogin is the state of a client that has no valid key.
func needsLogin(st *ipnstate.Status) bool { return st.BackendState == ipn.NeedsLogin.String() }

// two joins two clients of user alice, which see each other, and returns the
// user's id.
func two(t *testing.T, server *Server, a, b *Client) (user string) {
	t.Helper()
	user = server.User(t, "alice")
	key := server.Key(t, user, "--reusable")
	for _, c := range []*Client{a, b} {
		c.Up(t, server, key)
		c.Echo(t, 7000)
	}
	a.AwaitPeers(t, 1)
	b.AwaitPeers(t, 1)
	Meet(t, a, b)
	a.AwaitTCP(t, b.IPv4(t), 7000, 10*time.Second)
	return user
}

// TestDeletedNodeLogsInAgain deletes nodes of connected clients of each
// version: each asks to log in again at once, and its peers forget it.
func TestDeletedNodeLogsInAgain(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	key := server.Key(t, server.User(t, "alice"), "--reusable")
	stays := lab.Client(t, ClientConfig{Name: "stays"})
	stays.Up(t, server, key)
	stays.Echo(t, 7000)
	for _, version := range Versions {
		t.Run(version, func(t *testing.T) {
			c := lab.Client(t, ClientConfig{Version: version})
			c.Up(t, server, key)
			stays.AwaitPeers(t, 1)
			addr := c.IPv4(t)
			Meet(t, c, stays)
			c.AwaitTCP(t, stays.IPv4(t), 7000, 10*time.Second)

			server.CLI(t, "nodes", "delete", "-i", server.Node(t, addr).ID, "--force")
			_, took := c.Await(t, "a need to log in", 5*time.Second, needsLogin)
			t.Logf("told after %v", took.Round(time.Millisecond))
			_, took = stays.Await(t, "no peers", 5*time.Second, func(st *ipnstate.Status) bool { return len(st.Peer) == 0 })
			t.Logf("forgotten by its peer after %v more", took.Round(time.Millisecond))
			if nodes := server.Nodes(t); len(nodes) != 1 {
				t.Errorf("%d nodes are left: %+v", len(nodes), nodes)
			}

			c.Up(t, server, key)
			stays.AwaitPeers(t, 1)
			Meet(t, c, stays)
			c.AwaitTCP(t, stays.IPv4(t), 7000, 10*time.Second)
			server.CLI(t, "nodes", "delete", "-i", server.Node(t, c.IPv4(t)).ID, "--force")
			stays.Await(t, "no peers", 5*time.Second, func(st *ipnstate.Status) bool { return len(st.Peer) == 0 })
		})
	}
}

// TestNodeDeletedWhileOffline deletes a node whose client does not run: it is
// told when it comes back, instead of asking in vain for ever or showing what it
// remembers, and a person can log it in again.
func TestNodeDeletedWhileOffline(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	user := server.User(t, "alice")
	key := server.Key(t, user, "--reusable")
	a := lab.Client(t, ClientConfig{Name: "a"})
	a.Up(t, server, key)
	a.Echo(t, 7000)
	for _, version := range Versions {
		t.Run(version, func(t *testing.T) {
			b := lab.Client(t, ClientConfig{Version: version})
			b.Up(t, server, key)
			a.AwaitPeers(t, 1)
			addr := b.IPv4(t)
			b.Kill()
			server.CLI(t, "nodes", "delete", "-i", server.Node(t, addr).ID, "--force")
			a.Await(t, "no peers", 5*time.Second, func(st *ipnstate.Status) bool { return len(st.Peer) == 0 })

			b.Start(t)
			_, took := b.Await(t, "a need to log in", 10*time.Second, needsLogin)
			t.Logf("told after %v", took.Round(time.Millisecond))
			page, wait := b.Login(t, server)
			server.CLI(t, "auth", "register", "--user", "alice", "--auth-id", path.Base(page))
			wait()
			a.AwaitPeers(t, 1)
			Meet(t, a, b)
			b.AwaitTCP(t, a.IPv4(t), 7000, 10*time.Second)
			server.CLI(t, "nodes", "delete", "-i", server.Node(t, b.IPv4(t)).ID, "--force")
			a.Await(t, "no peers", 5*time.Second, func(st *ipnstate.Status) bool { return len(st.Peer) == 0 })
		})
	}
}

// TestLogout logs a client out: its peers stop using it, and a new login of the
// same user on the machine gets the same node.
func TestLogout(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	a := lab.Client(t, ClientConfig{Name: "a"})
	b := lab.Client(t, ClientConfig{Name: "b", Version: Versions[1]})
	user := two(t, server, a, b)
	before := server.Node(t, b.IPv4(t))
	addr := b.IPv4(t)

	b.Tailscale(t, "logout")
	a.Await(t, "b expired and offline, or gone", 5*time.Second, func(st *ipnstate.Status) bool {
		p := Peer(st, addr)
		return p == nil || p.Expired && !p.Online
	})
	a.RefusedTCP(t, addr, 7000)

	b.Up(t, server, server.Key(t, user))
	after := server.Node(t, b.IPv4(t))
	if after.ID != before.ID || !slices.Equal(after.IPAddresses, before.IPAddresses) {
		t.Errorf("after the new login the node is %+v, before it was %+v", after, before)
	}
	a.AwaitPeers(t, 1)
	a.AwaitTCP(t, b.IPv4(t), 7000, 10*time.Second)
}

// TestKeyExpiry has an admin expire the key of a node: the client asks to log in,
// its peers see it as expired, and it becomes the same node again by a new key.
func TestKeyExpiry(t *testing.T) {
	for _, version := range Versions {
		t.Run(version, func(t *testing.T) {
			lab := Open(t)
			server := lab.Server(t, ServerConfig{})
			a := lab.Client(t, ClientConfig{Name: "a"})
			b := lab.Client(t, ClientConfig{Name: "b", Version: version})
			user := two(t, server, a, b)
			addr := b.IPv4(t)
			before := server.Node(t, addr)

			server.CLI(t, "nodes", "expire", "-i", before.ID)
			b.Await(t, "a need to log in", 5*time.Second, needsLogin)
			a.Await(t, "b expired and offline", 5*time.Second, func(st *ipnstate.Status) bool {
				p := Peer(st, addr)
				return p != nil && p.Expired && !p.Online
			})
			a.RefusedTCP(t, addr, 7000)

			b.Up(t, server, server.Key(t, user))
			a.Await(t, "b online with its address", 10*time.Second, func(st *ipnstate.Status) bool {
				p := Peer(st, addr)
				return p != nil && p.Online && !p.Expired
			})
			Meet(t, a, b)
			a.AwaitTCP(t, addr, 7000, 10*time.Second)
			after := server.Node(t, addr)
			if after.ID != before.ID || !slices.Equal(after.IPAddresses, before.IPAddresses) {
				t.Errorf("renewed node is %+v, before it was %+v", after, before)
			}
			if after.NodeKey == before.NodeKey {
				t.Error("the node key did not change")
			}
		})
	}
}

// TestRenewalKeepsConnections has a client take a new node key while its old one
// is valid: connections go on.
func TestRenewalKeepsConnections(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	a := lab.Client(t, ClientConfig{Name: "a"})
	b := lab.Client(t, ClientConfig{Name: "b"})
	user := two(t, server, a, b)
	addr := b.IPv4(t)
	before := server.Node(t, addr)
	b.Up(t, server, server.Key(t, user), "--force-reauth")
	after := server.Node(t, addr)
	if after.ID != before.ID || after.NodeKey == before.NodeKey {
		t.Errorf("renewed node is %+v, before it was %+v", after, before)
	}
	a.AwaitTCP(t, addr, 7000, 10*time.Second)
	b.AwaitTCP(t, a.IPv4(t), 7000, 10*time.Second)
}

// TestEphemeralLogout checks that an ephemeral node is gone when it logs out.
func TestEphemeralLogout(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	user := server.User(t, "alice")
	a := lab.Client(t, ClientConfig{Name: "a"})
	a.Up(t, server, server.Key(t, user))
	job := lab.Client(t, ClientConfig{Name: "job"})
	job.Up(t, server, server.Key(t, user, "--ephemeral"))
	a.AwaitPeers(t, 1)
	job.Tailscale(t, "logout")
	a.Await(t, "no peers", 5*time.Second, func(st *ipnstate.Status) bool { return len(st.Peer) == 0 })
	if nodes := server.Nodes(t); len(nodes) != 1 {
		t.Errorf("nodes are %+v, want one", nodes)
	}
}

// TestTags joins nodes with tags, by a key and by asking for them, and lets the
// policy speak of tags.
func TestTags(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	user := server.User(t, "alice")
	server.User(t, "bob")
	server.SetPolicy(t, `{
		"tagOwners": {"tag:web": ["alice@"], "tag:db": ["bob@"]},
		"acls": [
			{"action": "accept", "src": ["alice@"], "dst": ["tag:web:7000"]},
		],
	}`)
	a := lab.Client(t, ClientConfig{Name: "a"})
	a.Up(t, server, server.Key(t, user))
	byKey := lab.Client(t, ClientConfig{Name: "bykey", Version: Versions[0]})
	byKey.Up(t, server, server.Key(t, user, "--tags", "tag:web"))
	asked := lab.Client(t, ClientConfig{Name: "asked", Version: Versions[1]})
	asked.Up(t, server, server.Key(t, user), "--advertise-tags=tag:web")
	st := a.AwaitPeers(t, 2)
	for _, c := range []*Client{byKey, asked} {
		c.Echo(t, 7000)
		c.Echo(t, 7001)
		p := Peer(st, c.IPv4(t))
		if p == nil || p.Tags == nil || !slices.Equal(p.Tags.AsSlice(), []string{"tag:web"}) {
			t.Fatalf("a does not see %s with its tag:\n%s", c.Name, describe(st))
		}
		if n := server.Node(t, c.IPv4(t)); !slices.Equal(n.Tags, []string{"tag:web"}) || n.Expiry != nil {
			t.Errorf("%s is listed as %+v, want its tag and no expiry", c.Name, n)
		}
		Meet(t, a, c)
		a.AwaitTCP(t, c.IPv4(t), 7000, 10*time.Second)
		a.RefusedTCP(t, c.IPv4(t), 7001)
	}
	// The tag makes a node its own owner: its user's rules are not its own.
	byKey.RefusedTCP(t, asked.IPv4(t), 7000)

	refused := lab.Client(t, ClientConfig{Name: "refused"})
	out, err := refused.TryTailscale("up", "--login-server", server.URL, "--auth-key", server.Key(t, user), "--advertise-tags=tag:db", "--timeout=10s")
	if err == nil {
		t.Errorf("a tag of bob's was given to alice: %s", out)
	} else if !strings.Contains(err.Error(), "tag:db") {
		t.Errorf("the refusal does not name the tag: %v", err)
	}
}

// TestUserSwitch logs a second user in on the same machine, and goes back.
func TestUserSwitch(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	c := lab.Client(t, ClientConfig{Name: "shared"})
	c.Up(t, server, server.Key(t, server.User(t, "alice")))
	alice := c.IPv4(t)
	first := c.Status(t).Self.ID
	c.Tailscale(t, "login", "--login-server", server.URL, "--auth-key", server.Key(t, server.User(t, "bob")))
	c.Await(t, "another node's address", 10*time.Second, func(st *ipnstate.Status) bool {
		return st.BackendState == ipn.Running.String() && len(st.TailscaleIPs) > 0 && st.Self.ID != first
	})
	bob := c.IPv4(t)
	if bob == alice {
		t.Fatalf("both users' nodes have %v", bob)
	}
	if u, v := server.Node(t, alice).User.Name, server.Node(t, bob).User.Name; u != "alice" || v != "bob" {
		t.Errorf("the nodes belong to %q and %q", u, v)
	}
	switchTo(t, c, "alice")
	c.Await(t, "the first address", 15*time.Second, func(st *ipnstate.Status) bool {
		return st.BackendState == ipn.Running.String() && slices.Contains(st.TailscaleIPs, alice)
	})
	if n := server.Node(t, alice); tailcfg.StableNodeID(first) != c.Status(t).Self.ID || n.User.Name != "alice" {
		t.Errorf("back as %v of %q, want %v of alice", c.Status(t).Self.ID, n.User.Name, first)
	}
}

// switchTo activates the login profile of a user.
func switchTo(t *testing.T, c *Client, user string) {
	t.Helper()
	_, all, err := c.API.ProfileStatus(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		if strings.HasPrefix(p.UserProfile.LoginName, user) {
			if err := c.API.SwitchProfile(t.Context(), p.ID); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("no profile of %s among %+v", user, all)
}
