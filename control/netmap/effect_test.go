package netmap_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/netmap"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// fleet is a world in which node i belongs to person i%4+1 and is online.
func fleet(t *testing.T, policy string, nodes int) *world {
	w := newWorld(t, 1, 0)
	w.begin()
	w.policy = &db.PolicyVersion{ID: int64(w.rev), Revision: w.rev, Text: []byte(policy)}
	w.step.Policy = w.policy
	for i := range nodes {
		w.lastID++
		id := w.lastID
		w.put(db.Node{
			ID: id, StableID: tailcfg.StableNodeID(fmt.Sprintf("n%dCNTRL", id)), NodeKey: w.nodeKey(), User: tailcfg.UserID(i%4 + 1), GivenName: fmt.Sprintf("h%d", id),
			IPv4: netip.AddrFrom4([4]byte{100, 64, 0, byte(id)}), Created: epoch,
			State: db.NodeState{DiscoKey: w.discoKey(), Hostinfo: &tailcfg.Hostinfo{OS: "linux"}, Cap: 142, HomeDERP: 1, Online: true},
		})
	}
	w.publish()
	return w
}

// first is the message that begins a session of the viewer.
func first(t *testing.T, s *tailnet.Snapshot, id tailcfg.NodeID) *tailcfg.MapResponse {
	t.Helper()
	z, err := controltest.ReadMessage(bytes.NewReader(netmap.Wire(netmap.Full(s, netmap.Viewer{Slot: s.Node(id).Slot}), false)))
	if err != nil {
		t.Fatal(err)
	}
	m := new(tailcfg.MapResponse)
	if err := controltest.Decode(z, m); err != nil {
		t.Fatal(err)
	}
	return m
}

// Clients before capability version 131 read auto_update.enabled from the message, later ones from their node. Both say the same.
func TestAutoUpdateIsSaidInBothForms(t *testing.T) {
	for _, on := range []string{"true", "false"} {
		w := fleet(t, policies[0], 2)
		w.begin()
		w.set(tailnet.SettingOptions, `{"autoUpdate": `+on+`}`)
		w.publish()
		m := first(t, w.now, 1)
		if got := m.Node.CapMap[tailcfg.NodeAttrDefaultAutoUpdate]; len(got) != 1 || string(got[0]) != on || string(m.DeprecatedDefaultAutoUpdate) != on {
			t.Errorf("updates %s: capability %q, field %q", on, got, m.DeprecatedDefaultAutoUpdate)
		}
	}
}

// to is what a viewer is sent between two snapshots.
func to(from, now *tailnet.Snapshot, id tailcfg.NodeID) string {
	var out strings.Builder
	for _, m := range netmap.Between(tailnet.Diff(from, now), netmap.Viewer{Slot: now.Node(id).Slot}) {
		out.Write(netmap.Wire(m, true)[4:])
	}
	return out.String()
}

// An endpoint or presence change must not run the policy compiler: the compiled access stays the same object.
func TestReportsRunNoPolicyCode(t *testing.T) {
	w := fleet(t, policies[0], 8)
	before := w.now
	w.begin()
	n := *w.nodes[3]
	n.State.Endpoints = []tailcfg.Endpoint{{Addr: netip.MustParseAddrPort("192.0.2.1:41641")}}
	n.State.Online, n.State.HomeDERP = false, 2
	w.put(n)
	w.publish()
	if w.now.Access() != before.Access() || w.now.ACLTailnet() != before.ACLTailnet() {
		t.Error("the policy was compiled again")
	}
	if got := to(before, w.now, 1); !strings.Contains(got, "PeersChangedPatch") || !strings.Contains(got, "192.0.2.1:41641") {
		t.Errorf("a peer was sent %q", got)
	}
}

