package c2n_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control"
	"github.com/signalbox-net/signalbox/control/c2n"
	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// patient is for calls that are answered.
func patient(c *control.Config) { c.Grace, c.CallTimeout = 100*time.Millisecond, controltest.Patience }

// hasty is for calls that are not.
func hasty(c *control.Config) { c.Grace, c.CallTimeout = 100*time.Millisecond, 50*time.Millisecond }

type rig struct {
	*controltest.Server
	key string
}

func start(t *testing.T, change func(*control.Config)) *rig {
	t.Helper()
	s := controltest.Start(t, controltest.Options{Change: change})
	return &rig{s, s.AuthKey(db.AuthKey{User: s.User("alice"), Reusable: true})}
}

// join is a node whose stream has its first map.
func (g *rig) join(c *controltest.Client, at *controltest.Server) *controltest.Stream {
	g.Helper()
	c.Join(g.key)
	at.WaitNode(c.ID(), "the joined node", func(n *tailnet.Node) bool { return n != nil })
	st := c.On(at).Poll()
	st.Wait("its map", func(v *controltest.View) bool { return v.Node != nil })
	for _, s := range []*controltest.Server{g.Server, at} {
		s.WaitNode(c.ID(), "its stream", func(n *tailnet.Node) bool { return n.State.Online })
	}
	return st
}

func (g *rig) client(name string) *controltest.Client {
	c := g.NewClient(name)
	c.Host = "control.mesh.test:8443"
	return c
}

// stored is whether mail waits for one of the servers.
func (g *rig) stored() bool {
	g.Helper()
	waits := false
	err := g.Store.View(g.Context(), func(r *db.Reader) error {
		list, err := r.Instances()
		for _, i := range list {
			has, hasErr := r.In(g.Tailnet).HasMail(i.ID)
			waits, err = waits || has, errors.Join(err, hasErr)
		}
		return err
	})
	if err != nil {
		g.Fatal(err)
	}
	return waits
}

// each runs f for a node at the server that is asked, and for one at another server.
func each(t *testing.T, change func(*control.Config), f func(g *rig, at *controltest.Server)) {
	t.Run("here", func(t *testing.T) {
		t.Parallel()
		g := start(t, change)
		f(g, g.Server)
	})
	t.Run("elsewhere", func(t *testing.T) {
		t.Parallel()
		g := start(t, change)
		f(g, g.Beside("other", g.Clock))
		if g.stored() {
			t.Error("mail is left")
		}
	})
}

func TestCalls(t *testing.T) {
	t.Parallel()
	each(t, patient, func(g *rig, at *controltest.Server) {
		a, b := g.client("a"), g.client("b")
		st := g.join(a, at)
		peer := g.join(b, g.Server)
		st.Wait("the peer online", func(v *controltest.View) bool {
			p := v.Peer("b")
			return p != nil && p.Online != nil && *p.Online
		})
		ctx := g.Context()
		if took, err := g.C2N.Echo(ctx, a.ID()); err != nil || took <= 0 {
			g.Errorf("echo: %v, %v", took, err)
		}
		if res, err := g.C2N.Get(ctx, a.ID(), "/debug/metrics"); err != nil || res.Status != 200 || string(res.Body) != "magicsock_netcheck 1\n" || res.ContentType == "" || res.Elapsed <= 0 {
			g.Errorf("metrics: %+v, %v", res, err)
		}
		if res, err := g.C2N.Get(ctx, a.ID(), "/debug/health"); err != nil || res.Status != 400 {
			g.Errorf("a path that the node does not know: %+v, %v", res, err)
		}
		ip := g.Replica.Current().Node(b.ID()).IPv4
		for _, by := range c2n.PingTypes {
			res, err := g.C2N.Ping(ctx, a.ID(), ip, by)
			if err != nil || res.Type != by || res.NodeName != "b" || res.LatencySeconds <= 0 || res.Err != "" {
				g.Errorf("ping by %s: %+v, %v", by, res, err)
			}
		}
		if res, err := g.C2N.Ping(ctx, a.ID(), netip.MustParseAddr("100.100.1.1"), tailcfg.PingDisco); err != nil || res.Err == "" {
			g.Errorf("ping of nobody: %+v, %v", res, err)
		}
		seen := map[string]bool{}
		for _, answer := range st.WaitAnswers(4 + len(c2n.PingTypes)) {
			if answer.Status != 200 || seen[answer.Ping.URL] {
				g.Errorf("the answer to %+v got status %d", answer.Ping, answer.Status)
			}
			seen[answer.Ping.URL] = true
		}
		if _, err := g.C2N.Get(ctx, a.ID(), "/debug/prefs"); err != c2n.ErrPath {
			g.Errorf("a path that is not in the list: %v", err)
		}
		if peer.Ended() {
			g.Error("the peer's stream ended")
		}
	})
}

