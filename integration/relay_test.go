package integration

import (
	"context"
	"net/url"
	"testing"
	"time"
)

// relayed checks that two clients talk both ways, by packets that go through
// the server's own relay.
func relayed(t *testing.T, server *Server, a, b *Client) {
	t.Helper()
	a.AwaitPeers(t, 1)
	b.AwaitPeers(t, 1)
	for _, pair := range [][2]*Client{{a, b}, {b, a}} {
		from, to := pair[0], pair[1]
		ownRelays(t, server, from)
		from.PingRelayed(t, to, to.Status(t).Self.Relay)
		from.Ping(t, to.IPv4(t))
		from.Ping(t, to.IPv6(t))
		from.AwaitTCP(t, to.IPv4(t), 7000, 10*time.Second)
	}
}

// ownRelays checks that a client knows no relay but the server.
func ownRelays(t *testing.T, server *Server, c *Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	m, err := c.API.CurrentDERPMap(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Regions) == 0 {
		t.Errorf("%s knows no relay", c.Name)
	}
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range m.Regions {
		for _, n := range r.Nodes {
			if n.HostName != u.Hostname() {
				t.Errorf("%s knows a relay at %q, want only the server's at %q", c.Name, n.HostName, u.Hostname())
			}
		}
	}
}

// pair joins two clients of one user.
func pair(t *testing.T, server *Server, a, b *Client) {
	t.Helper()
	key := server.Key(t, server.User(t, "alice"), "--reusable")
	for _, c := range []*Client{a, b} {
		server.Introduce(t, c.Host)
		c.Up(t, server, key)
		c.Echo(t, 7000)
	}
}

// TestRelayWithoutUDP joins two clients whose networks carry no UDP. Nothing
// but the zero-configuration server with its pinned certificate is there.
func TestRelayWithoutUDP(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	a := lab.Client(t, ClientConfig{Version: Versions[1], NoUDP: true})
	b := lab.Client(t, ClientConfig{Version: Versions[2], NoUDP: true})
	pair(t, server, a, b)
	relayed(t, server, a, b)
}

// TestRelayWithTrustedCertificate does the same on a server that has a name and
// a certificate, where the oldest client relays too.
func TestRelayWithTrustedCertificate(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{TLS: true})
	a := lab.Client(t, ClientConfig{Version: Versions[0], NoUDP: true, Env: server.Trust()})
	b := lab.Client(t, ClientConfig{Version: Versions[2], NoUDP: true, Env: server.Trust()})
	pair(t, server, a, b)
	relayed(t, server, a, b)
}

// TestEasyNATsFindDirectPath puts both clients behind routers that keep a
// socket's outer port, so that the STUN answer is worth something.
func TestEasyNATsFindDirectPath(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	a := lab.Client(t, ClientConfig{Name: "a", NAT: EasyNAT})
	b := lab.Client(t, ClientConfig{Name: "b", NAT: EasyNAT, Version: Versions[1]})
	pair(t, server, a, b)
	a.AwaitPeers(t, 1)
	via := a.PingDirect(t, b)
	if !network.Contains(via.Addr()) {
		t.Errorf("the direct path goes to %v, want the outer side of b's router", via)
	}
	a.AwaitTCP(t, b.IPv4(t), 7000, 10*time.Second)
	b.AwaitTCP(t, a.IPv4(t), 7000, 10*time.Second)
}

// TestHardNATsAreRelayed puts both clients behind routers that take a new port
// for every destination: they can only meet at the relay.
func TestHardNATsAreRelayed(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	a := lab.Client(t, ClientConfig{Name: "a", NAT: HardNAT})
	b := lab.Client(t, ClientConfig{Name: "b", NAT: HardNAT, Version: Versions[1]})
	pair(t, server, a, b)
	relayed(t, server, a, b)
}

// TestClientsTellNATsApart checks that clients of each version know whether
// their router takes a new port for every destination, for which they need two
// STUN answers.
func TestClientsTellNATsApart(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	key := server.Key(t, "admin", "--reusable")
	for _, version := range Versions {
		for nat, want := range map[NAT]bool{EasyNAT: false, HardNAT: true} {
			c := lab.Client(t, ClientConfig{Version: version, NAT: nat})
			c.Up(t, server, key)
			out := c.Tailscale(t, "netcheck", "--format=json")
			report := decode[struct {
				UDP                   bool
				MappingVariesByDestIP *bool
			}](t, out)
			if !report.UDP || report.MappingVariesByDestIP == nil || *report.MappingVariesByDestIP != want {
				t.Errorf("%s, mapping varies %v: netcheck says %s", version, want, out)
			}
		}
	}
}
