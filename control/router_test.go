package control_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control"
	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

const sharedRoute = "10.1.2.0/24"

// unprobed leaves the rounds of probes to the test.
func unprobed(c *control.Config) {
	c.Grace, c.ProbeInterval, c.CallTimeout = 100*time.Millisecond, -1, controltest.Patience
}

// a router and its stream.
type served struct {
	*controltest.Client
	*controltest.Stream
	at               *controltest.Server
	pinged, answered int // ping requests that round has seen, and answers
}

// serves joins a router of the shared route at one of the servers.
func (g *rig) serves(name string, at *controltest.Server) *served {
	g.Helper()
	c := g.router(name, sharedRoute)
	at.WaitNode(c.ID(), "approval", func(n *tailnet.Node) bool { return n != nil && len(n.ApprovedRoutes) == 1 })
	return g.poll(c, at)
}

// poll opens the stream of a router. That it has answered a call shows that it has its map and that the server knows that.
func (g *rig) poll(c *controltest.Client, at *controltest.Server) *served {
	g.Helper()
	r := &served{Client: c, Stream: c.On(at).Poll(), at: at, pinged: 1, answered: 1}
	for _, s := range []*controltest.Server{g.Server, at} {
		s.WaitNode(c.ID(), "its stream", func(n *tailnet.Node) bool { return n.State.Online })
	}
	if _, err := at.C2N.Echo(g.Context(), c.ID()); err != nil {
		g.Fatal(err)
	}
	r.WaitAnswers(1)
	return r
}

// round probes the routers of a server. It is over for those that do not answer when all that do have: no clock decides.
func round(t *testing.T, s *controltest.Server, silent, answer []*served) {
	t.Helper()
	ctx, end := context.WithCancel(s.Context())
	over := make(chan struct{})
	go func() {
		defer close(over)
		s.ProbeRouters(s.Context(), ctx)
	}()
	for _, r := range append(append([]*served{}, silent...), answer...) {
		r.pinged++
		n := 0
		r.Message(fmt.Sprintf("probe %d", r.pinged), func(m *tailcfg.MapResponse) bool {
			if m.PingRequest != nil {
				n++
			}
			return n == r.pinged
		})
	}
	if len(silent) > 0 {
		for _, r := range answer {
			r.WaitAnswers(r.answered + 1)
		}
		end()
	}
	<-over
	end()
	for _, r := range answer {
		r.answered++
	}
}

func (g *rig) primary() tailcfg.NodeID {
	for p, id := range g.Replica.Current().Access().Primaries() {
		if p.String() == sharedRoute {
			return id
		}
	}
	return 0
}

// audited counts the events of an action.
func (g *rig) audited(action string, id tailcfg.NodeID) (n int) {
	g.Helper()
	err := g.Store.View(g.Context(), func(r *db.Reader) error {
		list, err := r.In(g.Tailnet).AuditEvents(0, 1000)
		for _, e := range list {
			if e.Action == action && e.Target == fmt.Sprintf("node:%d", id) {
				n++
			}
		}
		return err
	})
	if err != nil {
		g.Fatal(err)
	}
	return n
}

// testSilentRouter has the first of two routers fall silent and answer again.
func testSilentRouter(t *testing.T, g *rig, a, b *served) {
	viewer := g.join("viewer").Poll()
	through := func(name string) {
		t.Helper()
		viewer.Wait("the route through "+name, func(v *controltest.View) bool { return allowed(v.Peer(name), sharedRoute) })
	}
	rounds := func(silent, answer []*served) {
		t.Helper()
		for _, s := range []*controltest.Server{a.at, b.at} {
			here := func(list []*served) (out []*served) {
				for _, r := range list {
					if r.at == s {
						out = append(out, r)
					}
				}
				return out
			}
			if s == a.at || a.at != b.at {
				round(t, s, here(silent), here(answer))
			}
			if a.at == b.at {
				return
			}
		}
	}
	unhealthy := func(r *served, want bool) {
		t.Helper()
		for _, s := range []*controltest.Server{a.at, b.at} {
			s.WaitNode(r.ID(), fmt.Sprint("unhealthy: ", want), func(n *tailnet.Node) bool { return n.State.Unhealthy == want })
		}
	}
	through("a")
	rounds(nil, []*served{a, b})
	a.Silence(true)
	rounds([]*served{a}, []*served{b})
	if n := g.audited("node.unhealthy", a.ID()); n != 0 || g.primary() != a.ID() {
		t.Errorf("after one miss: %d audit events, primary %d", n, g.primary())
	}
	rounds([]*served{a}, []*served{b})
	unhealthy(a, true)
	through("b")
	rounds([]*served{a}, []*served{b}) // no news
	a.Silence(false)
	rounds(nil, []*served{a, b})
	unhealthy(a, false)
	g.WaitTick()
	if g.primary() != b.ID() {
		t.Errorf("the route went back to %d without need", g.primary())
	}
	// The other one's turn.
	b.Silence(true)
	rounds([]*served{b}, []*served{a})
	rounds([]*served{b}, []*served{a})
	unhealthy(b, true)
	through("a")
	for r, want := range map[*served][2]int{a: {1, 1}, b: {1, 0}} {
		if down, up := g.audited("node.unhealthy", r.ID()), g.audited("node.healthy", r.ID()); down != want[0] || up != want[1] {
			t.Errorf("node %d: %d and %d audit events, want %v", r.ID(), down, up, want)
		}
	}
	// Silent together, none is better than the other.
	a.Silence(true)
	rounds([]*served{a, b}, nil)
	rounds([]*served{a, b}, nil)
	unhealthy(a, true)
	g.WaitTick()
	if g.primary() != a.ID() {
		t.Errorf("of two silent routers %d took over", g.primary())
	}
}