func TestNoAnswer(t *testing.T) {
	t.Parallel()
	each(t, hasty, func(g *rig, at *controltest.Server) {
		a := g.client("a")
		st := g.join(a, at)
		st.Silence(true)
		if _, err := g.C2N.Echo(g.Context(), a.ID()); !errors.Is(err, c2n.ErrTimeout) {
			g.Errorf("a silent node: %v", err)
		}
		if _, err := g.C2N.Echo(g.Context(), 4711); !errors.Is(err, c2n.ErrUnknownNode) {
			g.Errorf("a node that does not exist: %v", err)
		}
		never := g.client("never").Join(g.key)
		if _, err := g.C2N.Echo(g.Context(), never.ID()); !errors.Is(err, c2n.ErrOffline) {
			g.Errorf("a node that never came: %v", err)
		}
		st.Close()
		g.WaitNode(a.ID(), "its end", func(n *tailnet.Node) bool { return !n.State.Online })
		if _, err := g.C2N.Echo(g.Context(), a.ID()); !errors.Is(err, c2n.ErrOffline) {
			g.Errorf("a node that left: %v", err)
		}
		gone, cancel := context.WithCancel(g.Context())
		cancel()
		b := g.client("b")
		g.join(b, at)
		if _, err := g.C2N.Echo(gone, b.ID()); !errors.Is(err, context.Canceled) {
			g.Errorf("a call of somebody who is gone: %v", err)
		}
	})
}

// held begins a call to a silent node and returns the address at which its answer is wanted, and what the call came to.
func held(g *rig, st *controltest.Stream, call func() error) (path string, result <-chan error) {
	g.Helper()
	st.Silence(true)
	done := make(chan error, 1)
	before, _ := st.Messages()
	go func() { done <- call() }()
	n := 0
	p := st.Message("a ping request", func(m *tailcfg.MapResponse) bool { n++; return n > len(before) && m.PingRequest != nil }).PingRequest
	u, err := url.Parse(p.URL)
	if err != nil || u.Host != "control.mesh.test:8443" || !strings.HasPrefix(u.Path, c2n.Path) || len(u.Path) < len(c2n.Path)+43 {
		g.Fatalf("the address is %q", p.URL)
	}
	return u.Path, done
}

// wait is what the call came to.
func wait(g *rig, result <-chan error) error {
	g.Helper()
	select {
	case err := <-result:
		return err
	case <-time.After(2 * controltest.Patience):
		g.Fatal("the call does not end")
		return nil
	}
}

func TestOnlyTheNodeItselfAnswersAndOnce(t *testing.T) {
	t.Parallel()
	g := start(t, patient)
	a, b := g.client("a"), g.client("b").Join(g.key)
	st := g.join(a, g.Server)
	path, result := held(g, st, func() error { _, err := g.C2N.Echo(g.Context(), a.ID()); return err })
	for what, try := range map[string]func() int{
		"another node":    func() int { status, _ := b.Do("HEAD", path, ""); return status },
		"a wrong method":  func() int { status, _ := a.Do("POST", path, "{}"); return status },
		"a wrong token":   func() int { status, _ := a.Do("HEAD", path+"x", ""); return status },
		"a part of it":    func() int { status, _ := a.Do("HEAD", path[:len(path)-1], ""); return status },
		"a method beside": func() int { status, _ := a.Do("GET", path, ""); return status },
	} {
		if status := try(); status != http.StatusNotFound && status != http.StatusMethodNotAllowed {
			t.Errorf("%s: status %d", what, status)
		}
	}
	if status, _ := g.client("stranger").Do("HEAD", path, ""); status != http.StatusUnauthorized {
		t.Errorf("a stranger: status %d", status)
	}
	select {
	case err := <-result:
		t.Fatalf("the call ended: %v", err)
	default:
	}
	if status, _ := a.Do("HEAD", path, ""); status != http.StatusOK {
		t.Errorf("the node itself: status %d", status)
	}
	if err := wait(g, result); err != nil {
		t.Error(err)
	}
	if status, _ := a.Do("HEAD", path, ""); status != http.StatusNotFound {
		t.Errorf("the node again: status %d", status)
	}
}

