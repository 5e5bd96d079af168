package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/util/zstdframe"
)

// bench is a book with n known nodes and one view of it.
type bench struct {
	t      *testing.T
	book   *book
	view   *view
	nodes  []*tailcfg.Node
	faults []string
	now    time.Time
}

func newBench(t *testing.T, n int) *bench {
	b := &bench{t: t, now: time.Unix(1_700_000_000, 0)}
	keys := make([]key.NodePublic, n)
	for i := range n {
		keys[i] = key.NewNode().Public()
		addr := netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64, 0, byte(i + 1)}), 32)
		online := true
		b.nodes = append(b.nodes, &tailcfg.Node{
			ID: tailcfg.NodeID(i + 1), StableID: tailcfg.StableNodeID(fmt.Sprint("n", i+1)), Name: fmt.Sprintf("h%d.example.", i),
			User: 7, Key: keys[i], DiscoKey: key.NewDisco().Public(), Addresses: []netip.Prefix{addr}, AllowedIPs: []netip.Prefix{addr},
			Endpoints: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:1")}, HomeDERP: 1, Online: &online, Cap: 113,
			MachineAuthorized: true, Hostinfo: (&tailcfg.Hostinfo{OS: "linux", Hostname: `a "quoted" \ name`}).View(),
		})
	}
	b.book = newBook(keys)
	b.view = newView(b.book)
	b.view.fault = func(kind, format string, args ...any) {
		b.faults = append(b.faults, kind+": "+fmt.Sprintf(format, args...))
	}
	b.send(&tailcfg.MapResponse{Node: b.nodes[0], Peers: b.nodes[1:], UserProfiles: []tailcfg.UserProfile{{ID: 7, LoginName: "ann"}}})
	return b
}

func (b *bench) send(m *tailcfg.MapResponse) {
	b.t.Helper()
	text, err := json.Marshal(m)
	if err != nil {
		b.t.Fatal(err)
	}
	b.sendZ(zstdframe.AppendEncode(nil, text))
}

func (b *bench) sendZ(z []byte) {
	b.t.Helper()
	m, err := b.book.message(z)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := b.view.apply(m, b.now); err != nil {
		b.t.Fatal(err)
	}
}

// peer returns what the view holds of the node with this ID.
func (b *bench) peer(id tailcfg.NodeID) *tailcfg.Node {
	slot, ok := b.book.known(id)
	if !ok || b.view.at(slot) == nil {
		return nil
	}
	return b.view.at(slot).node
}

func (b *bench) wantFault(part string) {
	b.t.Helper()
	if len(b.faults) != 1 || !strings.Contains(b.faults[0], part) {
		b.t.Fatalf("faults %q, want one with %q", b.faults, part)
	}
	b.faults = nil
}

func TestFirstMapGivesAllPeers(t *testing.T) {
	b := newBench(t, 200)
	if b.view.count != 199 || len(b.faults) > 0 {
		t.Fatalf("%d peers, faults %q; want 199 and none", b.view.count, b.faults)
	}
	for _, n := range b.nodes[1:] {
		got, want := b.peer(n.ID), n
		if got.Key != want.Key || got.Name != want.Name || got.Hostinfo.Hostname() != want.Hostinfo.Hostname() {
			t.Fatalf("got %+v, want %+v", got, want)
		}
	}
	if slot, _ := b.book.known(5); slot != 4 {
		t.Errorf("node 5 is in slot %d, want that of its key, 4", slot)
	}
}

func TestMessageMayBeManyZstdFrames(t *testing.T) {
	b := newBench(t, 3)
	var z []byte
	for _, part := range []string{`{"PeersChangedPatch":[{"NodeID":2,"DERP`, ``, `Region":9},`, `{"NodeID":3,"DERPRegion":8}]`, `}`} {
		z = zstdframe.AppendEncode(z, []byte(part))
	}
	b.sendZ(z)
	if got := [2]int{b.peer(2).HomeDERP, b.peer(3).HomeDERP}; got != [2]int{9, 8} {
		t.Fatalf("home DERPs %v, want [9 8]", got)
	}
}

