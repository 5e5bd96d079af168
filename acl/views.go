package acl

import (
	"net/netip"
	"slices"

	"go4.org/netipx"
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

// shown says that some viewers see a route on a router.
type shown struct {
	router  int
	prefix  netip.Prefix
	primary bool // listed in PrimaryRoutes
	viewers nodeset
}

// peerViews decides which viewer sees which route on which peer.
func (c *compiler) peerViews(attrs *attributes, r *routing, base []*PeerView) []*PeerViews {
	var items []shown
	for _, p := range r.prefixes {
		items = c.subnetViews(items, r, p)
	}
	items = c.exitViews(items, r)
	slices.SortStableFunc(items, func(a, b shown) int { return a.router - b.router })

	total := 0
	for i := range items {
		total += len(items[i].viewers.list)
	}
	c.spend(total, maxViews, "visible routes")
	lists := make([][]int32, c.n)
	for i := range items {
		for _, viewer := range items[i].viewers.list {
			lists[viewer] = append(lists[viewer], int32(i))
		}
	}
	b := &viewBuilder{c: c, items: items, base: base, attrs: attrs, index: map[uint64][]builtViews{}, peers: map[uint64][]*PeerView{}}
	out := make([]*PeerViews, c.n)
	for slot := range c.n {
		out[slot] = b.build(slot, lists[slot])
	}
	return out
}

// subnetViews shows one prefix: on its primary to everybody whom a rule lets
// reach it and to the other routers of it, and by via to the rest.
func (c *compiler) subnetViews(items []shown, r *routing, p netip.Prefix) []shown {
	rng := netipx.RangeOfPrefix(p)
	taken := newSet(c.n)
	for _, f := range c.flows {
		if f.via == nil && c.touches(f, rng) {
			f.src.cover.orInto(taken)
		}
	}
	// Whom the subnet may send to must accept its packets, so it sees the
	// route as well.
	for _, s := range c.sources {
		if c.sourceIn(s, rng) {
			s.deliver.orInto(taken)
		}
	}
	for _, slot := range r.routers[p] {
		taken.add(slot)
	}
	if primary, ok := r.primary[p]; ok {
		items = appendShown(items, primary, p, !r.services[p], taken, nil)
	}
	for _, f := range c.flows {
		if f.via == nil || !c.touches(f, rng) {
			continue
		}
		var tagged []int
		for _, slot := range r.routers[p] {
			if f.via.nodes.has(slot) {
				tagged = append(tagged, slot)
			}
		}
		if router, ok := c.electFrom(p, tagged); ok {
			viewers := newSet(c.n)
			f.src.cover.orInto(viewers)
			items = appendShown(items, router, p, !r.services[p], viewers, taken)
			taken.or(viewers)
		}
	}
	return items
}

// touches reports whether the flow has a destination in the range.
func (c *compiler) touches(f *flow, rng netipx.IPRange) bool {
	for i := range f.parts {
		switch pt := &f.parts[i]; pt.kind {
		case partAll:
			return true
		case partRange:
			if pt.rng.Overlaps(rng) {
				return true
			}
		case partNodes:
			found := false
			c.within(rng, func(slot int) { found = found || pt.nodes.has(slot) })
			if found {
				return true
			}
		}
	}
	return false
}

// sourceIn reports whether the source has an address in the range.
func (c *compiler) sourceIn(s *source, rng netipx.IPRange) bool {
	if s.any {
		return true
	}
	for _, r := range s.ranges {
		if r.Overlaps(rng) {
			return true
		}
	}
	found := false
	c.within(rng, func(slot int) {
		if !found {
			_, found = slices.BinarySearch(s.nodes, int32(slot))
		}
	})
	return found
}

// appendShown adds an item for the viewers without those in except and without
// the router itself. viewers is changed.
func appendShown(items []shown, router int, p netip.Prefix, primary bool, viewers, except set) []shown {
	it := shown{router: router, prefix: p, primary: primary}
	for slot := range viewers.all {
		if slot != router && !except.has(slot) {
			it.viewers.list = append(it.viewers.list, int32(slot))
		}
	}
	if len(it.viewers.list) == 0 {
		return items
	}
	return append(items, it)
}

// exitViews shows the exit routes of each exit node to those who may use it
// and to the other exit nodes.
func (c *compiler) exitViews(items []shown, r *routing) []shown {
	for slot := range c.exits.all {
		viewers := c.exits.clone()
		for _, f := range c.flows {
			if f.via != nil && !f.via.nodes.has(slot) {
				continue
			}
			for i := range f.parts {
				if k := f.parts[i].kind; k == partAll || k == partInternet {
					f.src.cover.orInto(viewers)
					break
				}
			}
		}
		for _, p := range r.exitRoutes[slot] {
			items = appendShown(items, slot, p, false, viewers, nil)
		}
	}
	return items
}

// viewBuilder shares equal views.
type viewBuilder struct {
	c     *compiler
	items []shown
	base  []*PeerView
	attrs *attributes
	index map[uint64][]builtViews
	peers map[uint64][]*PeerView
}

type builtViews struct {
	items []int32
	views *PeerViews
}

func (b *viewBuilder) build(slot int, list []int32) *PeerViews {
	noIPv4 := b.attrs.noIPv4.has(slot)
	h := newHash()
	if noIPv4 {
		h.word(1)
	}
	for _, i := range list {
		h.word(uint64(i))
	}
	for _, k := range b.index[h.sum()] {
		if k.views.NoIPv4 == noIPv4 && slices.Equal(k.items, list) {
			return k.views
		}
	}
	v := &PeerViews{NoIPv4: noIPv4}
	if noIPv4 {
		b.withoutIPv4(v, list)
	} else {
		for len(list) > 0 {
			n := b.sameRouter(list)
			v.Slots = append(v.Slots, b.items[list[0]].router)
			v.Peers = append(v.Peers, b.peer(list[:n], false))
			list = list[n:]
		}
	}
	v.hash = hashViews(v)
	for _, k := range b.index[h.sum()] {
		if k.views.Equal(v) {
			return k.views
		}
	}
	b.index[h.sum()] = append(b.index[h.sum()], builtViews{slices.Clone(list), v})
	return v
}

func (b *viewBuilder) sameRouter(list []int32) int {
	n := 1
	for n < len(list) && b.items[list[n]].router == b.items[list[0]].router {
		n++
	}
	return n
}

// withoutIPv4 lists every peer that has an IPv4 address to hide or routes to
// show.
func (b *viewBuilder) withoutIPv4(v *PeerViews, list []int32) {
	for slot := range b.c.live.all {
		n := 0
		if len(list) > 0 && b.items[list[0]].router == slot {
			n = b.sameRouter(list)
		}
		switch {
		case n > 0:
			v.Slots, v.Peers = append(v.Slots, slot), append(v.Peers, b.peer(list[:n], true))
		case b.c.t.Nodes[slot].IPv4.IsValid() && !b.attrs.noIPv4.has(slot):
			p := *b.base[slot]
			p.AllowedIPs = b.c.addresses(slot, true)
			v.Slots, v.Peers = append(v.Slots, slot), append(v.Peers, b.share(&p))
		}
		list = list[n:]
	}
}

// peer is one router's view with the routes of the items.
func (b *viewBuilder) peer(list []int32, noIPv4 bool) *PeerView {
	router := b.items[list[0]].router
	p := &PeerView{CapMap: b.base[router].CapMap}
	p.AllowedIPs = b.c.addresses(router, noIPv4 || b.attrs.noIPv4.has(router))
	for _, i := range list {
		it := &b.items[i]
		p.AllowedIPs = append(p.AllowedIPs, it.prefix)
		if it.primary {
			p.PrimaryRoutes = append(p.PrimaryRoutes, it.prefix)
		}
	}
	return b.share(p)
}

func (b *viewBuilder) share(p *PeerView) *PeerView {
	h := hashPeer(p)
	for _, o := range b.peers[h] {
		if o.Equal(p) {
			return o
		}
	}
	b.peers[h] = append(b.peers[h], p)
	return p
}

func hashPeer(p *PeerView) uint64 {
	h := newHash()
	for _, list := range [][]netip.Prefix{p.AllowedIPs, p.PrimaryRoutes} {
		h.word(uint64(len(list)))
		for _, x := range list {
			a := x.Addr().As16()
			h.text(string(a[:]))
			h.word(uint64(x.Bits()))
		}
	}
	for _, name := range sortedKeys(p.CapMap) {
		h.text(string(name))
	}
	return h.sum()
}

func hashViews(v *PeerViews) uint64 {
	h := newHash()
	if v.NoIPv4 {
		h.word(1)
	}
	for i, slot := range v.Slots {
		h.word(uint64(slot))
		h.word(hashPeer(v.Peers[i]))
	}
	return h.sum()
}