func TestAnswersThatCannotBeUsed(t *testing.T) {
	t.Parallel()
	each(t, patient, func(g *rig, at *controltest.Server) {
		a := g.client("a")
		st := g.join(a, at)
		get := func() error { _, err := g.C2N.Get(g.Context(), a.ID(), "/echo"); return err }
		ping := func() error {
			_, err := g.C2N.Ping(g.Context(), a.ID(), netip.MustParseAddr("100.64.0.1"), tailcfg.PingDisco)
			return err
		}
		for what, c := range map[string]struct {
			call func() error
			body string
			want error
		}{
			"no HTTP":                {get, "hello", c2n.ErrBadAnswer},
			"nothing":                {get, "", c2n.ErrBadAnswer},
			"a body that is cut off": {get, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", c2n.ErrBadAnswer},
			"a page":                 {get, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", nil},
			"no JSON":                {ping, "{", c2n.ErrBadAnswer},
			"another type":           {ping, `{"Type": "TSMP"}`, c2n.ErrBadAnswer},
			"a ping":                 {ping, `{"Type": "disco", "LatencySeconds": 0.1}`, nil},
		} {
			path, result := held(g, st, c.call)
			if status, _ := a.On(at).Do("POST", path, c.body); status != http.StatusOK {
				g.Errorf("%s: status %d", what, status)
			}
			if err := wait(g, result); !errors.Is(err, c.want) {
				g.Errorf("%s: %v, want %v", what, err, c.want)
			}
		}
	})
}

// endless sends without a length and without an end.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

func TestLargeAnswers(t *testing.T) {
	t.Parallel()
	each(t, patient, func(g *rig, at *controltest.Server) {
		a := g.client("a")
		size := 0
		a.C2N = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Write(make([]byte, size)) })
		size = c2n.MaxAnswer - 200 // room for the head
		st := g.join(a, at)
		res, err := g.C2N.Get(g.Context(), a.ID(), "/echo")
		if err != nil || len(res.Body) != size {
			g.Fatalf("the largest answer: %v", err)
		}
		path, result := held(g, st, func() error { _, err := g.C2N.Get(g.Context(), a.ID(), "/echo"); return err })
		// The server stops reading, which the client may see before its own sending fails.
		if status, err := a.On(at).SendBody(g.Context(), "POST", path, endless{}); err == nil && status != http.StatusRequestEntityTooLarge {
			g.Errorf("an endless answer: status %d", status)
		}
		if err := wait(g, result); !errors.Is(err, c2n.ErrTooLarge) {
			g.Errorf("an endless answer: %v", err)
		}
	})
}

func TestCallsAreBounded(t *testing.T) {
	t.Parallel()
	each(t, patient, func(g *rig, at *controltest.Server) {
		a := g.client("a")
		st := g.join(a, at)
		st.Silence(true)
		ctx, cancel := context.WithCancel(g.Context())
		results := make(chan error, 100)
		echo := func() { _, err := g.C2N.Echo(ctx, a.ID()); results <- err }
		for range 8 {
			go echo()
		}
		n := 0
		st.Message("the eighth call", func(m *tailcfg.MapResponse) bool {
			if m.PingRequest != nil {
				n++
			}
			return n == 8
		})
		if _, err := g.C2N.Echo(ctx, a.ID()); !errors.Is(err, c2n.ErrBusy) {
			g.Errorf("the ninth call: %v", err)
		}
		b := g.client("b")
		g.join(b, at)
		if _, err := g.C2N.Echo(ctx, b.ID()); err != nil {
			g.Errorf("another node: %v", err)
		}
		cancel()
		for range 8 {
			if err := <-results; err == nil {
				g.Error("a silent node answered")
			}
		}
	})
}

func TestNodeThatMovedIsCalledWhereItIs(t *testing.T) {
	t.Parallel()
	g := start(t, patient)
	other := g.Beside("other", g.Clock)
	a := g.client("a")
	old := g.join(a, other)
	// The new stream ends the old one only later: until then both servers have one, and the rows say where the node is.
	now := a.On(g.Server).Poll()
	now.Wait("its map", func(v *controltest.View) bool { return v.Node != nil })
	if _, err := g.C2N.Echo(g.Context(), a.ID()); err != nil {
		t.Error(err)
	}
	if answers := now.WaitAnswers(1); answers[0].Status != 200 {
		t.Errorf("the new stream: %+v", answers)
	}
	if messages, _ := old.Messages(); messages[len(messages)-1].PingRequest != nil {
		t.Error("the old stream was asked")
	}
}

func TestServerThatIsGone(t *testing.T) {
	t.Parallel()
	g := start(t, hasty)
	other := g.Beside("other", g.Clock)
	a := g.client("a")
	g.join(a, other)
	other.Stop()
	if _, err := g.C2N.Echo(g.Context(), a.ID()); !errors.Is(err, c2n.ErrTimeout) {
		t.Errorf("a node at a server that is gone: %v", err)
	}
	if g.stored() {
		t.Error("mail for a server that is gone is left after the call")
	}
}

// TestManyCallsAtOnce crosses calls of two servers.
func TestManyCallsAtOnce(t *testing.T) {
	t.Parallel()
	g := start(t, patient)
	other := g.Beside("other", g.Clock)
	servers := []*controltest.Server{g.Server, other}
	var ids []tailcfg.NodeID
	for i := range 6 {
		c := g.client(fmt.Sprint("n", i))
		g.join(c, servers[i%2])
		ids = append(ids, c.ID())
	}
	other.WaitNode(ids[5], "the last", func(n *tailnet.Node) bool { return n != nil && n.State.Online })
	const rounds = 4 // times two servers is as many as a node takes
	results := make(chan error, rounds*len(ids)*2)
	for range rounds {
		for _, s := range servers {
			go func() {
				for _, id := range ids {
					res, err := s.C2N.Get(g.Context(), id, "/debug/metrics")
					if err == nil && res.Status != 200 {
						err = io.ErrUnexpectedEOF
					}
					results <- err
				}
			}()
		}
	}
	for range rounds * len(ids) * 2 {
		if err := wait(g, results); err != nil {
			t.Error(err)
		}
	}
	if g.stored() {
		t.Error("mail is left")
	}
}
