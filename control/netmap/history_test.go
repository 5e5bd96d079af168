package netmap_test

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"go4.org/mem"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/netmap"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// epoch is when the histories begin.
var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// A world is the rows of a tailnet and the snapshots that follow them.
type world struct {
	*rand.Rand
	t         testing.TB
	rev       db.Revision
	nodes     map[tailcfg.NodeID]*db.Node
	users     map[tailcfg.UserID]*db.User
	settings  map[string]*db.Setting
	primaries map[netip.Prefix]tailcfg.NodeID
	policy    *db.PolicyVersion
	lastID    tailcfg.NodeID

	step     *db.Batch         // under construction
	now      *tailnet.Snapshot // follows step by step
	replicas [3]replica        // those of other servers
	store    *mirror           // the database that has the same rows, nil when snapshots are made of w's own
	compared [3]int            // deltas of each that were compared
}

// A replica is that of another server, which takes in the same history otherwise.
type replica struct {
	snap *tailnet.Snapshot
	due  *db.Batch   // what it has not followed yet; nil when it is at the present
	born db.Revision // where it was started last
}

// What the replicas of other servers do at a step.
const (
	everyStep = iota // follows each step, as w.now does
	inLeaps          // follows several at once, now and then
	restarts         // follows, and starts anew now and then
)

// policies are the texts that histories change between.
var policies = []string{
	`{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}`,
	`{"acls": []}`,
	`{"acls": [{"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*"]}]}`,
	`{"groups": {"group:g": ["u1@", "u2@"]}, "tagOwners": {"tag:a": ["group:g"], "tag:b": ["u3@"]},
	  "acls": [{"action": "accept", "src": ["group:g"], "dst": ["tag:a:22", "10.1.0.0/16:*"]}, {"action": "accept", "src": ["tag:b"], "dst": ["u2@:80"]}],
	  "ssh": [{"action": "accept", "src": ["group:g"], "dst": ["tag:a"], "users": ["root"]}]}`,
	`{"groups": {"group:g": ["u3@"]}, "tagOwners": {"tag:a": ["group:g"], "tag:b": ["u3@"]},
	  "acls": [{"action": "accept", "src": ["group:g"], "dst": ["tag:a:22"]}, {"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*", "tag:b:443"]}]}`,
	`{"tagOwners": {"tag:a": [], "tag:b": []}, "acls": [{"action": "accept", "src": ["autogroup:tagged"], "dst": ["autogroup:tagged:*"]}, {"action": "accept", "src": ["*"], "dst": ["autogroup:internet:*"]}],
	  "nodeAttrs": [{"target": ["tag:a"], "attr": ["disable-ipv4"]}, {"target": ["u1@"], "attr": ["nextdns:abc", "randomize-client-port"]}]}`,
	`{"tagOwners": {"tag:a": [], "tag:b": []}, "acls": [{"action": "accept", "src": ["u1@", "tag:a"], "dst": ["*:*"]}, {"action": "accept", "src": ["u2@"], "dst": ["10.2.0.0/16:53"]}],
	  "nodeAttrs": [{"target": ["autogroup:member"], "attr": ["magicdns-aaaa"]}, {"target": ["u2@"], "attr": ["disable-ipv4"]}]}`,
	`{"tagOwners": {"tag:a": [], "tag:b": []}, "grants": [{"src": ["u1@"], "dst": ["10.2.0.0/16"], "ip": ["*"], "via": ["tag:a"]},
	  {"src": ["u2@", "u3@"], "dst": ["autogroup:internet"], "ip": ["*"], "via": ["tag:b"]}, {"src": ["*"], "dst": ["tag:a", "tag:b"], "ip": ["tcp:22"]},
	  {"src": ["autogroup:member"], "dst": ["autogroup:self"], "ip": ["*"], "app": {"test.example/cap": [{"x": 1}]}}],
	  "ssh": [{"action": "check", "src": ["autogroup:member"], "dst": ["autogroup:self"], "users": ["autogroup:nonroot"]}],
	  "autoApprovers": {"routes": {"10.0.0.0/8": ["tag:a"]}, "exitNode": ["tag:b"]}}`,
	`{"tagOwners": {"tag:a": [], "tag:b": []}, "grants": [{"src": ["u1@"], "dst": ["10.2.0.0/16"], "ip": ["*"], "via": ["tag:b"]},
	  {"src": ["autogroup:member"], "dst": ["*"], "ip": ["tcp:443"]}], "nodeAttrs": [{"target": ["tag:b"], "attr": ["disable-ipv4"]}]}`,
}

