package integration

import (
	"testing"
	"time"

	"tailscale.com/ipn/ipnstate"
)

// TestPresence kills a client: all others are told within three seconds. When
// it comes back they are told too, and only then.
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
	killed := time.Now()
	for _, c := range watchers {
		c.Await(t, "the victim offline", 3*time.Second-time.Since(killed), func(st *ipnstate.Status) bool {
			p := Peer(st, addr)
			return p != nil && !p.Online
		})
		t.Logf("%s was told after %v", c.Version, time.Since(killed).Round(time.Millisecond))
	}
	if n := server.Node(t, addr); n.Online {
		t.Error("the server still lists the victim as online")
	}

	var vigils []*Vigil
	victim.Start(t)
	victim.AwaitRunning(t)
	for _, c := range watchers {
		c.AwaitPeers(t, 3)
		vigils = append(vigils, c.Vigil(t, "somebody is offline", func(st *ipnstate.Status) bool {
			for _, p := range st.Peer {
				if !p.Online {
					return true
				}
			}
			return false
		}))
	}
	if n := server.Node(t, addr); !n.Online {
		t.Error("the server lists the victim as offline though it is back")
	}
	// A fifth client's coming and its orderly going are told without a word
	// about anybody else.
	guest := lab.Client(t, ClientConfig{Name: "guest"})
	guest.Up(t, server, server.Key(t, server.User(t, "bob")))
	for _, v := range vigils {
		v.End(t)
	}
}