// TestPeerFieldsAreAppliedInTheClientsOrder sends everything in one message;
// each later field must win over the earlier ones.
func TestPeerFieldsAreAppliedInTheClientsOrder(t *testing.T) {
	b := newBench(t, 4)
	off := false
	joined := b.nodes[3].Clone()
	joined.ID, joined.Name, joined.Online = 9, "new.example.", &off
	b.send(&tailcfg.MapResponse{
		PeersRemoved:      []tailcfg.NodeID{2},
		PeersChanged:      []*tailcfg.Node{joined},
		PeerSeenChange:    map[tailcfg.NodeID]bool{9: true},
		OnlineChange:      map[tailcfg.NodeID]bool{9: true, 3: true},
		PeersChangedPatch: []*tailcfg.PeerChange{{NodeID: 3, Online: &off}, {NodeID: 9, DERPRegion: 5}},
	})
	if len(b.faults) > 0 {
		t.Fatal(b.faults)
	}
	if b.peer(2) != nil || b.view.count != 3 {
		t.Errorf("node 2 is %v in a view of %d, want it gone and 3 left", b.peer(2), b.view.count)
	}
	if n := b.peer(9); n == nil || !*n.Online || !n.LastSeen.Equal(b.now) || n.HomeDERP != 5 {
		t.Errorf("node 9 is %+v, want it added, then seen, then online, then patched", n)
	}
	if *b.peer(3).Online {
		t.Error("node 3 is online: OnlineChange was applied after the patch")
	}
}

func TestPatchOfAnUnknownNodeIsDroppedAndCounted(t *testing.T) {
	b := newBench(t, 3)
	off := false
	b.send(&tailcfg.MapResponse{PeersChangedPatch: []*tailcfg.PeerChange{{NodeID: 77, Online: &off}}})
	b.wantFault("PeersChangedPatch for node 77")
	b.send(&tailcfg.MapResponse{OnlineChange: map[tailcfg.NodeID]bool{78: false}})
	b.wantFault("OnlineChange for node 78")
	// Once removed, a node that others still see is unknown to this viewer.
	b.send(&tailcfg.MapResponse{PeersRemoved: []tailcfg.NodeID{2}})
	b.send(&tailcfg.MapResponse{PeersChangedPatch: []*tailcfg.PeerChange{{NodeID: 2, Online: &off}}})
	b.wantFault("PeersChangedPatch for node 2")
	if b.view.count != 1 {
		t.Errorf("%d peers, want 1", b.view.count)
	}
}

func TestFullListReplacesEverythingAndPrecludesDeltas(t *testing.T) {
	b := newBench(t, 4)
	b.send(&tailcfg.MapResponse{Peers: b.nodes[2:3], PeersRemoved: []tailcfg.NodeID{3}})
	if b.view.count != 1 || b.peer(3) == nil || len(b.faults) > 0 {
		t.Fatalf("%d peers, node 3 %v, faults %q; want node 3 alone", b.view.count, b.peer(3), b.faults)
	}
	b.sendZ(zstdframe.AppendEncode(nil, []byte(`{"Peers":[]}`)))
	if b.view.count != 1 {
		t.Errorf("an empty Peers list left %d peers; it means no change", b.view.count)
	}
}

// TestFullNodeIsTurnedIntoAPatch covers what clients cannot be told by a
// complete node: to a node they know, its zero fields change nothing.
func TestFullNodeIsTurnedIntoAPatch(t *testing.T) {
	b := newBench(t, 3)
	n := b.nodes[1].Clone()
	n.HomeDERP, n.Online, n.Endpoints = 0, nil, nil
	b.send(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n}})
	got := b.peer(2)
	if got.HomeDERP != 1 || got.Online == nil || !*got.Online {
		t.Errorf("home DERP %d, online %v: want the old 1 and true", got.HomeDERP, got.Online)
	}
	if len(got.Endpoints) != 0 {
		t.Errorf("endpoints %v, want none", got.Endpoints)
	}
	// With a field that no patch has, the node replaces the old one as it is.
	n.Name = "renamed.example."
	b.send(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n}})
	if got := b.peer(2); got.HomeDERP != 0 || got.Online != nil || got.Name != n.Name {
		t.Errorf("got %+v, want %+v", got, n)
	}
}

func TestRemovedAndChangedInOneMessageIsLost(t *testing.T) {
	b := newBench(t, 3)
	n := b.nodes[1].Clone()
	n.HomeDERP = 4
	b.send(&tailcfg.MapResponse{PeersRemoved: []tailcfg.NodeID{2}, PeersChanged: []*tailcfg.Node{n}})
	b.wantFault("removed and changed in one message")
	if b.peer(2) != nil {
		t.Error("node 2 is back; the client turns it into a patch and drops that")
	}
}

