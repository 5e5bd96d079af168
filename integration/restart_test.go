package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"tailscale.com/ipn/ipnstate"
)

// TestKillServer kills the server under load and starts it again: connections
// between clients never stop, nobody is shown offline, and a new client joins
// and is seen by all, which they learn only from the new server.
func TestKillServer(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	server.SetPolicy(t, everything)
	key := server.Key(t, server.User(t, "alice"), "--reusable")
	a := lab.Client(t, ClientConfig{Name: "a", Version: Versions[1]})
	b := lab.Client(t, ClientConfig{Name: "b", Version: Versions[2]})
	for _, c := range []*Client{a, b} {
		c.Up(t, server, key)
		c.Echo(t, 7000)
	}
	a.AwaitPeers(t, 1)
	b.AwaitPeers(t, 1)
	a.PingDirect(t, b)
	flow := a.Flow(t, b.IPv4(t), 7000)
	offline := []*Vigil{
		a.Vigil(t, "b is offline or gone", func(st *ipnstate.Status) bool { return !online(st, b) }),
		b.Vigil(t, "a is offline or gone", func(st *ipnstate.Status) bool { return !online(st, a) }),
	}

	server.Kill()
	a.AwaitTCP(t, b.IPv4(t), 7000, 5*time.Second) // new ones need no server either
	server.Start(t)
	for _, n := range server.Nodes(t) {
		if !n.Online {
			t.Errorf("the new server says at once that %s is offline", n.GivenName)
		}
	}
	c := lab.Client(t, ClientConfig{Name: "c", Version: Versions[0]})
	c.Up(t, server, key)
	c.Echo(t, 7000)
	start := time.Now()
	for _, old := range []*Client{a, b} {
		old.Await(t, "c as a peer", 60*time.Second, func(st *ipnstate.Status) bool { return online(st, c) })
		t.Logf("%s sees the new client %v after it joined", old.Name, time.Since(start).Round(time.Millisecond))
	}
	for _, to := range []*Client{a, b} {
		Meet(t, c, to)
		c.AwaitTCP(t, to.IPv4(t), 7000, 20*time.Second)
		to.AwaitTCP(t, c.IPv4(t), 7000, 20*time.Second)
	}
	flow.Unbroken(t, 2*time.Second)
	for _, v := range offline {
		v.End(t)
	}
}

// online says whether a status has another client as a peer that is online.
func online(st *ipnstate.Status, c *Client) bool {
	for _, p := range st.Peer {
		if p.HostName == c.Name {
			return p.Online
		}
	}
	return false
}

// TestOrderlyRestart stops the server with SIGTERM and starts it again. Nobody
// is shown offline, and every client comes back.
func TestOrderlyRestart(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	key := server.Key(t, server.User(t, "alice"), "--reusable")
	a := lab.Client(t, ClientConfig{Name: "a", Version: Versions[2]})
	b := lab.Client(t, ClientConfig{Name: "b", Version: Versions[0]})
	for _, c := range []*Client{a, b} {
		c.Up(t, server, key)
	}
	a.AwaitPeers(t, 1)
	b.AwaitPeers(t, 1)
	vigil := a.Vigil(t, "b is offline or gone", func(st *ipnstate.Status) bool { return !online(st, b) })
	server.Stop(t)
	server.Start(t)
	comeBack(t, server, a, b)
	vigil.End(t)
}

// comeBack waits until clients have heard from the server again: each gets a
// new name, which it learns only from a live stream.
func comeBack(t *testing.T, server *Server, clients ...*Client) {
	t.Helper()
	start := time.Now()
	for i, c := range clients {
		name := fmt.Sprintf("back-%d", i)
		server.CLI(t, "nodes", "rename", "-i", server.Node(t, c.IPv4(t)).ID, name)
		c.Await(t, "the name "+name, 60*time.Second, func(st *ipnstate.Status) bool {
			return st.Self != nil && strings.HasPrefix(st.Self.DNSName, name+".")
		})
		t.Logf("%s came back %v after the start", c.Version, time.Since(start).Round(time.Millisecond))
	}
}
