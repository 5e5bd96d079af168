package integration

import (
	"sync"
	"testing"
	"time"

	"tailscale.com/ipn/ipnstate"
)

// TestPresence kills a client: all others are told soon. The promise is three
// seconds, two of which are the server's grace; the test has more patience,
// since the machine may be busy with other tests. When the client comes back
// the others are told too, and only then. Then another one comes and goes in
// the orderly way, and nobody is told anything about anybody else.
func TestPresence(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	key := server.Key(t, server.User(t, "alice"), "--reusable")
	var watchers []*Client
	for _, version := range Versions {
		c := lab.Client(t, ClientConfig{Version: version})
		c.Up(t, server, key)
		watchers = append(watchers, c)
	}
	victim := lab.Client(t, ClientConfig{Name: "victim"})
	victim.Up(t, server, key)
	addr := victim.IPv4(t)
	for _, c := range watchers {
		c.AwaitPeers(t, 3)
	}

	victim.Kill()
	var told sync.WaitGroup
	for _, c := range watchers {
		told.Go(func() {
			st, took, err := c.await(10*time.Second, func(st *ipnstate.Status) bool {
				p := Peer(st, addr)
				return p != nil && !p.Online
			})
			if err != nil {
				t.Errorf("%s was not told within %v: %v\n%s", c.Version, took, err, describe(st))
				return
			}
			t.Logf("%s was told after %v", c.Version, took.Round(time.Millisecond))
		})
	}
	told.Wait()
	if t.Failed() {
		return
	}
	if n := server.Node(t, addr); n.Online {
		t.Error("the server still lists the victim as online")
	}

	var vigils []*Vigil
	victim.Start(t)
	victim.AwaitRunning(t)
	for _, c := range watchers {
		c.AwaitPeers(t, 3)
		vigils = append(vigils, c.Vigil(t, "somebody else than the guest is offline", func(st *ipnstate.Status) bool {
			for _, p := range st.Peer {
				if !p.Online && p.HostName != "guest" {
					return true
				}
			}
			return false
		}))
	}
	if n := server.Node(t, addr); !n.Online {
		t.Error("the server lists the victim as offline though it is back")
	}
	guest := lab.Client(t, ClientConfig{Name: "guest"})
	guest.Up(t, server, key)
	addr = guest.IPv4(t)
	for _, c := range watchers {
		c.AwaitPeers(t, 4)
	}
	guest.Tailscale(t, "down")
	for _, c := range watchers {
		c.Await(t, "the guest offline", 20*time.Second, func(st *ipnstate.Status) bool {
			p := Peer(st, addr)
			return p != nil && !p.Online
		})
	}
	for _, v := range vigils {
		v.End(t)
	}
}
