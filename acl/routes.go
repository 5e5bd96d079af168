package acl

import (
	"net/netip"
	"slices"

	"tailscale.com/tailcfg"
)

// routing is the result of the route elections.
type routing struct {
	prefixes   []netip.Prefix         // approved subnet routes and service addresses, sorted
	routers    map[netip.Prefix][]int // who is approved for it, ascending slots
	primary    map[netip.Prefix]int   // slot; missing when every router is expired
	services   map[netip.Prefix]bool  // addresses of services
	primaries  map[netip.Prefix]tailcfg.NodeID
	exitRoutes map[int][]netip.Prefix // by slot
}

// elect chooses the primary of every approved route: the stored choice while
// it can serve, else the approved router with the lowest node id.
func (c *compiler) elect() *routing {
	r := &routing{
		routers: map[netip.Prefix][]int{}, primary: map[netip.Prefix]int{}, services: map[netip.Prefix]bool{},
		primaries: map[netip.Prefix]tailcfg.NodeID{}, exitRoutes: map[int][]netip.Prefix{},
	}
	for i := range c.subnets {
		sn := &c.subnets[i]
		if len(r.routers[sn.prefix]) == 0 {
			r.prefixes = append(r.prefixes, sn.prefix)
		}
		r.routers[sn.prefix] = append(r.routers[sn.prefix], int(sn.slot))
		if sn.service {
			r.services[sn.prefix] = true
		}
	}
	slices.SortFunc(r.prefixes, comparePrefix)
	for _, p := range r.prefixes {
		slices.Sort(r.routers[p])
		if slot, ok := c.electFrom(p, r.routers[p]); ok {
			r.primary[p] = slot
			if !r.services[p] {
				r.primaries[p] = c.t.Nodes[slot].ID
			}
		}
	}
	for slot := range c.exits.all {
		for _, p := range c.t.Nodes[slot].ApprovedRoutes {
			if p.Bits() == 0 && !slices.Contains(r.exitRoutes[slot], p) {
				r.exitRoutes[slot] = append(r.exitRoutes[slot], p)
			}
		}
	}
	return r
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

func (c *compiler) electFrom(p netip.Prefix, routers []int) (int, bool) {
	stored, hasStored := c.t.Primaries[p]
	best := -1
	for _, slot := range routers {
		n := &c.t.Nodes[slot]
		if n.Expired {
			continue
		}
		if hasStored && n.ID == stored {
			return slot, true
		}
		if best < 0 || n.ID < c.t.Nodes[best].ID {
			best = slot
		}
	}
	return best, best >= 0
}

// selfViews do not depend on rules.
func (c *compiler) selfViews(attrs *attributes, r *routing) []*SelfView {
	out := make([]*SelfView, c.n)
	empty := &SelfView{}
	for slot := range c.n {
		if !c.live.has(slot) {
			out[slot] = empty
			continue
		}
		v := &SelfView{Addresses: c.addresses(slot, attrs.noIPv4.has(slot))}
		v.AllowedIPs = v.Addresses
		out[slot] = v
		routes := c.t.Nodes[slot].ApprovedRoutes
		if len(routes) > 0 {
			routes = slices.Clone(routes)
			slices.SortFunc(routes, comparePrefix)
			routes = slices.Compact(routes)
			v.AllowedIPs = append(slices.Clip(v.AllowedIPs), routes...)
		}
	}
	for _, p := range r.prefixes {
		if r.services[p] {
			for _, slot := range r.routers[p] {
				out[slot].AllowedIPs = append(slices.Clip(out[slot].AllowedIPs), p)
			}
			continue
		}
		if slot, ok := r.primary[p]; ok {
			out[slot].PrimaryRoutes = append(out[slot].PrimaryRoutes, p)
		}
	}
	return out
}

func (c *compiler) addresses(slot int, noIPv4 bool) []netip.Prefix {
	n := &c.t.Nodes[slot]
	out := make([]netip.Prefix, 0, 2)
	if n.IPv4.IsValid() && !noIPv4 {
		out = append(out, singlePrefix(n.IPv4))
	}
	if n.IPv6.IsValid() {
		out = append(out, singlePrefix(n.IPv6))
	}
	return out
}

var suggestExitNode = tailcfg.NodeCapMap{tailcfg.NodeAttrSuggestExitNode: nil}

func (c *compiler) baseViews(attrs *attributes) []*PeerView {
	out := make([]*PeerView, c.n)
	empty := &PeerView{}
	for slot := range c.n {
		if !c.live.has(slot) {
			out[slot] = empty
			continue
		}
		out[slot] = &PeerView{AllowedIPs: c.addresses(slot, attrs.noIPv4.has(slot))}
		if c.exits.has(slot) {
			out[slot].CapMap = suggestExitNode
		}
	}
	return out
}
