package netmap_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"go4.org/mem"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

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
