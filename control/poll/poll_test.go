package poll_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"testing"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control"
	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/poll"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// quick keeps the waits of presence short.
func quick(c *control.Config) { c.Grace = 200 * time.Millisecond }

// rig is a server with a reusable key of alice's.
type rig struct {
	*controltest.Server
	key string
}

func start(t *testing.T, opts controltest.Options) *rig {
	t.Helper()
	s := controltest.Start(t, opts)
	return &rig{s, s.AuthKey(db.AuthKey{User: s.User("alice"), Reusable: true})}
}

func (g *rig) join(name string) *controltest.Client {
	g.Helper()
	return g.NewClient(name).Join(g.key)
}

// sees waits until the stream's peers have these names, in order.
func sees(t *testing.T, st *controltest.Stream, names ...string) {
	t.Helper()
	st.Wait("the right peers", func(v *controltest.View) bool {
		got := v.Names()
		if v.Node == nil || len(got) != len(names) {
			return false
		}
		for i := range got {
			if got[i] != names[i] {
				return false
			}
		}
		return true
	})
}

func online(n *tailcfg.Node, want bool) bool { return n != nil && n.Online != nil && *n.Online == want }

func TestKeepAliveIsFirstAndNeverChanges(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: func(c *control.Config) { c.KeepAlive = 5 * time.Millisecond }})
	a := g.join("a")
	st := a.Poll()
	// Messages of every small size come between KeepAlives.
	b := g.join("b")
	for range 20 {
		b.Endpoints = append(b.Endpoints, b.Endpoints[0])
		b.Report()
	}
	st.Wait("b's endpoints", func(v *controltest.View) bool { return v.Peer("b") != nil && len(v.Peer("b").Endpoints) == 21 })
	kept := 0
	st.Message("ten KeepAlives", func(m *tailcfg.MapResponse) bool {
		if m.KeepAlive {
			kept++
		}
		return kept == 10
	})
	messages, frames := st.Messages()
	if !messages[0].KeepAlive {
		t.Fatalf("the first message is no KeepAlive: %+v", messages[0])
	}
	for i, m := range messages {
		switch same := string(frames[i]) == string(frames[0]); {
		case m.KeepAlive && !same:
			t.Errorf("message %d: KeepAlive %x differs from the first, %x", i, frames[i], frames[0])
		case !m.KeepAlive && len(frames[i]) == len(frames[0]):
			t.Errorf("message %d has the length of a KeepAlive: %+v", i, m)
		}
	}
}

func TestFirstMapIsComplete(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	tagged := g.NewClient("srv").Join(g.AuthKey(db.AuthKey{Tags: []string{"tag:x"}}))
	bob := g.NewClient("bob-pc").Join(g.AuthKey(db.AuthKey{User: g.User("bob")}))
	a := g.join("a")
	m := a.Poll().Message("the map", func(m *tailcfg.MapResponse) bool { return !m.KeepAlive })
	switch {
	case m.Node == nil || m.Node.ID != a.ID() || m.Node.Key != a.Node.Public() || !m.Node.MachineAuthorized || m.Node.User != g.User("alice"):
		t.Errorf("own node %+v", m.Node)
	case m.Node.Name != "a.mesh.test." || len(m.Node.Addresses) != 2 || m.Domain != "mesh.test":
		t.Errorf("own names %q %v %q", m.Node.Name, m.Node.Addresses, m.Domain)
	case m.DERPMap == nil || m.DERPMap.Regions[901] == nil:
		t.Errorf("DERP map %+v", m.DERPMap)
	case m.DNSConfig == nil || !m.DNSConfig.Proxied:
		t.Errorf("DNS %+v", m.DNSConfig)
	case m.PacketFilters["base"] == nil || m.PacketFilter != nil:
		t.Errorf("filters %+v", m.PacketFilters)
	case m.SSHPolicy == nil || m.SSHPolicy.Rules == nil:
		t.Errorf("SSH policy %+v", m.SSHPolicy)
	case m.ControlTime == nil || m.CollectServices == "":
		t.Errorf("time %v, collect services %q", m.ControlTime, m.CollectServices)
	case m.DeprecatedDefaultAutoUpdate != "false":
		t.Errorf("automatic updates %q, want false", m.DeprecatedDefaultAutoUpdate)
	case m.ClientVersion != nil:
		t.Errorf("client version %+v, which this server cannot know", m.ClientVersion)
	case len(m.Peers) != 2 || m.Peers[0].ID != tagged.ID() || m.Peers[1].ID != bob.ID():
		t.Errorf("peers are not in order of their ids: %+v", m.Peers)
	}
	profiles := map[tailcfg.UserID]string{}
	for _, p := range m.UserProfiles {
		profiles[p.ID] = p.LoginName
	}
	if profiles[g.User("alice")] != "alice" || profiles[g.User("bob")] != "bob" || profiles[tailnet.TaggedUser] != "tagged-devices" || len(profiles) != 3 {
		t.Errorf("profiles %v", profiles)
	}
}

