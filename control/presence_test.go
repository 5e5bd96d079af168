package control_test

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// beat is as often as servers give signs of life.
const beat = 15 * time.Second

// pass lets time pass for a server, as if it did its duties meanwhile.
func pass(g *controltest.Server, d time.Duration, each func()) {
	g.Helper()
	for end := g.Clock.Now().Add(d); g.Clock.Now().Before(end); {
		g.Clock.Advance(beat)
		if each != nil {
			each()
		}
		g.Reap(g.Context(), g.Clock.Now())
	}
}

// watched has a node at g that watches one at another server.
func watched(g *rig, other *controltest.Server) (watcher, victim *controltest.Stream, v *controltest.Client) {
	g.Helper()
	watcher = g.join("watcher").Poll()
	joined := g.NewClient("victim").Join(g.key)
	other.WaitNode(joined.ID(), "the joined node", func(n *tailnet.Node) bool { return n != nil })
	v = joined.On(other)
	victim = v.Poll()
	watcher.Wait("the victim online", func(view *controltest.View) bool { return online(view.Peer("victim"), true) })
	return watcher, victim, v
}

func TestNodesOfADeadServerGoOfflineAfterTheGrace(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: quick})
	other := g.Beside("other", g.Clock)
	watcher, _, v := watched(g, other)
	pass(g.Server, beat, nil) // the other's last sign of life is heard
	other.Stop()
	pass(g.Server, 75*time.Second, nil)
	if n := g.Replica.Current().Node(v.ID()); !n.State.Online {
		t.Error("offline within the grace")
	}
	pass(g.Server, 30*time.Second, nil)
	watcher.Wait("offline after the grace", func(view *controltest.View) bool { return online(view.Peer("victim"), false) })
}

func TestServerWithAnotherClockLives(t *testing.T) {
	t.Parallel()
	for _, off := range []time.Duration{-2 * time.Hour, 2 * time.Hour} {
		g := start(t, controltest.Options{Change: quick})
		clock := new(controltest.Clock)
		clock.Advance(off) // before it starts, which is no jump
		other := g.Beside("other", clock)
		_, _, v := watched(g, other)
		pass(g.Server, 5*time.Minute, func() { other.Beat(g.Context()) })
		if n := g.Replica.Current().Node(v.ID()); !n.State.Online {
			t.Errorf("the node of a server whose clock is %v off was taken offline", off)
		}
	}
}

// TestNobodyIsDeadAfterSilenceOfAll lets no server look or be heard for long: the database was away. Its end finds nobody dead.
func TestNobodyIsDeadAfterSilenceOfAll(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: quick})
	other := g.Beside("other", g.Clock)
	_, _, v := watched(g, other)
	pass(g.Server, 2*time.Minute, func() { other.Beat(g.Context()) })
	g.Clock.Advance(4 * time.Minute)
	g.Reap(g.Context(), g.Clock.Now())
	if n := g.Replica.Current().Node(v.ID()); !n.State.Online {
		t.Error("a server that could not be heard was taken for dead")
	}
}

func TestPausedServerTakesItsNodesBack(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: quick})
	other := g.Beside("other", g.Clock)
	watcher, victim, v := watched(g, other)
	pass(g.Server, 3*time.Minute, nil)
	watcher.Wait("offline while the server is paused", func(view *controltest.View) bool { return online(view.Peer("victim"), false) })
	other.WaitNode(v.ID(), "the other server to see that", func(n *tailnet.Node) bool { return !n.State.Online })
	other.Reap(g.Context(), g.Clock.Now())
	watcher.Wait("online as soon as it goes on", func(view *controltest.View) bool { return online(view.Peer("victim"), true) })
	if victim.Ended() {
		t.Error("the stream ended")
	}
}

func TestStreamThatWasLeftBehindEnds(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: quick})
	other := g.Beside("other", g.Clock)
	watcher, left, v := watched(g, other)
	now := v.On(g.Server).Poll()
	other.WaitNode(v.ID(), "the move", func(n *tailnet.Node) bool { return n.State.Instance == 1 })
	other.Reap(g.Context(), g.Clock.Now())
	if left.Ended() {
		t.Error("the stream was ended at once, when its own beginning may not be written yet")
	}
	pass(other, beat, func() { g.Beat(g.Context()) })
	left.WaitEnd()
	other.Update(func(tx *db.Tx) error { return tx.Audit("test", "", nil, nil) })
	if n := g.Replica.Current().Node(v.ID()); !n.State.Online || n.State.Instance != 1 || now.Ended() {
		t.Errorf("the node is %+v, its stream ended: %v", n.State, now.Ended())
	}
	messages, _ := watcher.Messages()
	for _, m := range messages {
		for _, p := range m.PeersChangedPatch {
			if p.Online != nil && !*p.Online {
				t.Error("the move was shown as going offline")
			}
		}
	}
}

