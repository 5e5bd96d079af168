// Package acl turns a tailnet policy into what each node may see and do.
//
// It is a pure compiler: a policy text and the policy-relevant facts of a
// tailnet go in, an immutable [Access] comes out. It owns the meaning of the
// policy language and nothing else. It never touches a clock, a lock, a file
// or the network, and starts no goroutine, so the same input gives the same
// output on every server.
//
// A flow from text to answer:
//
//	p, err := acl.Parse(text)            // syntax, names, shapes; errors carry line and column
//	a, err := acl.Compile(p, tailnet)    // selectors become node sets, rules become filters
//	fails := acl.Check(p, tailnet, a)    // the policy's own tests
//	a.Row(slot).Has(other)               // may the two see each other?
//	a.Filter(slot).Rules                 // the packet filter that the node gets
//
// Compile always starts from nothing. It works on sets of nodes (bitsets over
// slots), never on pairs: the cost grows with the nodes and with the rules,
// not with their product squared.
package acl

import (
	"net/netip"

	"tailscale.com/tailcfg"
)

// User is a person of the tailnet as far as a policy can tell.
type User struct {
	ID    tailcfg.UserID
	Name  string // user name; "name@" in a policy refers to it
	Email string // empty when the identity provider gave none
	Role  string // owner, admin, network-admin, it-admin, billing-admin, auditor, member; "" is member
}

// LoginName is what identifies the user on the wire: the e-mail address, else
// the user name.
func (u *User) LoginName() string {
	if u.Email != "" {
		return u.Email
	}
	return u.Name
}

// Node holds only facts a policy can see. Its index in Tailnet.Nodes is the
// node's slot.
type Node struct {
	ID       tailcfg.NodeID // 0 marks a hole: a removed node whose slot is not reused
	Hostname string         // label for messages and output
	FQDN     string         // its full name, with or without the last dot; only for finding a node by name
	User     tailcfg.UserID // 0 when tagged
	Tags     []string

	IPv4, IPv6 netip.Addr // either may be invalid

	RoutableIPs    []netip.Prefix // advertised routes
	ApprovedRoutes []netip.Prefix // routes in effect: advertised and approved

	Posture map[string]any            // attribute ("node:os", "custom:x") to string, float64 or bool
	Cap     tailcfg.CapabilityVersion // 0 is unknown
	OS      string                    // hostinfo OS; the "node:os" attribute when Posture lacks it
	Expired bool                      // expired or logged out: visible, but never a route primary
	Offline bool                      // does not change visibility
}

// Tagged reports whether the node belongs to its tags instead of a user.
func (n *Node) Tagged() bool { return len(n.Tags) > 0 }

// Service is a virtual service ("svc:name") with its own addresses, offered by
// approved hosts.
type Service struct {
	Name       string // with the "svc:" prefix
	IPv4, IPv6 netip.Addr
	Hosts      []tailcfg.NodeID // nodes that advertise it and are approved
}

// Tailnet is the compiler's view of a tailnet. It is read only.
type Tailnet struct {
	Users    []User
	Nodes    []Node // ascending by ID apart from holes
	Services []Service

	Domains     []string // domains that user:*@domain and localpart:*@domain may name
	HTTPS       bool
	ControlURL  string // base of SSH hold-and-delegate URLs
	DisplayName string
	MagicDNS    bool
	AutoUpdates bool

	// Primaries are the stored elections that differ from the default, which
	// is the approved advertiser with the lowest ID. An entry whose node does
	// not advertise the prefix, or is expired, is ignored.
	Primaries map[netip.Prefix]tailcfg.NodeID
}

// Filter is the packet filter of one node (tailcfg.MapResponse.PacketFilters).
// No rules means that nothing may reach it.
type Filter struct {
	Rules []tailcfg.FilterRule
	hash  uint64
}

// Caps are a node's own capabilities (tailcfg.Node.CapMap of SelfNode) as far
// as the policy, roles and settings decide them.
type Caps struct {
	Map  tailcfg.NodeCapMap
	hash uint64
}

// SelfView is how a node sees itself. It does not depend on the policy's
// rules, only on attributes and approved routes.
type SelfView struct {
	Addresses     []netip.Prefix
	AllowedIPs    []netip.Prefix // addresses and all approved routes, exit routes included
	PrimaryRoutes []netip.Prefix // subnet routes for which the node is the elected primary
}

// PeerView is how a node looks to another one.
type PeerView struct {
	AllowedIPs    []netip.Prefix
	PrimaryRoutes []netip.Prefix
	CapMap        tailcfg.NodeCapMap
	hash          uint64
}

// PeerViews lists the peers that look other than their Base to one viewer, in
// ascending slot order. Entries may name peers that the viewer's Row hides.
type PeerViews struct {
	// NoIPv4 says that the viewer has the disable-ipv4 attribute: it sees
	// every peer without its IPv4 address, and the entries already say so.
	NoIPv4 bool
	Slots  []int
	Peers  []*PeerView
	hash   uint64
}

// Access is a compiled policy. It is immutable; everything it hands out is
// shared and read only. Within one Access equal answers share one pointer.
type Access struct {
	rows     []*Row
	filters  []*Filter
	ssh      []*SSH
	caps     []*Caps
	self     []*SelfView
	base     []*PeerView
	views    []*PeerViews
	approves [][]netip.Prefix
	services [][]string

	primaries map[netip.Prefix]tailcfg.NodeID
	prog      *program
}

// Len is the number of slots, holes included.
func (a *Access) Len() int { return len(a.rows) }

// Row is the set of nodes that are peers of the node in this slot. The
// viewer's own bit has no meaning; mask it.
func (a *Access) Row(slot int) *Row { return a.rows[slot] }

// Filter is the node's packet filter.
func (a *Access) Filter(slot int) *Filter { return a.filters[slot] }

// SSH is the node's SSH policy.
func (a *Access) SSH(slot int) *SSH { return a.ssh[slot] }

// Caps are the node's own capabilities, without those that every node gets.
func (a *Access) Caps(slot int) *Caps { return a.caps[slot] }

// Self is how the node sees itself.
func (a *Access) Self(slot int) *SelfView { return a.self[slot] }

// Base is how the node looks to a viewer unless Views says otherwise: its
// addresses and no routes.
func (a *Access) Base(slot int) *PeerView { return a.base[slot] }

// Views are the exceptions to Base for one viewer.
func (a *Access) Views(slot int) *PeerViews { return a.views[slot] }

// AutoApproves lists those of the node's advertised routes that the policy's
// autoApprovers approve.
func (a *Access) AutoApproves(slot int) []netip.Prefix { return a.approves[slot] }

// AutoApprovesServices lists the services ("svc:name") that the policy lets
// the node host without further approval, sorted.
func (a *Access) AutoApprovesServices(slot int) []string { return a.services[slot] }

// Primaries is the elected primary of every approved subnet route.
func (a *Access) Primaries() map[netip.Prefix]tailcfg.NodeID { return a.primaries }

// ViaGroups lists the sets of nodes that grants steer to with via, each once,
// as ascending slots. The routers of a prefix among them elect a primary of
// their own.
func (a *Access) ViaGroups() [][]int {
	var out [][]int
	seen := map[string]bool{}
	for _, f := range a.prog.flows {
		if f.via == nil || seen[f.via.key] {
			continue
		}
		seen[f.via.key] = true
		var slots []int
		for slot := range f.via.nodes.all {
			slots = append(slots, slot)
		}
		out = append(out, slots)
	}
	return out
}