func TestLastPeerIsRemovedByName(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a, b := g.join("a"), g.join("b")
	st := a.Poll()
	sees(t, st, "b")
	id := b.ID()
	g.DeleteNode(id)
	m := st.Message("a removal", func(m *tailcfg.MapResponse) bool { return len(m.PeersRemoved) > 0 })
	if len(m.PeersRemoved) != 1 || m.PeersRemoved[0] != id {
		t.Errorf("removed %v, want %d", m.PeersRemoved, id)
	}
	sees(t, st)
}

func TestLastPeerIsRemovedByPolicy(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.join("a")
	g.join("b")
	st := a.Poll()
	sees(t, st, "b")
	g.SetPolicy(`{"acls": []}`)
	sees(t, st)
	st.Wait("an empty filter", func(v *controltest.View) bool { return v.Filters["base"] != nil && len(v.Filters["base"]) == 0 })
	g.SetPolicy(controltest.AllowAll)
	sees(t, st, "b")
}

func TestCheapChangesComeAsPatchesOnly(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: quick})
	a, b := g.join("a"), g.join("b")
	st := a.Poll()
	sees(t, st, "b")
	begun, _ := st.Messages()

	b.Endpoints = append(b.Endpoints, b.Endpoints[0])
	b.HomeDERP = 902
	b.Report()
	st.Wait("endpoints and relay", func(v *controltest.View) bool { return len(v.Peer("b").Endpoints) == 2 && v.Peer("b").HomeDERP == 902 })
	bs := b.Poll()
	st.Wait("online", func(v *controltest.View) bool { return online(v.Peer("b"), true) })
	bs.Close()
	st.Wait("offline", func(v *controltest.View) bool { return online(v.Peer("b"), false) && v.Peer("b").LastSeen != nil })

	all, _ := st.Messages()
	for _, m := range all[len(begun):] {
		if m.Node != nil || m.Peers != nil || m.PeersChanged != nil || m.PacketFilters != nil || m.UserProfiles != nil || m.DNSConfig != nil || m.SSHPolicy != nil {
			t.Errorf("a message that makes clients rebuild their map: %+v", m)
		}
	}
}

func TestNewestStreamOfANodeWins(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.join("a")
	first := a.Poll()
	sees(t, first)
	second := a.On(g.Server).Poll() // another connection of the same machine
	first.WaitEnd()
	third := a.Poll() // the old connection again
	second.WaitEnd()
	g.join("b")
	sees(t, third, "b")
	if n := g.Poll.Sessions.Load(); n != 1 {
		t.Errorf("%d sessions, want 1", n)
	}
}

// stuck is a client whose connection takes in less than a full map unless it is read.
func (g *rig) stuck() *controltest.Client {
	g.Helper()
	for range 60 {
		g.join("one-of-many")
	}
	slow := g.join("slow")
	slow.Close()
	slow.Window = 2048
	return slow
}

func TestStalledReaderHurtsNobody(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: func(c *control.Config) { c.Stall, c.Grace = 3*time.Second, 50*time.Millisecond }})
	slow := g.stuck()
	quickOne := g.join("quick").Poll()
	if st, status := slow.Stalled(nil); st == nil {
		t.Fatalf("status %d", status)
	}
	quickOne.Wait("slow is online", func(v *controltest.View) bool { return online(v.Peer("slow"), true) })
	b := g.join("b")
	quickOne.Wait("b while the other reader is stuck", func(v *controltest.View) bool { return v.Peer("b") != nil && online(v.Peer("slow"), true) })
	quickOne.Wait("slow is offline", func(v *controltest.View) bool { return online(v.Peer("slow"), false) })
	if n := g.Poll.Stalled.Load(); n != 1 {
		t.Errorf("%d streams were dropped for their readers, want 1", n)
	}
	// The connection is still good, and so is a stream that replaces a stuck one.
	if st, status := slow.Stalled(nil); st == nil {
		t.Fatalf("status %d", status)
	}
	again := slow.Poll()
	again.Wait("peers", func(v *controltest.View) bool { return v.Peer("b") != nil })
	if b.ID() == 0 || again.Ended() {
		t.Error("the new stream ended")
	}
}