// A server that could not write yet that a node has come to it, because the database was away or is slow, does not take the row's word that the
// node is elsewhere.
func TestStreamIsKeptWhileItsBeginningIsUnwritten(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: quick})
	other := g.BesideUnwritten("other", g.Clock)
	v := g.join("victim")
	v.Poll()
	g.WaitNode(v.ID(), "the stream here", func(n *tailnet.Node) bool { return n.State.Online && n.State.Instance == 1 })
	other.WaitNode(v.ID(), "that, there", func(n *tailnet.Node) bool { return n.State.Online && n.State.Instance == 1 })
	now := v.On(other).Poll()
	now.Wait("its map", func(view *controltest.View) bool { return view.Node != nil })
	pass(other, time.Minute, func() { g.Beat(g.Context()) })
	if now.Ended() {
		t.Fatal("the stream was ended for one that its client had left")
	}
	go other.Ledger.Run(t.Context())
	g.WaitNode(v.ID(), "the move", func(n *tailnet.Node) bool { return n.State.Online && n.State.Instance != 1 })
	pass(other, time.Minute, func() { g.Beat(g.Context()) })
	if now.Ended() {
		t.Error("the stream was ended when its beginning was written")
	}
}

func TestSignOfLifeSaysWhatTheServerHas(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: quick})
	other := g.Beside("other", g.Clock)
	watched(g, other)
	want := other.Update(func(tx *db.Tx) error { return tx.CreateUser(&db.User{Name: "dora", Role: "member"}) }).Revision()
	other.Beat(g.Context())
	err := g.Store.View(g.Context(), func(r *db.Reader) error {
		list, err := r.Instances()
		if err == nil && (list[1].Revision < want || list[1].Streams != 1) {
			t.Errorf("the row says %+v, want one stream and a revision from %d on", list[1], want)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	g.Reap(g.Context(), g.Clock.Now())
	if n := g.Alive(); n != 2 {
		t.Errorf("%d servers live, want 2", n)
	}
	other.Stop()
	g.Clock.Advance(2 * time.Minute)
	g.Beat(g.Context())
	g.Reap(g.Context(), g.Clock.Now())
	if n := g.Alive(); n != 1 {
		t.Errorf("%d servers live after one has been gone for two minutes, want 1", n)
	}
}

func TestSecondServerOfOneNameIsNoticed(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: quick})
	g.Reap(g.Context(), g.Clock.Now())
	if err := g.Rival(); err != nil {
		t.Fatalf("from the start: %v", err)
	}
	g.Clock.Advance(time.Second)
	twin := g.Beside("test", g.Clock)
	g.Reap(g.Context(), g.Clock.Now())
	g.Beat(g.Context())
	twin.Beat(g.Context())
	if g.Rival() == nil || twin.Rival() != nil {
		t.Errorf("the first says %v, the second %v", g.Rival(), twin.Rival())
	}
	twin.Stop()
	pass(g.Server, 3*time.Minute, nil)
	g.Beat(g.Context())
	if err := g.Rival(); err != nil {
		t.Errorf("after the other is gone: %v", err)
	}
}

func TestRelaysOfAServerThatIsGoneLeaveTheMap(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: quick})
	other := g.Beside("other", g.Clock)
	g.Update(func(tx *db.Tx) error {
		list, err := tx.Instances()
		if err != nil {
			return err
		}
		doc := json.RawMessage(`{"Regions": {"901": {"RegionID": 901, "Nodes": [{"Name": "901a-2", "RegionID": 901, "HostName": "127.0.0.2"}]}}}`)
		_, err = tx.PutSetting(fmt.Sprintf("%s/%d", tailnet.SettingDERPMap, list[1].ID), doc)
		return err
	})
	relays := func() int { return len(g.Replica.Current().DERPMap().Regions[901].Nodes) }
	if relays() != 2 {
		t.Fatalf("%d relays, want both servers'", relays())
	}
	pass(g.Server, 2*time.Minute, func() { other.Beat(g.Context()) })
	other.Stop()
	pass(g.Server, 9*time.Minute, nil)
	g.ClearRelayMaps(g.Context())
	if relays() != 2 {
		t.Error("cleared too early")
	}
	pass(g.Server, 2*time.Minute, nil)
	g.ClearRelayMaps(g.Context())
	if relays() != 1 {
		t.Errorf("%d relays after the server has been gone for eleven minutes", relays())
	}
}