// An edit of one group is no business of those whom it does not concern.
func TestEditOfOneGroupWritesNothingToOthers(t *testing.T) {
	policy := func(members string) string {
		return `{"groups": {"group:g": [` + members + `], "group:other": ["u3@"]},
			"acls": [{"action": "accept", "src": ["group:g"], "dst": ["u2@:22"]}, {"action": "accept", "src": ["group:other"], "dst": ["u4@:443"]}]}`
	}
	w := fleet(t, policy(`"u1@"`), 16)
	before := w.now
	w.begin()
	w.policy = &db.PolicyVersion{ID: int64(w.rev), Revision: w.rev, Text: []byte(policy(`"u1@", "u4@"`))}
	w.step.Policy = w.policy
	w.publish()
	for id := range tailcfg.NodeID(16) {
		id++
		got, concerned := to(before, w.now, id), w.nodes[id].User == 2 || w.nodes[id].User == 4
		if concerned && got == "" {
			t.Errorf("node %d of u%d was sent nothing", id, w.nodes[id].User)
		}
		if !concerned && got != "" {
			t.Errorf("node %d of u%d was sent %s", id, w.nodes[id].User, got)
		}
	}
}

// A derpMap of the policy lies over the servers' relays and reaches clients with the edit.
func TestPolicysRelaysLieOverTheServers(t *testing.T) {
	w := fleet(t, policies[0], 2)
	before := w.now
	if before.DERPMap().Regions[1] == nil {
		t.Fatal("no region 1")
	}
	edit := func(derp string) *tailnet.Snapshot {
		w.begin()
		w.policy = &db.PolicyVersion{ID: int64(w.rev), Revision: w.rev, Text: []byte(`{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]` + derp + `}`)}
		w.step.Policy = w.policy
		w.publish()
		return w.now
	}
	region := `"900": {"RegionID": 900, "RegionCode": "own", "Nodes": [{"Name": "900a", "RegionID": 900, "HostName": "relay.example.com"}]}`
	both := edit(`, "derpMap": {"Regions": {` + region + `}}`)
	if m := both.DERPMap(); m.Regions[1] == nil || m.Regions[900] == nil {
		t.Errorf("beside the servers' region: %+v", m.Regions)
	}
	if got := to(before, both, 1); !strings.Contains(got, "relay.example.com") {
		t.Errorf("a client was sent %q", got)
	}
	if m := edit(`, "derpMap": {"OmitDefaultRegions": true, "Regions": {` + region + `}}`).DERPMap(); m.Regions[1] != nil || m.Regions[900] == nil {
		t.Errorf("without the servers' regions: %+v", m.Regions)
	}
	if m := edit(`, "derpMap": {"Regions": {"1": null}}`).DERPMap(); m.Regions[1] != nil {
		t.Errorf("region 1 set to null: %+v", m.Regions)
	}
	after := edit("")
	if m := after.DERPMap(); m.Regions[1] == nil || m.Regions[900] != nil {
		t.Errorf("taken back: %+v", m.Regions)
	}
	if again := edit(" "); again.DERPMap() != after.DERPMap() || to(after, again, 1) != "" {
		t.Error("an edit that changes no relay sends the relay map")
	}
}

// A client keeps a dial plan for the life of its process, so that one which is over has to be said, too.
func TestDialPlanIsSentWhenItChangesAndWhenItEnds(t *testing.T) {
	const plan = `"ControlDialPlan":{"Candidates":[{"IP":"203.0.113.7","DialTimeoutSec":10}]}`
	const none = `"ControlDialPlan":{"Candidates":null}`
	w := fleet(t, policies[0], 4)
	full := func() string {
		return string(netmap.Wire(netmap.Full(w.now, netmap.Viewer{Slot: 0}), true))
	}
	if strings.Contains(full(), "ControlDialPlan") {
		t.Error("a tailnet without a plan sends one")
	}
	for _, want := range []string{plan, none} {
		before := w.now
		w.begin()
		w.set(tailnet.SettingDialPlan, "{"+want[len(`"ControlDialPlan":{`):])
		w.publish()
		if got := to(before, w.now, 1); got != "{"+want+"}" {
			t.Errorf("a session was sent %q, want %s", got, want)
		}
		if !strings.Contains(full(), want) {
			t.Errorf("a first map lacks %s", want)
		}
		before = w.now
		w.begin()
		w.set(tailnet.SettingOptions, fmt.Sprintf(`{"displayName": "n%d"}`, len(want)))
		w.publish()
		if got := to(before, w.now, 1); strings.Contains(got, "ControlDialPlan") {
			t.Errorf("the plan was repeated without need: %q", got)
		}
	}
}