func newWorld(t testing.TB, seed uint64, nodes int) *world {
	w := &world{
		Rand: rand.New(rand.NewPCG(seed, 1)), t: t, nodes: map[tailcfg.NodeID]*db.Node{}, users: map[tailcfg.UserID]*db.User{},
		settings: map[string]*db.Setting{}, primaries: map[netip.Prefix]tailcfg.NodeID{},
	}
	w.begin()
	for id := range tailcfg.UserID(4) {
		w.users[id+1] = &db.User{ID: id + 1, Name: fmt.Sprintf("u%d", id+1), Role: "member"}
	}
	w.set(tailnet.SettingDNS, `{"magicDNS": true, "baseDomain": "mesh.test"}`)
	w.set(tailnet.SettingDERPMap, `{"Regions": {"1": {"RegionID": 1}}}`)
	w.setPolicy(0)
	for range nodes {
		w.join()
	}
	w.now = w.load()
	for i := range w.replicas {
		w.replicas[i] = replica{snap: w.load()}
	}
	return w
}

func (w *world) begin() {
	w.step = &db.Batch{From: w.rev, Nodes: map[tailcfg.NodeID]*db.Node{}, Users: map[tailcfg.UserID]*db.User{}, Settings: map[string]*db.Setting{}}
	w.rev++
}

// load is the snapshot of a replica that starts now.
func (w *world) load() *tailnet.Snapshot {
	if w.store != nil {
		return w.store.load(w)
	}
	s, err := tailnet.Build(nil, &db.Batch{
		Full: true, To: w.rev, Nodes: maps.Clone(w.nodes), Users: maps.Clone(w.users), Policy: w.policy, Settings: maps.Clone(w.settings),
		Primaries: maps.Clone(w.primaries), PrimariesChanged: true,
	})
	w.check(s, err)
	return s
}

