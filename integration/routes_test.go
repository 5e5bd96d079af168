package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"tailscale.com/ipn/ipnstate"
)

// greeting is the port on which a host says its name.
const greeting = 7080

// Greet answers each connection to a host with the host's name and the address
// that the connection comes from, until the test ends.
func (h *Host) Greet(t testing.TB) {
	t.Helper()
	l, err := h.Listen(fmt.Sprint(":", greeting))
	if err != nil {
		t.Fatalf("listen on %s: %v", h.Name, err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(conn, "%s %s", h.Name, conn.RemoteAddr())
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
}

// visit connects from this host and returns who answered and what address that
// host saw.
func (h *Host) visit(ctx context.Context, to netip.Addr) (name string, from netip.Addr, err error) {
	conn, err := h.Dial(ctx, "tcp", netip.AddrPortFrom(to, greeting).String())
	if err != nil {
		return "", from, err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		return "", from, err
	}
	name, source, _ := strings.Cut(string(answer), " ")
	seen, err := netip.ParseAddrPort(source)
	return name, seen.Addr(), err
}

// AwaitVisit connects until the host of the given name answers, and returns the
// address it saw and how long that took.
func (h *Host) AwaitVisit(t testing.TB, to netip.Addr, name string, within time.Duration) (from netip.Addr, took time.Duration) {
	t.Helper()
	took = probe(t, within, fmt.Sprintf("%s answers %s at %v", name, h.Name, to), func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
		defer cancel()
		got, seen, err := h.visit(ctx, to)
		if err == nil && got != name {
			err = fmt.Errorf("%s answers", got)
		}
		from = seen
		return err
	})
	return from, took
}

// AwaitClosed connects until nothing comes back any more.
func (h *Host) AwaitClosed(t testing.TB, to netip.Addr, within time.Duration) {
	t.Helper()
	probe(t, within, fmt.Sprintf("%s does not reach %v any more", h.Name, to), func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 1200*time.Millisecond)
		defer cancel()
		name, _, err := h.visit(ctx, to)
		var timeout net.Error
		switch {
		case err == nil:
			return fmt.Errorf("%s answers", name)
		case errors.As(err, &timeout) && timeout.Timeout():
			return nil
		}
		return err
	})
}

// Subnet puts a network behind a client, with one other machine on it that
// greets, and returns that machine. Several may have the same addresses.
func (l *Lab) Subnet(t testing.TB, router *Client, name string, prefix netip.Prefix) *Host {
	t.Helper()
	h, err := startHost(name, "")
	if err != nil {
		t.Fatalf("host %s: %v", name, err)
	}
	t.Cleanup(h.close)
	gateway := prefix.Addr().Next()
	h.Addr = gateway.Next()
	port := "lan-" + name
	if len(port) > 15 {
		t.Fatalf("%s is too long for an interface", port)
	}
	err = errors.Join(
		router.wire(port, h, "eth0"),
		router.script(fmt.Sprintf(`
			ip addr add %s/%d dev %s
			ip link set %[3]s up
			echo 1 > /proc/sys/net/ipv4/ip_forward
		`, gateway, prefix.Bits(), port)),
		h.script(fmt.Sprintf(`
			ip addr add %s/%d dev eth0
			ip link set eth0 up
			ip route add default via %s
		`, h.Addr, prefix.Bits(), gateway)),
	)
	if err != nil {
		t.Fatalf("network %s of %s: %v", name, router.Name, err)
	}
	h.Greet(t)
	return h
}

// Approve sets which routes of a client are approved.
func (s *Server) Approve(t testing.TB, c *Client, routes ...string) {
	t.Helper()
	s.CLI(t, "nodes", "approve-routes", "-i", s.Node(t, c.IPv4(t)).ID, "-r", strings.Join(routes, ","))
}

// routed reports whether a status lets packets for a prefix go to a peer.
func routed(st *ipnstate.Status, peer netip.Addr, prefix netip.Prefix) bool {
	p := Peer(st, peer)
	return p != nil && p.AllowedIPs != nil && slices.Contains(p.AllowedIPs.AsSlice(), prefix)
}