func TestOldDiscoPatchIsIgnored(t *testing.T) {
	b := newBench(t, 3)
	off, seen := false, b.now
	b.send(&tailcfg.MapResponse{PeersChangedPatch: []*tailcfg.PeerChange{{NodeID: 2, Online: &off, LastSeen: &seen}}})
	disco, was := key.NewDisco().Public(), b.peer(2).DiscoKey
	b.send(&tailcfg.MapResponse{PeersChangedPatch: []*tailcfg.PeerChange{{NodeID: 2, DiscoKey: &disco, Online: &off, LastSeen: &seen}}})
	b.wantFault("patch ignored")
	if b.peer(2).DiscoKey != was {
		t.Error("the disco key was taken although the node was not seen since")
	}
	later := seen.Add(time.Second)
	b.send(&tailcfg.MapResponse{PeersChangedPatch: []*tailcfg.PeerChange{{NodeID: 2, DiscoKey: &disco, Online: &off, LastSeen: &later}}})
	if b.peer(2).DiscoKey != disco || len(b.faults) > 0 {
		t.Errorf("disco key %v, faults %q; want the new one", b.peer(2).DiscoKey, b.faults)
	}
}

func TestNamedFiltersAreSticky(t *testing.T) {
	b := newBench(t, 2)
	rule := func(port uint16) []tailcfg.FilterRule {
		return []tailcfg.FilterRule{{SrcIPs: []string{"100.64.0.0/24"}, DstPorts: []tailcfg.NetPortRange{{IP: "*", Ports: tailcfg.PortRange{First: port, Last: port}}}}}
	}
	src, dst := netip.MustParseAddr("100.64.0.9"), netip.MustParseAddr("100.64.0.1")
	open := func() []uint16 {
		var ports []uint16
		for port := range uint16(5) {
			if b.view.allows(src, dst, port) {
				ports = append(ports, port)
			}
		}
		return ports
	}
	send := func(m map[string][]tailcfg.FilterRule, want ...uint16) {
		t.Helper()
		b.send(&tailcfg.MapResponse{PacketFilters: m})
		if got := open(); !slices.Equal(got, want) {
			t.Fatalf("after %v ports %v are open, want %v", m, got, want)
		}
	}
	send(map[string][]tailcfg.FilterRule{"base": rule(1)}, 1)
	send(map[string][]tailcfg.FilterRule{"more": rule(2)}, 1, 2)
	send(map[string][]tailcfg.FilterRule{"base": {}}, 2)
	send(map[string][]tailcfg.FilterRule{"more": nil}, []uint16(nil)...)
	send(map[string][]tailcfg.FilterRule{"a": rule(3), "b": rule(4)}, 3, 4)
	send(map[string][]tailcfg.FilterRule{"*": nil, "c": rule(1)}, 1)
	b.send(&tailcfg.MapResponse{PacketFilter: rule(2)})
	if got := open(); !slices.Equal(got, []uint16{1, 2}) {
		t.Errorf("PacketFilter is not the filter named base: open %v", got)
	}
}

func TestUserProfilesStayAndMustComeInTime(t *testing.T) {
	b := newBench(t, 3)
	n := b.nodes[1].Clone()
	n.ID, n.User, n.Name = 50, 8, "late.example."
	b.send(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n}})
	b.wantFault("before the profile of its user 8")
	b.send(&tailcfg.MapResponse{UserProfiles: []tailcfg.UserProfile{{ID: 8, LoginName: "bob"}}})
	n2 := n.Clone()
	n2.ID = 51
	b.send(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n2}})
	if len(b.faults) > 0 {
		t.Error(b.faults)
	}
}

func TestViewersOfEqualBytesShareOnePeer(t *testing.T) {
	b := newBench(t, 3)
	other := newView(b.book)
	text, err := json.Marshal(&tailcfg.MapResponse{Node: b.nodes[2], Peers: b.nodes[:2]})
	if err != nil {
		t.Fatal(err)
	}
	m, err := b.book.parse(text)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.apply(m, b.now); err != nil {
		t.Fatal(err)
	}
	if b.view.at(1) != other.at(1) {
		t.Error("two viewers of node 2 hold two copies")
	}
}

func TestTwoNodesWithOneKeyDoNotHideEachOther(t *testing.T) {
	b := newBench(t, 3)
	n := b.nodes[1].Clone()
	n.ID = 60
	b.send(&tailcfg.MapResponse{PeersChanged: []*tailcfg.Node{n}})
	if b.view.count != 3 || b.peer(2) == nil || b.peer(60) == nil {
		t.Errorf("%d peers, node 2 %v, node 60 %v; want three", b.view.count, b.peer(2), b.peer(60))
	}
}

func TestFirstMessageMustHaveTheOwnNode(t *testing.T) {
	b := newBench(t, 2)
	v := newView(b.book)
	if err := v.apply(&message{keepAlive: true}, b.now); err != nil {
		t.Errorf("KeepAlive first: %v", err)
	}
	if err := v.apply(&message{}, b.now); err == nil {
		t.Error("a first message without Node was taken")
	}
}

