package netmap_test

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/netmap"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// A viewer is a client that holds a session at one server, and what the others would have sent it at the same revisions.
type viewer struct {
	id     tailcfg.NodeID
	at     *tailnet.Snapshot
	others [3]*tailnet.Snapshot // what the others had at that revision; nil when they were behind or have started since
	since  db.Revision          // when that was
	view   controltest.View
}

// text is what a client that connects now believes.
func (w *world) text(s *tailnet.Snapshot, id tailcfg.NodeID) string {
	w.t.Helper()
	var v controltest.View
	apply(w.t, &v, netmap.Wire(netmap.Full(s, netmap.Viewer{Slot: s.Node(id).Slot}), false))
	return v.Text()
}

func apply(t testing.TB, v *controltest.View, wire []byte) {
	t.Helper()
	if len(wire) == len(netmap.KeepAliveWire(false)) {
		t.Fatalf("a message has the length of a KeepAlive")
	}
	z, err := controltest.ReadMessage(bytes.NewReader(wire))
	if err != nil {
		t.Fatal(err)
	}
	m := new(tailcfg.MapResponse)
	if err := controltest.Decode(z, m); err != nil {
		t.Fatal(err)
	}
	v.Apply(m)
	if len(v.Faults) > 0 {
		t.Fatalf("a client would drop something: %v", v.Faults)
	}
}

// messages is what a client is sent at s that was last sent at; nil is a client that comes.
func messages(at, s *tailnet.Snapshot, id tailcfg.NodeID) []netmap.Message {
	v := netmap.Viewer{Slot: s.Node(id).Slot}
	if at == nil {
		return []netmap.Message{netmap.Full(s, v)}
	}
	return netmap.Between(tailnet.Diff(at, s), v)
}

// catchUp brings the client to the present, and holds the other servers that are there, too, to the same bytes.
func (c *viewer) catchUp(w *world) {
	w.t.Helper()
	sent := messages(c.at, w.now, c.id)
	for i, r := range w.replicas {
		if r.due != nil {
			c.others[i] = nil
			continue
		}
		w.same(fmt.Sprintf("a first map by replica %d", i), messages(nil, w.now, c.id), messages(nil, r.snap, c.id))
		at := c.others[i]
		c.others[i] = r.snap
		if at == nil || c.since < r.born || r.reset(at) || tailnet.Diff(c.at, w.now).Reset {
			continue // a layout is one server's own, and a new one is a first map again
		}
		w.compared[i]++
		w.same(fmt.Sprintf("replica %d", i), sent, messages(at, r.snap, c.id))
	}
	for _, m := range sent {
		apply(w.t, &c.view, netmap.Wire(m, false))
	}
	c.at, c.since = w.now, w.rev
}

func (r *replica) reset(at *tailnet.Snapshot) bool { return tailnet.Diff(at, r.snap).Reset }

// same compares messages as they go on the wire.
func (w *world) same(what string, a, b []netmap.Message) {
	w.t.Helper()
	if len(a) != len(b) {
		var text []string
		for _, m := range append(a, b...) {
			text = append(text, string(netmap.Wire(m, true)[4:]))
		}
		w.t.Fatalf("%s: one server sends %d messages, the other %d:\n%s", what, len(a), len(b), strings.Join(text, "\n"))
	}
	for i := range a {
		if !bytes.Equal(netmap.Wire(a[i], false), netmap.Wire(b[i], false)) {
			x, y := netmap.Wire(a[i], true), netmap.Wire(b[i], true)
			w.t.Fatalf("%s: message %d differs between two servers (its text is the same: %t):\n%s\n%s", what, i, bytes.Equal(x, y), x[4:], y[4:])
		}
	}
}

// checkPrivacy verifies what must hold for every map.
func checkPrivacy(t testing.TB, w *world, v *controltest.View) {
	t.Helper()
	for _, n := range append(slices.Collect(maps.Values(v.Peers)), v.Node) {
		rec := w.nodes[n.ID]
		if len(rec.Tags) > 0 && w.users[n.User] != nil {
			t.Errorf("tagged node %d carries the user id of a person, %d", n.ID, n.User)
		}
		if len(rec.Tags) == 0 && n.User != rec.User {
			t.Errorf("node %d has user %d, want %d", n.ID, n.User, rec.User)
		}
		if n != v.Node && n.Cap != rec.State.Cap {
			t.Errorf("peer %d has capability version %d, its own is %d", n.ID, n.Cap, rec.State.Cap)
		}
		if n != v.Node && n.User == v.Node.User && len(rec.Tags) > 0 {
			t.Errorf("peer %d looks as if it had the viewer's owner", n.ID)
		}
		if h := n.Hostinfo; h.Valid() && (h.BackendLogID() != "" || h.IPNVersion() != "") {
			t.Errorf("node %d shows its log id or version", n.ID)
		}
		if n.Expired && n != v.Node && (*n.Online || len(n.Endpoints) > 0 || n.HomeDERP != 0) {
			t.Errorf("expired peer %d can be reached: %+v", n.ID, n)
		}
	}
}