// AwaitRoute waits until the client sends packets for a prefix to another, or
// does not.
func (c *Client) AwaitRoute(t testing.TB, via *Client, prefix netip.Prefix, want bool, within time.Duration) time.Duration {
	t.Helper()
	addr := via.IPv4(t)
	_, took := c.Await(t, fmt.Sprintf("%v through %s: %v", prefix, via.Name, want), within, func(st *ipnstate.Status) bool {
		return routed(st, addr, prefix) == want
	})
	return took
}

// TestSubnetRouter reaches a machine behind a router after the route was
// approved and not before, by hand and by the policy, and not after it was
// withdrawn by either side.
func TestSubnetRouter(t *testing.T) {
	t.Parallel()
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	first, second := netip.MustParsePrefix("10.200.1.0/24"), netip.MustParsePrefix("10.200.2.0/24")
	policy := func(more string) string {
		return `{
			"tagOwners": {"tag:router": []},
			"acls": [{"action": "accept", "src": ["ann@"], "dst": ["tag:router:*", "10.200.0.0/16:7080"]}],
			` + more + `
		}`
	}
	user := server.User(t, "ann")
	server.SetPolicy(t, policy(""))
	router := lab.Client(t, ClientConfig{Name: "router", Version: Versions[1]})
	router.Up(t, server, server.Key(t, "", "--tags", "tag:router"), "--advertise-routes="+first.String())
	viewer := lab.Client(t, ClientConfig{Name: "viewer", Version: Versions[1]})
	viewer.Up(t, server, server.Key(t, user), "--accept-routes")
	printer := lab.Subnet(t, router, "printer", first)
	camera := lab.Subnet(t, router, "camera", second)
	viewer.AwaitPeers(t, 1)
	Meet(t, viewer, router)

	viewer.AwaitClosed(t, printer.Addr, 5*time.Second)
	if list := server.CLI(t, "nodes", "list-routes"); !strings.Contains(list, first.String()) {
		t.Errorf("an offered route is not listed:\n%s", list)
	}
	server.Approve(t, router, first.String())
	from, took := viewer.AwaitVisit(t, printer.Addr, "printer", 10*time.Second)
	t.Logf("reachable %v after the approval, as %v", took.Round(time.Millisecond), from)
	if !first.Contains(from) {
		t.Errorf("the printer is visited from %v, want the router's address on %v", from, first)
	}
	server.Approve(t, router)
	viewer.AwaitRoute(t, router, first, false, 5*time.Second)
	viewer.AwaitClosed(t, printer.Addr, 5*time.Second)

	// A policy approves what is offered and what will be, not its neighbours.
	server.SetPolicy(t, policy(`"autoApprovers": {"routes": {"10.200.2.0/23": ["tag:router"]}}`))
	router.Tailscale(t, "set", "--advertise-routes="+first.String()+","+second.String())
	_, took = viewer.AwaitVisit(t, camera.Addr, "camera", 10*time.Second)
	t.Logf("reachable %v after it was offered", took.Round(time.Millisecond))
	if st := viewer.Status(t); routed(st, router.IPv4(t), first) {
		t.Errorf("%v is routed, which nobody approved:\n%s", first, describe(st))
	}
	router.Tailscale(t, "set", "--advertise-routes=")
	viewer.AwaitRoute(t, router, second, false, 5*time.Second)
	viewer.AwaitClosed(t, camera.Addr, 5*time.Second)
}