// ends is a log handler that tells of the end of streams.
type ends chan struct{}

func (e ends) Enabled(context.Context, slog.Level) bool { return true }
func (e ends) WithAttrs([]slog.Attr) slog.Handler       { return e }
func (e ends) WithGroup(string) slog.Handler            { return e }
func (e ends) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "stream ended" {
		e <- struct{}{}
	}
	return nil
}

func TestReplacedStalledStreamsEnd(t *testing.T) {
	t.Parallel()
	ended := make(ends, 100)
	g := start(t, controltest.Options{Change: func(c *control.Config) { c.Log = slog.New(ended) }})
	slow := g.stuck()
	const rounds = 5
	for range rounds {
		for _, readOnly := range []bool{false, true} {
			if st, status := slow.Stalled(func(r *tailcfg.MapRequest) { r.ReadOnly = readOnly }); st == nil {
				t.Fatalf("status %d", status)
			}
		}
	}
	timeout := time.After(controltest.Patience)
	for i := range 2 * (rounds - 1) {
		select {
		case <-ended:
		case <-timeout:
			t.Fatalf("%d replaced streams ended, want all but the newest one and the newest read-only one", i)
		}
	}
	select {
	case <-ended:
		t.Error("the newest stream ended too")
	default:
	}
}

func TestOfflineIsToldAfterTheGrace(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{}) // with the grace of the product
	a, b := g.join("a"), g.join("b")
	st := a.Poll()
	bs := b.Poll()
	st.Wait("online", func(v *controltest.View) bool { return online(v.Peer("b"), true) })
	sees(t, bs, "a")
	b.Close() // the whole connection, as a suspended laptop
	began := time.Now()
	st.Wait("offline", func(v *controltest.View) bool { return online(v.Peer("b"), false) })
	if d := time.Since(began); d < 2*time.Second {
		t.Errorf("offline after %v, within the grace", d)
	}
}

func TestQuickReconnectDoesNotFlap(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: func(c *control.Config) { c.Grace = controltest.Patience }})
	a, b := g.join("a"), g.join("b")
	st := a.Poll()
	bs := b.Poll()
	st.Wait("online", func(v *controltest.View) bool { return online(v.Peer("b"), true) })
	for range 5 {
		sees(t, bs, "a")
		bs.Close()
		bs = b.Poll()
	}
	sees(t, bs, "a")
	b.HomeDERP = 903 // something that is told after all that
	b.Report()
	st.Wait("the report", func(v *controltest.View) bool { return v.Peer("b").HomeDERP == 903 })
	messages, _ := st.Messages()
	for _, m := range messages {
		for _, p := range m.PeersChangedPatch {
			if p.Online != nil && !*p.Online {
				t.Errorf("told offline in %+v", m)
			}
		}
	}
}

func TestForeignNodeKeyIsUnauthorized(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a, b := g.join("a"), g.join("b")
	thief := b.On(g.Server)
	thief.Node = a.Node
	stranger := g.NewClient("stranger")
	stranger.Node = a.Node
	nobody := g.NewClient("nobody")
	var texts []string
	for _, c := range []*controltest.Client{thief, stranger, nobody} {
		for _, change := range []func(*tailcfg.MapRequest){
			func(*tailcfg.MapRequest) {},
			func(r *tailcfg.MapRequest) { r.Stream, r.OmitPeers = true, false },
			func(r *tailcfg.MapRequest) { r.OmitPeers = false },
			func(r *tailcfg.MapRequest) { r.ReadOnly = true },
		} {
			req := c.MapRequest()
			change(req)
			status, text := c.Do("POST", "/machine/map", req)
			if status != http.StatusUnauthorized {
				t.Errorf("status %d %q", status, text)
			}
			texts = append(texts, text)
		}
	}
	for _, s := range texts {
		if s != texts[0] {
			t.Errorf("texts differ: %q and %q", s, texts[0])
		}
	}
	if n := g.Replica.Current().Node(a.ID()); n.State.DiscoKey != a.Disco.Public() {
		t.Error("a thief's report was stored")
	}
}

