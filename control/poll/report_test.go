package poll_test

import (
	"net/http"
	"net/netip"
	"sync"
	"testing"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/tailnet"
)

// TestReportsThatWaitBecomeOne floods the server with reports. All are answered, and few are stored.
func TestReportsThatWaitBecomeOne(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.join("a")
	before := g.Replica.Current().Revision()
	const flood = 200
	var wg sync.WaitGroup
	for i := range flood {
		req := a.MapRequest()
		req.Endpoints = []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(i+1))}
		wg.Go(func() {
			if status, text := a.Do("POST", "/machine/map", req); status != http.StatusOK {
				t.Errorf("status %d %q", status, text)
			}
		})
	}
	wg.Wait()
	if n := g.Replica.Current().Revision() - before; n >= flood/2 {
		t.Errorf("%d reports at once made %d revisions", flood, n)
	}
	a.HomeDERP = 907
	a.Report()
	g.WaitNode(a.ID(), "the newest report", func(n *tailnet.Node) bool { return n.State.HomeDERP == 907 })
}

// TestMapsWithoutAStreamAreBounded: for a node that reads none of the maps it asks for, one is kept.
func TestMapsWithoutAStreamAreBounded(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	slow := g.stuck()
	once := func(r *tailcfg.MapRequest) { r.Stream = false }
	if st, status := slow.Stalled(once); st == nil {
		t.Fatalf("status %d", status)
	}
	if _, status := slow.Stalled(once); status != http.StatusTooManyRequests {
		t.Errorf("a second map at once: status %d", status)
	}
}

func TestRequestsWithoutAStream(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.join("a")
	g.join("b")
	before := g.Replica.Current().Node(a.ID()).State

	t.Run("a report has an empty answer", func(t *testing.T) {
		if status, text := a.Do("POST", "/machine/map", a.MapRequest()); status != 200 || text != "" {
			t.Errorf("status %d %q", status, text)
		}
	})
	once := a.MapRequest()
	once.OmitPeers, once.ReadOnly = false, true
	once.Hostinfo, once.Endpoints = &tailcfg.Hostinfo{Hostname: "other"}, nil
	for _, compress := range []string{"zstd", ""} {
		t.Run("one map, compressed by "+compress, func(t *testing.T) {
			once.Compress = compress
			res, err := a.Send(g.Context(), "POST", "/machine/map", once)
			if err != nil || res.StatusCode != 200 {
				t.Fatalf("%v %v", res, err)
			}
			defer res.Body.Close()
			z, err := controltest.ReadMessage(res.Body)
			if err != nil {
				t.Fatal(err)
			}
			var v controltest.View
			m := new(tailcfg.MapResponse)
			if compress == "" {
				err = decodeRaw(z, m)
			} else {
				err = controltest.Decode(z, m)
			}
			if err != nil || m.KeepAlive || len(m.Peers) != 1 || m.Node == nil || m.DNSConfig == nil {
				t.Fatalf("%v: %+v", err, m)
			}
			v.Apply(m)
			if _, err := controltest.ReadMessage(res.Body); err == nil || len(v.Faults) > 0 {
				t.Errorf("a second message, or %v", v.Faults)
			}
		})
	}
	t.Run("a read-only report changes nothing", func(t *testing.T) {
		once.OmitPeers = true
		if status, _ := a.Do("POST", "/machine/map", once); status != 200 {
			t.Errorf("status %d", status)
		}
	})
	t.Run("a read-only stream is not presence", func(t *testing.T) {
		st, status := a.Stream(func(r *tailcfg.MapRequest) { r.ReadOnly = true; r.Hostinfo.Hostname = "other" })
		if st == nil {
			t.Fatalf("status %d", status)
		}
		sees(t, st, "b")
		g.join("c")
		sees(t, st, "b", "c")
	})
	if after := g.Replica.Current().Node(a.ID()); after.State.Online || after.GivenName != "a" || after.State.DiscoKey != before.DiscoKey || len(after.State.Endpoints) != 1 {
		t.Errorf("the node was changed: %+v", after.Node)
	}
}

func TestStreamsOwnHostinfoIsIgnored(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.join("a")
	st, _ := a.Stream(func(r *tailcfg.MapRequest) {
		r.Hostinfo = &tailcfg.Hostinfo{Hostname: "other"}
		r.Endpoints = nil
	})
	sees(t, st)
	g.WaitNode(a.ID(), "online", func(n *tailnet.Node) bool { return n.State.Online })
	if n := g.Replica.Current().Node(a.ID()); n.Hostname != "a" || len(n.State.Endpoints) != 1 || n.State.HomeDERP != 901 {
		t.Errorf("the stream's request was applied: %+v", n.Node)
	}
}

func TestStreamFillsWhatTheServerLacks(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.NewClient("a")
	if resp, status := a.Register(a.RegisterRequest(g.key)); resp == nil || resp.Error != "" {
		t.Fatalf("status %d %+v", status, resp)
	}
	a.Poll()
	g.WaitNode(a.ID(), "disco key and endpoints", func(n *tailnet.Node) bool {
		return n.State.DiscoKey == a.Disco.Public() && len(n.State.Endpoints) == 1
	})
}

func TestReportsSurviveARestart(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a, b := g.join("a"), g.join("b")
	bs := b.Poll()
	sees(t, bs, "a")
	g.WaitNode(b.ID(), "online", func(n *tailnet.Node) bool { return n.State.Online })
	next := g.Restart()
	st := a.On(next).Poll()
	m := st.Message("the map", func(m *tailcfg.MapResponse) bool { return !m.KeepAlive })
	if len(m.Peers) != 1 {
		t.Fatalf("peers %+v", m.Peers)
	}
	p := m.Peers[0]
	if p.DiscoKey != b.Disco.Public() || p.HomeDERP != 901 || len(p.Endpoints) != 1 || p.Hostinfo.OS() != "linux" || p.Cap != b.Version {
		t.Errorf("the peer after a restart: %+v", p)
	}
	if !online(p, true) {
		t.Error("the restart shows a node offline that has had no time to come back")
	}
}