// TestExitNode sends traffic for the internet through a client that offers it,
// after an approval and until it is taken back.
func TestExitNode(t *testing.T) {
	t.Parallel()
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	server.SetPolicy(t, `{"acls": [
		{"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:member:*", "autogroup:internet:*"]},
	]}`)
	key := server.Key(t, server.User(t, "ann"), "--reusable")
	exit := lab.Client(t, ClientConfig{Name: "exit", Version: Versions[1]})
	exit.Up(t, server, key, "--advertise-exit-node")
	viewer := lab.Client(t, ClientConfig{Name: "viewer", Version: Versions[1]})
	viewer.Up(t, server, key)
	viewer.AwaitPeers(t, 1)
	Meet(t, viewer, exit)

	// A site with a public address, to which both machines have a way of
	// their own. An exit node does not lead to its own private network.
	site := lab.Host(t, "site")
	public := netip.MustParseAddr("203.0.113.80")
	err := errors.Join(
		site.script(fmt.Sprintf("ip addr add %s/32 dev eth0", public)),
		viewer.script(fmt.Sprintf("ip route add %s via %s", public, site.Addr)),
		exit.script(fmt.Sprintf("ip route add %s via %s; echo 1 > /proc/sys/net/ipv4/ip_forward", public, site.Addr)),
	)
	if err != nil {
		t.Fatal(err)
	}
	site.Greet(t)
	if from, _ := viewer.AwaitVisit(t, public, "site", 5*time.Second); from != viewer.Addr {
		t.Fatalf("without an exit node the site is visited from %v, want %v", from, viewer.Addr)
	}
	if out, err := viewer.TryTailscale("set", "--exit-node="+exit.IPv4(t).String()); err == nil {
		t.Errorf("a client that is not approved can be chosen as an exit node: %s", out)
	}

	server.Approve(t, exit, "0.0.0.0/0")
	viewer.Await(t, "an exit node on offer", 5*time.Second, func(st *ipnstate.Status) bool {
		p := Peer(st, exit.IPv4(t))
		return p != nil && p.ExitNodeOption
	})
	viewer.Tailscale(t, "set", "--exit-node="+exit.IPv4(t).String())
	var from netip.Addr
	took := probe(t, 10*time.Second, "traffic leaves through the exit node", func(ctx context.Context) (err error) {
		ctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
		defer cancel()
		if _, from, err = viewer.visit(ctx, public); err == nil && from != exit.Addr {
			err = fmt.Errorf("the site is visited from %v, want %v", from, exit.Addr)
		}
		return err
	})
	t.Logf("through the exit node after %v", took.Round(time.Millisecond))
	if st := viewer.Status(t); st.ExitNodeStatus == nil || st.ExitNodeStatus.ID != exit.Status(t).Self.ID {
		t.Errorf("the client's exit node is %+v", st.ExitNodeStatus)
	}

	// Taken back, it leads nowhere; it does not leak out another way.
	server.Approve(t, exit)
	viewer.AwaitClosed(t, public, 5*time.Second)
	viewer.Tailscale(t, "set", "--exit-node=")
	if from, _ := viewer.AwaitVisit(t, public, "site", 5*time.Second); from != viewer.Addr {
		t.Errorf("back without an exit node the site is visited from %v, want %v", from, viewer.Addr)
	}
}

// routersOf joins a router of one prefix for each tag, each with a machine of
// its own behind it at the same address, and returns the machines' address.
func routersOf(t *testing.T, lab *Lab, server *Server, prefix netip.Prefix, tags ...string) (routers []*Client, behind netip.Addr) {
	t.Helper()
	for i, tag := range tags {
		c := lab.Client(t, ClientConfig{Name: fmt.Sprint("router", i+1), Version: Versions[1]})
		c.Up(t, server, server.Key(t, "", "--tags", tag), "--advertise-routes="+prefix.String())
		behind = lab.Subnet(t, c, fmt.Sprint("behind", i+1), prefix).Addr
		server.Approve(t, c, prefix.String())
		routers = append(routers, c)
	}
	return routers, behind
}