func TestDeletedNodeIsToldFarewell(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a, b := g.join("a"), g.join("b")
	st, peer := a.Poll(), b.Poll()
	sees(t, st, "b")
	sees(t, peer, "a")
	id := a.ID()
	g.DeleteNode(id)
	st.WaitEnd()
	messages, _ := st.Messages()
	checkFarewell(t, messages[len(messages)-1], a, id)
	sees(t, peer)

	// It comes back and is told once more; then at most once a minute.
	told := func() bool {
		st, status := a.Stream(nil)
		if st == nil {
			if status != http.StatusUnauthorized {
				t.Errorf("status %d", status)
			}
			return false
		}
		st.WaitEnd()
		messages, _ := st.Messages()
		if len(messages) != 2 || !messages[0].KeepAlive {
			t.Fatalf("messages %+v", messages)
		}
		checkFarewell(t, messages[1], a, id)
		if messages[1].DERPMap == nil || len(messages[1].DERPMap.Regions) == 0 {
			t.Error("a first map without relays switches them off in the client for good")
		}
		return true
	}
	if !told() || told() || told() {
		t.Error("want one farewell, and no second one within a minute")
	}
	g.Clock.Advance(61 * time.Second)
	if !told() || told() {
		t.Error("want another farewell a minute later")
	}
	// Another machine that knows the node key learns nothing.
	thief := g.NewClient("thief")
	thief.Node = a.Node
	if st, _ := thief.Stream(nil); st != nil {
		t.Error("farewell for another machine")
	}
	a.Join(g.key)
	sees(t, a.Poll(), "b")
}

// A client that starts with a node key registers before it polls. Told to log in there, it would go on with the network that it remembers.
func TestDeletedWhileAwayReachesItsFarewell(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.join("a")
	id := a.ID()
	g.DeleteNode(id)
	resp, status := a.Register(a.RegisterRequest(""))
	if status != http.StatusOK || resp.AuthURL != "" || resp.Error != "" || !resp.MachineAuthorized {
		t.Fatalf("register = %+v, status %d; want to be let through", resp, status)
	}
	st, _ := a.Stream(nil)
	if st == nil {
		t.Fatal("no farewell")
	}
	st.WaitEnd()
	messages, _ := st.Messages()
	checkFarewell(t, messages[len(messages)-1], a, id)
	if resp, _ := a.Register(a.RegisterRequest("")); resp.AuthURL == "" {
		t.Errorf("register after the farewell = %+v, want a login", resp)
	}
	if resp, _ := g.NewClient("stranger").Register(g.NewClient("stranger").RegisterRequest("")); resp != nil && resp.MachineAuthorized {
		t.Error("a stranger was let through")
	}
}

func checkFarewell(t *testing.T, m *tailcfg.MapResponse, c *controltest.Client, id tailcfg.NodeID) {
	t.Helper()
	if m.Node == nil || m.Node.ID != id || m.Node.Key != c.Node.Public() || m.Node.KeyExpiry.IsZero() || m.Node.KeyExpiry.After(time.Now()) {
		t.Errorf("farewell %+v", m.Node)
	}
}

func TestExpiredNodeSeesItselfOnly(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: quick})
	a, b := g.join("a"), g.join("b")
	st, peer := a.Poll(), b.Poll()
	sees(t, st, "b")
	peer.Wait("a online", func(v *controltest.View) bool { return online(v.Peer("a"), true) })
	g.EditNode(a.ID(), func(n *db.Node) { n.Expiry = g.Clock.Now().Add(-time.Second) })
	st.Wait("only itself", func(v *controltest.View) bool {
		return len(v.Peers) == 0 && !v.Node.KeyExpiry.IsZero() && v.Node.KeyExpiry.Before(time.Now()) && len(v.Filters["base"]) == 0
	})
	peer.Wait("a expired", func(v *controltest.View) bool {
		n := v.Peer("a")
		return n != nil && n.Expired && len(n.Endpoints) == 0 && n.HomeDERP == 0 && online(n, false)
	})
	// A stream that begins now has the same to say, and what b does is no business of a's.
	st = a.Poll()
	sees(t, st)
	b.HomeDERP = 903
	b.Report()

	g.EditNode(a.ID(), func(n *db.Node) { n.Expiry, n.Expired = time.Time{}, false })
	sees(t, st, "b")
	peer.Wait("a renewed", func(v *controltest.View) bool {
		n := v.Peer("a")
		return n != nil && !n.Expired && len(n.Endpoints) == 1 && n.HomeDERP == 901 && online(n, true)
	})
}

