package tailnet

import (
	"net/netip"
	"testing"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/db"
)

// A stored policy was right when it was stored. When the tailnet moves under it, so that a name in it denotes nobody or two people, that name
// opens nothing, and everything else stays as it was.
func TestStoredPolicyOutlivesTheNamesInIt(t *testing.T) {
	node := func(id tailcfg.NodeID, user tailcfg.UserID) *db.Node {
		return &db.Node{
			ID: id, NodeKey: key.NewNode().Public(), User: user, GivenName: "n" + string(rune('0'+id)), IPv4: netip.AddrFrom4([4]byte{100, 64, 0, byte(id)}),
			State: db.NodeState{DiscoKey: key.NewDisco().Public()},
		}
	}
	policy := `{
		"acls": [{"action": "accept", "src": ["ann@"], "dst": ["ann@:*"]}, {"action": "accept", "src": ["user:*@corp.example"], "dst": ["ann@:22"]}],
		"ssh": [{"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self"], "users": ["localpart:*@corp.example"]}]}`
	s, err := Build(nil, &db.Batch{
		Full: true, To: 1, Users: map[tailcfg.UserID]*db.User{1: {ID: 1, Name: "ann"}, 2: {ID: 2, Name: "ben", Email: "ben@corp.example"}},
		Nodes: map[tailcfg.NodeID]*db.Node{1: node(1, 1), 2: node(2, 1)}, Policy: &db.PolicyVersion{ID: 1, Text: []byte(policy)},
	})
	if err != nil || s.Policy().Err != nil || s.Policy().Stale != nil {
		t.Fatal(err, s.Policy().Err, s.Policy().Stale)
	}
	before := s.Access().Filter(0)
	if len(before.Rules) == 0 {
		t.Fatal("no rules before")
	}
	next, err := Build(s, &db.Batch{From: 1, To: 2, Users: map[tailcfg.UserID]*db.User{2: nil}}) // the last person of corp.example
	if err != nil {
		t.Fatal(err)
	}
	if !next.Access().Filter(0).Equal(before) || !next.Access().Row(0).Has(1) {
		t.Errorf("one person left and the others lost their access: %+v", next.Access().Filter(0).Rules)
	}
	if next.Policy().Err != nil {
		t.Errorf("Err = %v, want nil: the policy is in force", next.Policy().Err)
	}
	if next.Policy().Stale == nil {
		t.Error("nobody is told that the policy names a domain that is gone")
	}
}
