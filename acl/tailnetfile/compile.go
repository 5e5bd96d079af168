package tailnetfile

import (
	"encoding/json"
	"net/netip"

	"github.com/signalbox-net/signalbox/acl"
	"tailscale.com/tailcfg"
)

// testsFailed is the hosted service's message when a test of the policy does
// not hold.
const testsFailed = "test(s) failed"

// Rejection is the output for a policy that is not accepted.
type Rejection struct {
	Error  string  `json:"error"` // in the hosted service's wording, bare
	Errors []Fault `json:"errors"`
}

// Fault is one reason.
type Fault struct {
	Line    int    `json:"line"`
	Column  int    `json:"column"`
	Path    string `json:"path"`
	Message string `json:"message"`
}

// Compiled is the output for an accepted policy.
type Compiled struct {
	Warnings []Fault              `json:"warnings"`
	Nodes    map[string]*NodeView `json:"nodes"` // by hostname
}

// NodeView is everything that one node gets.
type NodeView struct {
	PacketFilterRules  []tailcfg.FilterRule    `json:"packet_filter_rules"`
	SSHRules           []*tailcfg.SSHRule      `json:"ssh_rules"`
	CapMap             tailcfg.NodeCapMap      `json:"cap_map"`
	Addresses          []netip.Prefix          `json:"addresses"`
	AllowedIPs         []netip.Prefix          `json:"allowed_ips"`
	PrimaryRoutes      []netip.Prefix          `json:"primary_routes"`
	AutoApprovedRoutes []netip.Prefix          `json:"auto_approved_routes"`
	Peers              map[string]*PeerDetails `json:"peers"` // by hostname
}

// PeerDetails is how one node looks to another.
type PeerDetails struct {
	AllowedIPs    []netip.Prefix     `json:"allowed_ips"`
	PrimaryRoutes []netip.Prefix     `json:"primary_routes"`
	CapMap        tailcfg.NodeCapMap `json:"cap_map"`
}

// CompileJSON compiles a policy for the tailnet of a document and returns a
// Rejection (ok false) or a Compiled (ok true) as JSON. err is about the
// tailnet document only.
func CompileJSON(tailnet, policy []byte) (out []byte, ok bool, err error) {
	f, err := Parse(tailnet)
	if err != nil {
		return nil, false, err
	}
	t, err := f.Tailnet()
	if err != nil {
		return nil, false, err
	}
	compiled, rejection := CompilePolicy(t, policy)
	if rejection != nil {
		out, err = json.MarshalIndent(rejection, "", "  ")
		return out, false, err
	}
	out, err = json.MarshalIndent(compiled, "", "  ")
	return out, true, err
}

// CompilePolicy is CompileJSON on values. Exactly one of the results is not
// nil.
func CompilePolicy(t *acl.Tailnet, policy []byte) (*Compiled, *Rejection) {
	x := acl.Examine(policy, t)
	if faults := x.Faults(); len(faults) > 0 {
		r := &Rejection{Error: testsFailed}
		if len(x.Errors) > 0 {
			r.Error = x.Errors.Message()
		}
		for _, e := range faults {
			r.Errors = append(r.Errors, Fault(*e))
		}
		return nil, r
	}
	a := x.Access
	out := &Compiled{Warnings: []Fault{}, Nodes: make(map[string]*NodeView, len(t.Nodes))}
	for _, w := range acl.Warnings(x.Policy, t) {
		out.Warnings = append(out.Warnings, Fault(w))
	}
	for slot := range t.Nodes {
		if t.Nodes[slot].ID != 0 {
			out.Nodes[t.Nodes[slot].Hostname] = nodeView(t, a, slot)
		}
	}
	return out, nil
}

func nodeView(t *acl.Tailnet, a *acl.Access, slot int) *NodeView {
	self := a.Self(slot)
	v := &NodeView{
		PacketFilterRules:  a.Filter(slot).Rules,
		SSHRules:           a.SSH(slot).Wire().Rules,
		CapMap:             a.Caps(slot).Map,
		Addresses:          self.Addresses,
		AllowedIPs:         self.AllowedIPs,
		PrimaryRoutes:      self.PrimaryRoutes,
		AutoApprovedRoutes: a.AutoApproves(slot),
		Peers:              map[string]*PeerDetails{},
	}
	row, views := a.Row(slot), a.Views(slot)
	next := 0
	for peer := range t.Nodes {
		view := a.Base(peer)
		if next < len(views.Slots) && views.Slots[next] == peer {
			view = views.Peers[next]
			next++
		}
		if peer == slot || !row.Has(peer) {
			continue
		}
		v.Peers[t.Nodes[peer].Hostname] = &PeerDetails{view.AllowedIPs, view.PrimaryRoutes, view.CapMap}
	}
	return v
}