func decodeRaw(text []byte, m *tailcfg.MapResponse) error { return json.Unmarshal(text, m) }

func TestFanOutIsTimed(t *testing.T) {
	t.Parallel()
	took := make(chan time.Duration, 1000)
	g := start(t, controltest.Options{FanOut: func(d time.Duration) {
		select {
		case took <- d:
		default:
		}
	}})
	b := g.join("b")
	a := g.join("a").Poll()
	// A session is done a moment after its client has what it wrote, and what it wrote counts if that is before the next change.
	for region := range 100 {
		g.EditNode(b.ID(), func(n *db.Node) { n.GivenName = fmt.Sprintf("b%d", region) })
		a.Wait("the new name", func(v *controltest.View) bool { return v.Peer(fmt.Sprintf("b%d", region)) != nil })
		select {
		case d := <-took:
			if d <= 0 || d > controltest.Patience {
				t.Errorf("a fan-out took %v", d)
			}
			return
		default:
		}
	}
	t.Error("a hundred changes reached a client, and no fan-out was timed")
}

func TestDialPlanReachesClients(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.join("a").Poll()
	a.Wait("the first map", func(v *controltest.View) bool { return v.Node != nil && v.DialPlan == nil })
	set := func(doc string) {
		g.Update(func(tx *db.Tx) error {
			_, err := tx.PutSetting(tailnet.SettingDialPlan, []byte(doc))
			return err
		})
	}
	has := func(n int) func(*controltest.View) bool {
		return func(v *controltest.View) bool { return v.DialPlan != nil && len(v.DialPlan.Candidates) == n }
	}
	set(`{"Candidates": [{"IP": "203.0.113.7", "DialTimeoutSec": 10}]}`)
	a.Wait("the plan", has(1))
	b := g.join("b").Poll()
	b.Wait("the plan in the first map", has(1))
	set(`{"Candidates": null}`)
	a.Wait("its end", has(0))
	b.Wait("its end", has(0))
}

// TestWordsComeAfterTheFirstMap has a stream that cannot send its first map take a few words, and say them when it could.
func TestWordsComeAfterTheFirstMap(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	word := func(url string) poll.Word {
		return func(authority string) *tailcfg.PingRequest {
			if url == "" {
				return nil
			}
			return &tailcfg.PingRequest{URL: "https://" + authority + url, URLIsNoise: true}
		}
	}
	if held, _ := g.Poll.Say(4711, word("/x")); held {
		t.Error("a node that does not exist has a stream")
	}
	slow := g.stuck()
	slow.Host = "control.mesh.test"
	id := slow.ID()
	st, status := slow.Stalled(nil)
	if st == nil {
		t.Fatalf("status %d", status)
	}
	taken := 0
	for ; taken < 1000; taken++ {
		url := fmt.Sprint("/", taken)
		if taken == 1 {
			url = ""
		}
		held, said := g.Poll.Say(id, word(url))
		if !held {
			t.Fatal("the stream is not there")
		}
		if !said {
			break
		}
	}
	if taken < 2 || taken > 20 || g.Poll.Told(id) {
		t.Errorf("a stuck stream took %d words; told: %v", taken, g.Poll.Told(id))
	}
	st.Silence(true)
	st.Read()
	st.Message("the last word", func(m *tailcfg.MapResponse) bool {
		return m.PingRequest != nil && m.PingRequest.URL == fmt.Sprint("https://control.mesh.test/", taken-1)
	})
	messages, _ := st.Messages()
	var urls []string
	for i, m := range messages {
		if m.PingRequest == nil {
			continue
		}
		if urls = append(urls, m.PingRequest.URL); i < 2 {
			t.Errorf("message %d is a word: %+v", i, m)
		}
	}
	if len(urls) != taken-1 || urls[1] != "https://control.mesh.test/2" {
		t.Errorf("%d words were taken and one was void, said were %q", taken, urls)
	}
	if !g.Poll.Told(id) {
		t.Error("the stream does not count as told")
	}
}