func TestDifferenceFromTheTruthIsFound(t *testing.T) {
	b := newBench(t, 2)
	n := b.nodes[1]
	good := fact{version: 1, key: n.Key, disco: n.DiscoKey, endpoints: n.Endpoints, derp: 1, online: true, hostname: "h1", self: n}
	n.Cap = capability
	if why := differs(n, &good); why != "" {
		t.Fatalf("equal, but: %s", why)
	}
	for want, change := range map[string]func(*fact){
		"node key":    func(f *fact) { f.key = b.nodes[0].Key },
		"disco key":   func(f *fact) { f.disco = b.nodes[0].DiscoKey },
		"endpoints":   func(f *fact) { f.endpoints = nil },
		"home DERP":   func(f *fact) { f.derp = 2 },
		"online":      func(f *fact) { f.online = false },
		"want host":   func(f *fact) { f.hostname = "h" },
		"addresses":   func(f *fact) { f.self = f.self.Clone(); f.self.Addresses = nil },
		"allowed IPs": func(f *fact) { f.self = f.self.Clone(); f.self.AllowedIPs = nil },
	} {
		f := good
		change(&f)
		if why := differs(n, &f); !strings.Contains(why, want) {
			t.Errorf("found %q, want %q", why, want)
		}
	}
}

func TestScannerAgreesWithEncodingJSON(t *testing.T) {
	for _, text := range []string{
		`{}`, ` { } `, `{"a":1}`, `{"a":"x\"}]{[","b":[1,{"c":"\\"}],"d":null}`, "{\"a\" :\t[ ] , \"b\": -1.5e3\n}",
		`{`, `{"a"}`, `{"a":}`, `{"a":1,}`, `{"a":1}x`, `{"a":"`, `[]`, ``, `{"a":[1}`,
	} {
		var want map[string]json.RawMessage
		wantErr := json.Unmarshal([]byte(text), &want)
		got := map[string]string{}
		err := eachField([]byte(text), func(k, v []byte) error { got[string(k)] = string(v); return nil })
		if (err != nil) != (wantErr != nil) {
			t.Errorf("%q: error %v, encoding/json says %v", text, err, wantErr)
			continue
		}
		for k, v := range want {
			if err == nil && got[k] != string(v) {
				t.Errorf("%q: %s is %q, want %q", text, k, got[k], v)
			}
		}
	}
}

func TestMalformedMessageIsAnError(t *testing.T) {
	b := newBench(t, 2)
	for _, text := range []string{`{"Peers":[{]}`, `{"Peers":[{"ID":1}`, `{"PeersChanged":[{"Name":"x"}]}`, `{"Domain":"a","Domain":"b"}`, `[]`} {
		if _, err := b.book.parse([]byte(text)); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
	if _, err := b.book.message([]byte("not zstd")); err == nil {
		t.Error("a message that is not zstd was taken")
	}
}

func TestScenarioVisibilityIsSymmetricAndPartial(t *testing.T) {
	for name, want := range map[string][2]float64{"allow-all": {199, 199}, "self": {9, 9}, "acls": {10, 60}} {
		s, err := newScenario(name, 200)
		if err != nil {
			t.Fatal(err)
		}
		rows, sum := s.visibility(), 0
		for i, row := range rows {
			sum += row.count()
			for j := range rows {
				if row.has(j) != rows[j].has(i) {
					t.Fatalf("%s: %d sees %d: %v, the other way %v", name, i, j, row.has(j), rows[j].has(i))
				}
			}
		}
		if avg := float64(sum) / 200; avg < want[0] || avg > want[1] {
			t.Errorf("%s: %.1f peers each, want %v", name, avg, want)
		}
		if !json.Valid([]byte(s.policy(4242))) {
			t.Errorf("%s: the policy is not JSON", name)
		}
	}
}

// BenchmarkFullMap is what a full map of 1000 peers costs a viewer when others
// had the same peers before.
func BenchmarkFullMap(b *testing.B) {
	bench := newBench(&testing.T{}, 250)
	var all []*tailcfg.Node
	for i := range 1000 {
		n := bench.nodes[i%250].Clone()
		n.ID, n.Key, n.DiscoKey = tailcfg.NodeID(i+1), key.NewNode().Public(), key.NewDisco().Public()
		all = append(all, n)
	}
	text, err := json.Marshal(&tailcfg.MapResponse{Node: all[0], Peers: all[1:], UserProfiles: []tailcfg.UserProfile{{ID: 7, LoginName: "ann"}}})
	if err != nil {
		b.Fatal(err)
	}
	z := zstdframe.AppendEncode(nil, text)
	b.ReportAllocs()
	for b.Loop() {
		m, err := bench.book.decode(z)
		if err != nil {
			b.Fatal(err)
		}
		if err := newView(bench.book).apply(m, bench.now); err != nil {
			b.Fatal(err)
		}
	}
}