// TestViaSteersTwoViewers has grants with via send two people to the same
// address through two different routers, live changes included. When the router
// of one fails, another with its tag stands in.
func TestViaSteersTwoViewers(t *testing.T) {
	t.Parallel()
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	prefix := netip.MustParsePrefix("10.200.3.0/24")
	ann, ben := server.User(t, "ann"), server.User(t, "ben")
	policy := func(ann, ben string) string {
		return fmt.Sprintf(`{
			"tagOwners": {"tag:one": [], "tag:two": []},
			"grants": [
				{"src": ["ann@"], "dst": [%[1]q], "ip": ["tcp:7080"], "via": [%[2]q]},
				{"src": ["ben@"], "dst": [%[1]q], "ip": ["tcp:7080"], "via": [%[3]q]},
			],
		}`, prefix, ann, ben)
	}
	server.SetPolicy(t, policy("tag:one", "tag:two"))
	routers, behind := routersOf(t, lab, server, prefix, "tag:one", "tag:two", "tag:two")
	a := lab.Client(t, ClientConfig{Name: "a", Version: Versions[1]})
	a.Up(t, server, server.Key(t, ann), "--accept-routes")
	b := lab.Client(t, ClientConfig{Name: "b", Version: Versions[1]})
	b.Up(t, server, server.Key(t, ben), "--accept-routes")

	a.AwaitRoute(t, routers[0], prefix, true, 5*time.Second)
	b.AwaitRoute(t, routers[1], prefix, true, 5*time.Second)
	a.AwaitVisit(t, behind, "behind1", 15*time.Second)
	b.AwaitVisit(t, behind, "behind2", 15*time.Second)

	server.SetPolicy(t, policy("tag:two", "tag:one"))
	_, took := a.AwaitVisit(t, behind, "behind2", 15*time.Second)
	t.Logf("a goes the other way %v after the policy was stored", took.Round(time.Millisecond))
	b.AwaitVisit(t, behind, "behind1", 15*time.Second)

	server.SetPolicy(t, policy("tag:two", "tag:two"))
	b.AwaitVisit(t, behind, "behind2", 15*time.Second)
	a.AwaitVisit(t, behind, "behind2", 5*time.Second)

	server.SetPolicy(t, policy("tag:one", "tag:two"))
	a.AwaitVisit(t, behind, "behind1", 15*time.Second)
	b.AwaitVisit(t, behind, "behind2", 15*time.Second)
	routers[1].Kill()
	_, took = b.AwaitVisit(t, behind, "behind3", 15*time.Second)
	t.Logf("b goes through the other router of its tag %v after the first was killed", took.Round(time.Millisecond))
	a.AwaitVisit(t, behind, "behind1", 5*time.Second)
}

// TestPrimaryFailover kills the first of two routers: traffic goes through the
// second within seconds, and stays there when the first is back.
func TestPrimaryFailover(t *testing.T) {
	t.Parallel()
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	prefix := netip.MustParsePrefix("10.200.4.0/24")
	server.SetPolicy(t, `{
		"tagOwners": {"tag:router": []},
		"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
	}`)
	routers, behind := routersOf(t, lab, server, prefix, "tag:router", "tag:router")
	viewer := lab.Client(t, ClientConfig{Name: "viewer", Version: Versions[1]})
	viewer.Up(t, server, server.Key(t, server.User(t, "ann")), "--accept-routes")
	viewer.AwaitPeers(t, 2)
	Meet(t, viewer, routers[0])
	Meet(t, viewer, routers[1])
	viewer.AwaitVisit(t, behind, "behind1", 10*time.Second)
	if st := viewer.Status(t); routed(st, routers[1].IPv4(t), prefix) {
		t.Errorf("both routers have the prefix:\n%s", describe(st))
	}

	second := routers[1].IPv4(t)
	routers[0].Kill()
	_, took := viewer.AwaitVisit(t, behind, "behind2", 15*time.Second)
	t.Logf("through the second router %v after the first was killed", took.Round(time.Millisecond))
	if took > 8*time.Second {
		t.Errorf("the second router took over after %v", took)
	}

	back := viewer.Vigil(t, "the prefix left the second router", func(st *ipnstate.Status) bool { return !routed(st, second, prefix) })
	routers[0].Start(t)
	routers[0].AwaitRunning(t)
	viewer.AwaitPeers(t, 2)
	Meet(t, viewer, routers[0])
	viewer.AwaitVisit(t, behind, "behind2", 5*time.Second)
	back.End(t)

	// The second one's turn to fail: the first stands in again.
	routers[1].Kill()
	_, took = viewer.AwaitVisit(t, behind, "behind1", 15*time.Second)
	t.Logf("through the first router %v after the second was killed", took.Round(time.Millisecond))
}