func TestDeltasLeadToWhatAFreshMapSays(t *testing.T) {
	t.Parallel()
	for _, size := range []struct{ seeds, nodes, steps, viewers, leave int }{{24, 8, 40, 4, 0}, {1, 100, 25, 5, 0}, {1, 300, 16, 4, 90}} {
		for seed := range uint64(size.seeds) {
			if testing.Short() && seed > 10 {
				break
			}
			t.Run(fmt.Sprintf("%d nodes, seed %d", size.nodes, seed), func(t *testing.T) {
				history(t, newWorld(t, seed, size.nodes), size.steps, size.viewers, size.leave)
			})
		}
	}
}

// Dropped frames cost time and nothing else. The test is not parallel, since the limit is everybody's.
func TestDeltasAreRightWithoutRoomForFrames(t *testing.T) {
	limit := netmap.Frames.Limit()
	defer netmap.Frames.SetLimit(limit)
	for _, limit := range []int64{0, 20_000} {
		netmap.Frames.SetLimit(limit)
		for seed := range uint64(2) {
			t.Run(fmt.Sprintf("%d bytes, seed %d", limit, seed), func(t *testing.T) {
				history(t, newWorld(t, 100+seed, 20), 20, 4, 0)
				netmap.Frames.SetLimit(limit)
				if b := netmap.Frames.Bytes(); b > limit {
					t.Errorf("%d bytes are kept", b)
				}
			})
		}
	}
}

// atOnce is how many things move in a step. A database gives out ids by itself, so what comes and goes within a step would not be there.
func (w *world) atOnce() int {
	if w.store != nil {
		return 1
	}
	return 1 + w.IntN(3)
}

// history takes random steps. In the sixth so many nodes leave at once, which can make a snapshot give its slots anew.
func history(t *testing.T, w *world, steps, viewers, leave int) {
	defer func() {
		for i, n := range w.compared {
			if n == 0 && !t.Failed() {
				t.Errorf("no delta was compared with replica %d", i)
			}
		}
	}()
	var clients []*viewer
	var did []string
	defer func() {
		if t.Failed() {
			t.Logf("history: %s", strings.Join(did[max(0, len(did)-12):], "; "))
		}
	}()
	for step := range steps {
		for len(clients) < viewers {
			ids := slices.Sorted(maps.Keys(w.nodes))
			clients = append(clients, &viewer{id: ids[w.IntN(len(ids))]})
		}
		w.begin()
		var moves []string
		for range w.atOnce() {
			moves = append(moves, w.move())
		}
		if step == 5 {
			for _, id := range slices.Sorted(maps.Keys(w.nodes))[:leave] {
				w.leave(id)
			}
		}
		did = append(did, fmt.Sprintf("%d: %s", w.rev, strings.Join(moves, ", ")))
		w.publish()
		fresh := w.load()
		clients = slices.DeleteFunc(clients, func(c *viewer) bool { return w.nodes[c.id] == nil })
		for _, c := range clients {
			if w.IntN(3) == 0 {
				continue // a slow reader
			}
			c.catchUp(w)
			got := c.view.Text()
			if want := w.text(w.now, c.id); got != want {
				t.Fatalf("node %d at %d: the session and a fresh map differ:\n%s", c.id, w.rev, difference(got, want))
			}
			if want := w.text(fresh, c.id); got != want {
				t.Fatalf("node %d at %d: a server that starts now says otherwise:\n%s", c.id, w.rev, difference(got, want))
			}
			checkPrivacy(t, w, &c.view)
		}
		if t.Failed() {
			return
		}
	}
}

// difference lists the lines that only one of two texts has.
func difference(got, want string) string {
	var b strings.Builder
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for _, l := range g {
		if !slices.Contains(w, l) {
			fmt.Fprintf(&b, "got  %s\n", l)
		}
	}
	for _, l := range w {
		if !slices.Contains(g, l) {
			fmt.Fprintf(&b, "want %s\n", l)
		}
	}
	return b.String()
}