func (w *world) check(s *tailnet.Snapshot, err error) {
	w.t.Helper()
	if err == nil {
		err = s.Policy().Err
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// publish makes the snapshots that follow by the step.
func (w *world) publish() {
	w.t.Helper()
	w.step.To = w.rev
	if w.step.PrimariesChanged {
		w.step.Primaries = maps.Clone(w.primaries)
	}
	if w.store != nil {
		w.store.write(w)
	}
	follow := func(prev *tailnet.Snapshot, b *db.Batch) *tailnet.Snapshot {
		if w.store != nil {
			b = w.store.follow(w, prev)
		}
		next, err := tailnet.Build(prev, b)
		w.check(next, err)
		return next
	}
	w.now = follow(w.now, w.step)
	for i := range w.replicas {
		r := &w.replicas[i]
		switch r.due = merge(r.due, w.step); {
		case i == restarts && w.IntN(6) == 0:
			r.snap, r.due, r.born = w.load(), nil, w.rev
		case i != inLeaps || w.IntN(3) == 0:
			r.snap, r.due = follow(r.snap, r.due), nil
		}
	}
}

// merge is what a follower is given who takes in two steps at once.
func merge(first, then *db.Batch) *db.Batch {
	if first == nil {
		return then
	}
	b := *then
	b.From = first.From
	b.Nodes, b.Users, b.Settings = maps.Clone(first.Nodes), maps.Clone(first.Users), maps.Clone(first.Settings)
	maps.Copy(b.Nodes, then.Nodes)
	maps.Copy(b.Users, then.Users)
	maps.Copy(b.Settings, then.Settings)
	if b.Policy == nil {
		b.Policy = first.Policy
	}
	if first.PrimariesChanged && !then.PrimariesChanged {
		b.PrimariesChanged, b.Primaries = true, first.Primaries
	}
	return &b
}

func (w *world) set(name, value string) {
	w.settings[name] = &db.Setting{Name: name, Value: []byte(value), Hash: value}
	w.step.Settings[name] = w.settings[name]
}

func (w *world) setPolicy(i int) {
	w.policy = &db.PolicyVersion{ID: int64(w.rev), Revision: w.rev, Text: []byte(policies[i])}
	w.step.Policy = w.policy
}

// put replaces a row, as the database hands out new ones for what moved.
func (w *world) put(n db.Node) {
	w.nodes[n.ID] = &n
	w.step.Nodes[n.ID] = &n
}

// bytes are those of a key that depends on the history alone.
func (w *world) bytes() []byte {
	b := make([]byte, 32)
	for i := range b {
		b[i] = byte(w.Uint32())
	}
	return b
}

func (w *world) nodeKey() key.NodePublic {
	return key.NodePublicFromRaw32(mem.B(w.bytes()))
}

func (w *world) discoKey() key.DiscoPublic {
	return key.DiscoPublicFromRaw32(mem.B(w.bytes()))
}

func (w *world) owner(n *db.Node) {
	n.User, n.Tags = 0, nil
	switch w.IntN(4) {
	case 0:
		n.Tags = [][]string{{"tag:a"}, {"tag:b"}, {"tag:a", "tag:b"}}[w.IntN(3)]
	default:
		n.User = tailcfg.UserID(1 + w.IntN(len(w.users)))
	}
}

func (w *world) join() {
	w.lastID++
	id := w.lastID
	n := db.Node{
		ID: id, StableID: tailcfg.StableNodeID(fmt.Sprintf("n%dCNTRL", id)), MachineKey: key.MachinePublicFromRaw32(mem.B(w.bytes())), NodeKey: w.nodeKey(),
		Hostname: fmt.Sprintf("h%d", id), GivenName: fmt.Sprintf("h%d", id), IPv4: netip.AddrFrom4([4]byte{100, 64, byte(id >> 8), byte(id)}),
		IPv6: netip.MustParseAddr(fmt.Sprintf("fd7a:115c:a1e0::%x", int(id))), Created: epoch,
	}
	w.owner(&n)
	if w.IntN(5) > 0 {
		n.State = db.NodeState{DiscoKey: w.discoKey(), Hostinfo: w.hostinfo(), Cap: 142, HomeDERP: 1, Endpoints: w.endpoints(), LastSeen: epoch}
	}
	w.put(n)
}

var routes = []netip.Prefix{
	netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("10.2.0.0/16"), netip.MustParsePrefix("10.2.3.0/24"),
	netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0"),
}

func (w *world) some(list []netip.Prefix) (out []netip.Prefix) {
	for _, r := range list {
		if w.IntN(2) == 0 {
			out = append(out, r)
		}
	}
	return out
}

func (w *world) hostinfo() *tailcfg.Hostinfo {
	h := &tailcfg.Hostinfo{Hostname: "h", OS: []string{"linux", "windows", "macOS"}[w.IntN(3)], IPNVersion: fmt.Sprintf("1.%d.0", w.IntN(3)), BackendLogID: "x"}
	if w.IntN(2) == 0 {
		h.Services = []tailcfg.Service{{Proto: tailcfg.PeerAPI4, Port: uint16(w.IntN(3) + 1)}, {Proto: tailcfg.TCP, Port: 22}}
	}
	if w.IntN(2) == 0 {
		h.RoutableIPs = w.some(routes)
	}
	return h
}

func (w *world) endpoints() (out []tailcfg.Endpoint) {
	for range w.IntN(3) {
		out = append(out, tailcfg.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(w.Uint32())}), 41641)})
	}
	return out
}