func TestSilentRouterLosesItsRoute(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Policy: routePolicy, Change: unprobed})
	testSilentRouter(t, g, g.serves("a", g.Server), g.serves("b", g.Server))
}

func TestSilentRouterAtAnotherServer(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Policy: routePolicy, Change: unprobed})
	other := g.Beside("other", g.Clock)
	a, b := g.serves("a", other), g.serves("b", g.Server)
	other.WaitNode(b.ID(), "the other router", func(n *tailnet.Node) bool { return n != nil && n.State.Online && len(n.ApprovedRoutes) == 1 })
	testSilentRouter(t, g, a, b)
}

func TestOnlySharedRoutesAreProbed(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Policy: routePolicy, Change: unprobed})
	a := g.serves("a", g.Server)
	lone, exit := g.router("lone", "10.1.9.0/24", sharedRoute), g.router("exit", "0.0.0.0/0", "::/0")
	exits := []*controltest.Stream{exit.Poll(), g.router("exit2", "0.0.0.0/0", "::/0").Poll()}
	for _, c := range []*controltest.Client{lone, exit} {
		g.WaitNode(c.ID(), "approval", func(n *tailnet.Node) bool { return len(n.ApprovedRoutes) == 2 })
	}
	round(t, g.Server, nil, nil) // the other router of the route is offline
	b := g.poll(lone, g.Server)
	b.Silence(true)
	for range 2 {
		round(t, g.Server, []*served{b}, []*served{a})
	}
	g.WaitNode(b.ID(), "silence", func(n *tailnet.Node) bool { return n.State.Unhealthy })
	for _, st := range exits {
		messages, _ := st.Messages()
		for _, m := range messages {
			if m.PingRequest != nil {
				t.Error("an exit node was probed")
			}
		}
	}
	messages, _ := a.Messages()
	n := 0
	for _, m := range messages {
		if m.PingRequest != nil {
			n++
		}
	}
	if n != a.pinged {
		t.Errorf("%d pings, want %d: the first round had nothing to compare with", n, a.pinged)
	}
	// Nothing is shared any more: nobody would see the router come back, so its health is open again.
	a.Stream.Close()
	g.WaitNode(a.ID(), "the end of its stream", func(n *tailnet.Node) bool { return !n.State.Online })
	round(t, g.Server, nil, nil)
	g.WaitNode(b.ID(), "health", func(n *tailnet.Node) bool { return !n.State.Unhealthy })
}

// TestProbesRun has the server itself find the silent one of two routers.
func TestProbesRun(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Policy: routePolicy, Change: func(c *control.Config) {
		c.Grace, c.ProbeInterval, c.ProbeTimeout = 100*time.Millisecond, 20*time.Millisecond, 200*time.Millisecond
	}})
	a, _ := g.serves("a", g.Server), g.serves("b", g.Server)
	a.Silence(true)
	g.WaitNode(a.ID(), "silence", func(n *tailnet.Node) bool { return n.State.Unhealthy })
	a.Silence(false)
	g.WaitNode(a.ID(), "an answer", func(n *tailnet.Node) bool { return !n.State.Unhealthy })
}
