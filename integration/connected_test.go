package integration

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"testing"
	"time"

	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
)

// TestReconnectAfterTwoMinutes restarts servers whose clients have been
// connected for more than two minutes. From then on a client tries HTTPS on
// port 443 only, unless the URL is https anyway or http with a private address.
//
// The clients connect before the test becomes a parallel one, so the two
// minutes pass while other tests run.
func TestReconnectAfterTwoMinutes(t *testing.T) {
	lab := Open(t)
	const connected = 125 * time.Second
	type group struct {
		server  *Server
		clients []*Client
	}
	var groups []group
	for _, cfg := range []ServerConfig{{}, {TLS: true}} {
		g := group{server: lab.Server(t, cfg)}
		key := g.server.Key(t, g.server.User(t, "alice"), "--reusable")
		for _, version := range Versions {
			c := lab.Client(t, ClientConfig{Version: version, Env: g.server.Trust()})
			g.server.Introduce(t, c.Host)
			c.Up(t, g.server, key)
			g.clients = append(g.clients, c)
		}
		groups = append(groups, g)
	}
	since := time.Now()
	var vigils []*Vigil
	for _, g := range groups {
		for _, c := range g.clients {
			c.AwaitPeers(t, len(g.clients)-1)
			vigils = append(vigils, c.Vigil(t, "not running with all peers online", func(st *ipnstate.Status) bool {
				for _, p := range st.Peer {
					if !p.Online {
						return true
					}
				}
				return st.BackendState != ipn.Running.String() || len(st.Peer) != len(g.clients)-1
			}))
		}
	}
	t.Parallel()

	select {
	case <-time.After(connected - time.Since(since)):
	case <-t.Context().Done():
	}
	for _, v := range vigils {
		v.End(t)
	}
	for _, g := range groups {
		g.server.Kill()
	}
	for _, g := range groups {
		turnAway(t, g.server, g.clients)
		g.server.Start(t)
	}
	for _, g := range groups {
		t.Log("clients of", g.server.URL)
		comeBack(t, g.server, g.clients...)
		for _, c := range g.clients {
			c.AwaitPeers(t, len(g.clients)-1)
		}
	}
}

// turnAway takes the place of a server that was killed, and closes every
// connection until each of the clients has tried in vain.
func turnAway(t *testing.T, s *Server, clients []*Client) {
	t.Helper()
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	port := cmp.Or(u.Port(), "443")
	l, err := s.Listen(net.JoinHostPort(s.Addr.String(), port))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	missing := map[netip.Addr]string{}
	for _, c := range clients {
		missing[c.Addr] = c.Version
	}
	for len(missing) > 0 {
		conn, err := l.Accept()
		if err != nil {
			t.Fatalf("clients that did not try port %s: %v: %v", port, missing, err)
		}
		if from, err := netip.ParseAddrPort(conn.RemoteAddr().String()); err == nil {
			delete(missing, from.Addr().Unmap())
		}
		conn.Close()
	}
}

// TestEphemeralNodeIsRemoved lets an ephemeral client vanish without a word: it
// goes offline at once, and away after the time that was configured. Like the
// test above it mostly waits.
func TestEphemeralNodeIsRemoved(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{Env: []string{"SIGNALBOX_NODE_EPHEMERAL_INACTIVITY_TIMEOUT=66s"}})
	user := server.User(t, "alice")
	stays := lab.Client(t, ClientConfig{Name: "stays"})
	stays.Up(t, server, server.Key(t, user))
	lasting := lab.Client(t, ClientConfig{Name: "lasting"})
	lasting.Up(t, server, server.Key(t, user))
	job := lab.Client(t, ClientConfig{Name: "job"})
	job.Up(t, server, server.Key(t, user, "--ephemeral"))
	stays.AwaitPeers(t, 2)
	addr, other := job.IPv4(t), lasting.IPv4(t)
	job.Kill()
	lasting.Kill()
	killed := time.Now()
	gone := make(chan string, 1)
	go func() {
		st, took, err := stays.await(90*time.Second, func(st *ipnstate.Status) bool { return Peer(st, addr) == nil })
		switch {
		case err != nil:
			gone <- fmt.Sprintf("the ephemeral peer is still there after %v: %v\n%s", took, err, describe(st))
		case took < 60*time.Second:
			gone <- fmt.Sprintf("the ephemeral peer is gone after %v, before its time", time.Since(killed))
		}
		close(gone)
	}()
	t.Parallel()

	if wrong, bad := <-gone; bad {
		t.Fatal(wrong)
	}
	if p := Peer(stays.Status(t), other); p == nil || p.Online {
		t.Errorf("the lasting peer is %+v, want it offline", p)
	}
	for _, n := range server.Nodes(t) {
		if n.GivenName == "job" {
			t.Errorf("the server still lists %+v", n)
		}
	}
}