// move changes one thing.
func (w *world) move() string {
	ids := slices.Sorted(maps.Keys(w.nodes))
	if len(ids) < 2 {
		w.join()
		return "join"
	}
	n := *w.nodes[ids[w.IntN(len(ids))]]
	at := epoch.Add(time.Duration(w.rev) * time.Minute)
	kinds := map[string]func(){
		"join":      w.join,
		"leave":     func() { w.leave(n.ID) },
		"endpoints": func() { n.State.Endpoints = w.endpoints(); w.put(n) },
		"derp":      func() { n.State.HomeDERP = w.IntN(3); w.put(n) },
		"online":    func() { n.State.Online = true; w.put(n) },
		"offline":   func() { n.State.Online, n.State.LastSeen = false, at; w.put(n) },
		"disco":     func() { n.State.DiscoKey = w.discoKey(); w.put(n) },
		"all of it": func() {
			n.State.Endpoints, n.State.HomeDERP, n.State.DiscoKey, n.State.Online = w.endpoints(), 1+w.IntN(3), w.discoKey(), true
			w.put(n)
		},
		"hostinfo": func() { n.State.Hostinfo = w.hostinfo(); w.put(n) },
		"cap":      func() { n.State.Cap = tailcfg.CapabilityVersion(113 + w.IntN(30)); w.put(n) },
		"approve":  func() { n.ApprovedRoutes = w.some(routes); w.put(n) },
		"rename":   func() { n.GivenName = fmt.Sprintf("h%d-%d", n.ID, w.rev); w.put(n) },
		"owner":    func() { w.owner(&n); w.put(n) },
		"rekey":    func() { n.NodeKey, n.Expired, n.LoggedOut = w.nodeKey(), false, false; w.put(n) },
		"expire":   func() { n.Expired, n.Expiry = true, at; w.put(n) },
		"logout":   func() { n.LoggedOut, n.Expired, n.Expiry = true, true, at; w.put(n) },
		"renew":    func() { n.Expired, n.LoggedOut, n.Expiry = false, false, at.Add(time.Hour); w.put(n) },
		"address":  func() { n.IPv4 = netip.AddrFrom4([4]byte{100, 65, byte(w.rev >> 8), byte(w.rev)}); w.put(n) },
		"policy":   func() { w.setPolicy(w.IntN(len(policies))) },
		"user":     func() { w.putUser() },
		"dns": func() {
			w.set(tailnet.SettingDNS, fmt.Sprintf(`{"magicDNS": %t, "baseDomain": "mesh.test", "global": ["192.0.2.%d", "https://dns.nextdns.io/p"]}`, w.IntN(2) == 0, w.IntN(3)))
		},
		"suffix": func() {
			w.set(tailnet.SettingDNS, fmt.Sprintf(`{"magicDNS": true, "baseDomain": "m%d.test"}`, w.IntN(2)))
		},
		"records": func() {
			w.set(tailnet.SettingExtraRecords, fmt.Sprintf(`[{"Name": "x%d.test", "Value": "192.0.2.1"}]`, w.IntN(3)))
		},
		"relays": func() {
			w.set(tailnet.SettingDERPMap, fmt.Sprintf(`{"Regions": {"%d": {"RegionID": 1}}}`, 1+w.IntN(3)))
		},
		"dial plan": func() {
			w.set(tailnet.SettingDialPlan, []string{
				`{"Candidates": null}`, `{"Candidates": [{"IP": "203.0.113.7", "DialTimeoutSec": 10}]}`,
				`{"Candidates": [{"IP": "203.0.113.8", "DialTimeoutSec": 10}, {"IP": "203.0.113.7", "DialStartDelaySec": 0.3, "DialTimeoutSec": 10}]}`,
			}[w.IntN(3)])
		},
		"options": func() {
			w.set(tailnet.SettingOptions, fmt.Sprintf(`{"displayName": "n%d", "taildrop": %t}`, w.IntN(3), w.IntN(2) == 0))
		},
		"primary": w.elect,
		"router": func() {
			h := *w.hostinfo()
			h.RoutableIPs = w.some(routes)
			n.State.Hostinfo, n.ApprovedRoutes, n.State.Online = &h, h.RoutableIPs, true
			w.put(n)
		},
	}
	names := slices.Sorted(maps.Keys(kinds))
	// Changes of the whole tailnet are rarer.
	name := names[w.IntN(len(names))]
	switch w.IntN(9) {
	case 0:
		name = []string{"router", "primary", "policy"}[w.IntN(3)]
	case 1, 2, 3, 4, 5:
		name = []string{"join", "leave", "endpoints", "online", "offline", "derp", "hostinfo", "disco"}[w.IntN(8)]
	}
	kinds[name]()
	return name
}

// elect gives a route that several nodes may serve another primary.
func (w *world) elect() {
	p := routes[w.IntN(3)]
	var may []tailcfg.NodeID
	for _, id := range slices.Sorted(maps.Keys(w.nodes)) {
		if slices.Contains(w.nodes[id].ApprovedRoutes, p) {
			may = append(may, id)
		}
	}
	if len(may) > 0 {
		w.primaries[p] = may[w.IntN(len(may))]
		w.step.PrimariesChanged = true
	}
}

func (w *world) putUser() {
	id := tailcfg.UserID(1 + w.IntN(len(w.users)+1))
	u := &db.User{ID: id, Name: fmt.Sprintf("u%d", id), DisplayName: fmt.Sprintf("D%d", w.rev), Role: []string{"member", "admin"}[w.IntN(2)]}
	w.users[id], w.step.Users[id] = u, u
}

func (w *world) leave(id tailcfg.NodeID) {
	delete(w.nodes, id)
	w.step.Nodes[id] = nil
	for p, n := range w.primaries {
		if n == id {
			delete(w.primaries, p)
			w.step.PrimariesChanged = true
		}
	}
}

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
