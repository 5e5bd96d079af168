package integration

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"tailscale.com/ipn/ipnstate"
)

// pause freezes tailscaled: its connections stay open and nothing answers.
func (c *Client) pause(t testing.TB) { c.send(t, syscall.SIGSTOP) }

// resume lets tailscaled go on.
func (c *Client) resume(t testing.TB) { c.send(t, syscall.SIGCONT) }

func (c *Client) send(t testing.TB, sig syscall.Signal) {
	t.Helper()
	if err := c.proc.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// TestCallsAcrossServers calls stock clients from the server that holds their
// stream and from the other one.
func TestCallsAcrossServers(t *testing.T) {
	t.Parallel()
	x := newSite(t)
	key := x.a.Key(t, x.a.User(t, "alice"), "--reusable")
	a := x.client(t, ClientConfig{Name: "at-a", Version: Versions[1]}, x.a)
	b := x.client(t, ClientConfig{Name: "at-b", Version: Versions[1]}, x.b)
	a.Up(t, x.a, key)
	b.Up(t, x.b, key)
	a.AwaitPeers(t, 1)
	b.AwaitPeers(t, 1)
	Meet(t, a, b)
	peers := map[*Client]*Client{a: b, b: a}
	holder := map[*Client]*Server{a: x.a, b: x.b}
	for _, s := range []*Server{x.a, x.b} {
		for c, peer := range peers {
			id := s.Node(t, c.IPv4(t)).ID
			if out := s.CLI(t, "nodes", "ping", id); !strings.Contains(out, "answers in") {
				t.Errorf("%s at %s: %s", c.Name, s.Name, out)
			}
			if s == holder[c] {
				continue
			}
			for _, by := range []string{"disco", "TSMP", "ICMP", "peerapi"} {
				p := decode[struct {
					Type, NodeName, Endpoint string
					Seconds                  float64
					IP                       netip.Addr
				}](t, s.CLI(t, "nodes", "ping", id, "--peer", peer.IPv4(t).String(), "--type", by, "-o", "json"))
				if p.Type != by || p.IP != peer.IPv4(t) || p.Seconds <= 0 || by == "disco" && p.NodeName != peer.Name {
					t.Errorf("%s at %s pings by %s: %+v", c.Name, s.Name, by, p)
				}
			}
			for path, want := range map[string]string{"/debug/metrics": "# TYPE", "/debug/health": "{"} {
				if out := s.CLI(t, "debug", "c2n", id, path); !strings.Contains(out, want) {
					t.Errorf("%s of %s at %s is %.200q", path, c.Name, s.Name, out)
				}
			}
			if out, err := s.TryCLI("nodes", "ping", id, "--peer", "100.127.1.1"); err == nil || !strings.Contains(err.Error(), "no matching peer") {
				t.Errorf("a ping of nobody: %s %v", out, err)
			}
		}
	}
	// What was answered came through the connections that were there.
	if n := strings.Count(a.log.String(), "PING error") + strings.Count(a.log.String(), "answerC2NPing error"); n > 0 {
		t.Errorf("the client complains %d times", n)
	}
	id := x.a.Node(t, b.IPv4(t)).ID
	b.pause(t)
	out, err := x.a.TryCLI("nodes", "ping", id)
	if err == nil || !strings.Contains(err.Error(), "did not answer in time") {
		t.Errorf("a client that hangs: %s %v", out, err)
	}
	b.resume(t)
	if out := x.a.CLI(t, "nodes", "ping", id); !strings.Contains(out, "answers in") {
		t.Errorf("a client that goes on: %s", out)
	}
	audit := x.b.CLI(t, "audit", "-n", "100", "-o", "json")
	if n := strings.Count(audit, `"node.ping"`); n < 15 {
		t.Errorf("%d pings are in the audit log", n)
	}
}

// TestFrozenRouter freezes the first of two routers, each at a server of its
// own: the second takes over, though the connection of the first is open.
func TestFrozenRouter(t *testing.T) {
	t.Parallel()
	x := newSite(t, "SIGNALBOX_NODE_ROUTES_HA_PROBE_INTERVAL=5s")
	prefix := netip.MustParsePrefix("10.200.5.0/24")
	x.a.SetPolicy(t, `{
		"tagOwners": {"tag:router": []},
		"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
	}`)
	var routers []*Client
	var behind netip.Addr
	for i, s := range []*Server{x.b, x.a} {
		c := x.client(t, ClientConfig{Name: fmt.Sprint("router", i+1), Version: Versions[1]}, s)
		c.Up(t, s, s.Key(t, "", "--tags", "tag:router"), "--advertise-routes="+prefix.String())
		behind = x.lab.Subnet(t, c, fmt.Sprint("behind", i+1), prefix).Addr
		s.Approve(t, c, prefix.String())
		routers = append(routers, c)
	}
	viewer := x.client(t, ClientConfig{Name: "viewer", Version: Versions[1]}, x.a)
	viewer.Up(t, x.a, x.a.Key(t, x.a.User(t, "ann")), "--accept-routes")
	viewer.AwaitPeers(t, 2)
	for _, r := range routers {
		Meet(t, viewer, r)
	}
	viewer.AwaitVisit(t, behind, "behind1", 15*time.Second)

	second := routers[1].IPv4(t)
	routers[0].pause(t)
	_, took := viewer.AwaitVisit(t, behind, "behind2", 45*time.Second)
	t.Logf("through the second router %v after the first was frozen", took.Round(time.Millisecond))
	if st := viewer.Status(t); !peerOnline(st, routers[0]) {
		t.Errorf("the frozen router is offline: this was not a matter of probes\n%s", describe(st))
	}

	stays := viewer.Vigil(t, "the prefix left the second router", func(st *ipnstate.Status) bool { return !routed(st, second, prefix) })
	routers[0].resume(t)
	probe(t, 30*time.Second, "the first router is well again", func(ctx context.Context) error {
		if !strings.Contains(x.a.CLI(t, "audit", "-n", "50", "-o", "json"), `"node.healthy"`) {
			return errors.New("it is not in the audit log")
		}
		return nil
	})
	viewer.AwaitVisit(t, behind, "behind2", 5*time.Second)
	stays.End(t)

	// It is eligible again.
	routers[1].pause(t)
	_, took = viewer.AwaitVisit(t, behind, "behind1", 45*time.Second)
	t.Logf("through the first router %v after the second was frozen", took.Round(time.Millisecond))
}
