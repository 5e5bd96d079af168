package acl

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
	"slices"

	"go4.org/netipx"
)

// shown says that some viewers see routes on a router: those in a set, and
// some more by name. The router itself is never meant.
type shown struct {
	router  int
	routes  []netip.Prefix
	primary bool  // listed in PrimaryRoutes
	viewers int   // index in viewPlan.sets
	also    []int // ascending slots
}

// viewPlan collects which viewers see what. Viewer sets are interned: routes
// usually have few distinct audiences, and viewers in the same sets share one
// answer.
type viewPlan struct {
	c     *compiler
	items []shown
	sets  []set
	index map[uint64][]int
}

func (v *viewPlan) intern(s set) int {
	h := s.hash()
	for _, i := range v.index[h] {
		if v.sets[i].equal(s) {
			return i
		}
	}
	v.sets = append(v.sets, s)
	v.index[h] = append(v.index[h], len(v.sets)-1)
	return len(v.sets) - 1
}

// peerViews decides which viewer sees which route on which peer.
func (c *compiler) peerViews(attrs *attributes, r *routing, base []*PeerView) []*PeerViews {
	plan := &viewPlan{c: c, index: map[uint64][]int{}}
	reach := newReach(c)
	for _, p := range r.prefixes {
		plan.subnet(r, reach, p)
	}
	plan.exits(r)
	slices.SortStableFunc(plan.items, func(a, b shown) int { return a.router - b.router })
	b := &viewBuilder{
		c: c, plan: plan, base: base, attrs: attrs, special: newSet(c.n),
		index: map[uint64][]builtViews{}, content: map[uint64][]*PeerViews{}, peers: map[peerKey]*PeerView{},
	}
	for i := range plan.items {
		b.special.add(plan.items[i].router)
		for _, slot := range plan.items[i].also {
			b.special.add(slot)
		}
	}
	member := make([][]int32, c.n)
	for i, s := range plan.sets {
		for slot := range s.all {
			member[slot] = append(member[slot], int32(i))
		}
	}
	out := make([]*PeerViews, c.n)
	for slot := range c.n {
		out[slot] = b.build(slot, member[slot])
	}
	return out
}

// subnet shows one prefix: on its primary to everybody whom a rule lets reach
// it and to the other routers of it, and by via to the rest.
func (v *viewPlan) subnet(r *routing, reach *reach, p netip.Prefix) {
	c, rng := v.c, netipx.RangeOfPrefix(p)
	taken := newSet(c.n)
	steered := reach.viewers(taken, rng, !r.services[p])
	routers := r.routers[p]
	if primary, ok := r.primary[p]; ok {
		v.items = append(v.items, shown{
			router: primary, routes: []netip.Prefix{p}, primary: !r.services[p], viewers: v.intern(taken), also: routers,
		})
	}
	if len(steered) == 0 {
		return
	}
	taken = taken.clone()
	for _, slot := range routers {
		taken.add(slot)
	}
	for _, f := range steered {
		var tagged []int
		for _, slot := range routers {
			if f.via.nodes.has(slot) {
				tagged = append(tagged, slot)
			}
		}
		router, ok := c.electFrom(p, tagged)
		if !ok {
			continue
		}
		viewers := newSet(c.n)
		f.src.cover.orInto(viewers)
		for i := range viewers {
			viewers[i] &^= taken[i]
		}
		v.items = append(v.items, shown{
			router: router, routes: []netip.Prefix{p}, primary: !r.services[p], viewers: v.intern(viewers),
		})
		taken.or(viewers)
	}
}

// reach answers who may exchange packets with a subnet.
type reach struct {
	c     *compiler
	flows []*flow   // those that can concern a range: all but plain node destinations
	wide  []*source // sources with ranges
}

func newReach(c *compiler) *reach {
	r := &reach{c: c}
	for _, f := range c.flows {
		if len(c.overlay) > 0 || slices.ContainsFunc(f.parts, func(pt part) bool {
			return pt.kind == partAll || pt.kind == partRange
		}) {
			r.flows = append(r.flows, f)
		}
	}
	for _, s := range c.sources {
		if s.any || len(s.ranges) > 0 || len(c.overlay) > 0 {
			r.wide = append(r.wide, s)
		}
	}
	return r
}

// viewers adds everybody whom a rule without via lets reach the range, and
// everybody whom the range may reach, for who accepts packets from a subnet
// must know the route. It returns the flows with via. An approved route is
// part of what * means in a source.
func (r *reach) viewers(out set, rng netipx.IPRange, approved bool) (steered []*flow) {
	for _, f := range r.flows {
		if !r.c.touches(f, rng) {
			continue
		}
		if f.via != nil {
			steered = append(steered, f)
		} else {
			f.src.cover.orInto(out)
		}
	}
	for _, s := range r.wide {
		if s.wild && approved || r.c.sourceIn(s, rng) {
			s.deliver.orInto(out)
		}
	}
	return steered
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

// exits shows the exit routes of each exit node to those who may use it and to
// the other exit nodes.
func (v *viewPlan) exits(r *routing) {
	c := v.c
	if c.exits.empty() {
		return
	}
	var all []int
	for slot := range c.exits.all {
		all = append(all, slot)
	}
	open := newSet(c.n)
	var steered []*flow
	for _, f := range c.flows {
		if !slices.ContainsFunc(f.parts, func(pt part) bool { return pt.kind == partAll || pt.kind == partInternet }) {
			continue
		}
		if f.via != nil {
			steered = append(steered, f)
		} else {
			f.src.cover.orInto(open)
		}
	}
	for _, slot := range all {
		viewers := open
		for _, f := range steered {
			if f.via.nodes.has(slot) {
				viewers = viewers.clone()
				f.src.cover.orInto(viewers)
			}
		}
		v.items = append(v.items, shown{router: slot, routes: r.exitRoutes[slot], viewers: v.intern(viewers), also: all})
	}
}

// viewBuilder turns a plan into each viewer's answer.
type viewBuilder struct {
	c       *compiler
	plan    *viewPlan
	base    []*PeerView
	attrs   *attributes
	special set // routers and viewers by name: what they see is their own
	index   map[uint64][]builtViews
	content map[uint64][]*PeerViews
	peers   map[peerKey]*PeerView
}

type builtViews struct {
	sets  []int32
	views *PeerViews
}

// peerKey identifies what one viewer sees of a router: a run of items, of
// which some are shown. Runs longer than the mask are not cached.
type peerKey struct {
	router int
	mask   uint64
	noIPv4 bool
}

func (b *viewBuilder) build(slot int, sets []int32) *PeerViews {
	noIPv4 := b.attrs.noIPv4.has(slot)
	shared := !b.special.has(slot)
	h := newHash()
	if noIPv4 {
		h.word(1)
	}
	for _, i := range sets {
		h.word(uint64(i))
	}
	if shared {
		for _, k := range b.index[h.sum()] {
			if k.views.NoIPv4 == noIPv4 && slices.Equal(k.sets, sets) {
				return k.views
			}
		}
	}
	v := b.intern(b.views(slot, sets, noIPv4))
	if shared {
		b.index[h.sum()] = append(b.index[h.sum()], builtViews{sets, v})
	}
	return v
}

func (b *viewBuilder) intern(v *PeerViews) *PeerViews {
	v.hash = hashViews(v)
	for _, o := range b.content[v.hash] {
		if o.Equal(v) {
			return o
		}
	}
	b.content[v.hash] = append(b.content[v.hash], v)
	return v
}

// views walks the items, which are sorted by router.
func (b *viewBuilder) views(viewer int, sets []int32, noIPv4 bool) *PeerViews {
	v := &PeerViews{NoIPv4: noIPv4}
	sees := func(it *shown) bool {
		if _, ok := slices.BinarySearch(sets, int32(it.viewers)); ok {
			return true
		}
		_, ok := slices.BinarySearch(it.also, viewer)
		return ok
	}
	add := func(slot int, p *PeerView) {
		b.c.spend(1, viewRoutes)
		v.Slots, v.Peers = append(v.Slots, slot), append(v.Peers, p)
	}
	next := 0
	plainUntil := func(end int) {
		for ; noIPv4 && next < end; next++ {
			if b.c.live.has(next) && b.c.t.Nodes[next].IPv4.IsValid() && !b.attrs.noIPv4.has(next) {
				add(next, b.peer(next, nil, 0, true))
			}
		}
	}
	for items := b.plan.items; len(items) > 0; {
		router := items[0].router
		n := 1
		for n < len(items) && items[n].router == router {
			n++
		}
		var mask uint64
		var many []bool
		any := false
		for i := range items[:n] {
			if router != viewer && sees(&items[i]) {
				any = true
				if i < 64 {
					mask |= 1 << i
				} else {
					if many == nil {
						many = make([]bool, n)
					}
					many[i] = true
				}
			}
		}
		if any {
			plainUntil(router)
			next = router + 1
			add(router, b.peer(router, pick(items[:n], mask, many), mask, noIPv4))
		}
		items = items[n:]
	}
	plainUntil(b.c.n)
	return v
}

// pick selects the shown items: the first 64 by mask, others by flag. The
// result is one run when it can be cached by its mask.
func pick(items []shown, mask uint64, many []bool) []*shown {
	var out []*shown
	for i := range items {
		if i < 64 && mask>>i&1 != 0 || many != nil && many[i] {
			out = append(out, &items[i])
		}
	}
	return out
}

// peer is a router with the routes of the items.
func (b *viewBuilder) peer(router int, items []*shown, mask uint64, noIPv4 bool) *PeerView {
	key := peerKey{router, mask, noIPv4}
	cached := len(items) == bits.OnesCount64(mask)
	if cached {
		if p := b.peers[key]; p != nil {
			return p
		}
	}
	p := &PeerView{CapMap: b.base[router].CapMap}
	p.AllowedIPs = b.c.addresses(router, noIPv4 || b.attrs.noIPv4.has(router))
	for _, it := range items {
		p.AllowedIPs = append(p.AllowedIPs, it.routes...)
		if it.primary {
			p.PrimaryRoutes = append(p.PrimaryRoutes, it.routes...)
		}
	}
	p.hash = hashPeer(p)
	if cached {
		b.peers[key] = p
	}
	return p
}

func hashPeer(p *PeerView) uint64 {
	h := newHash()
	for _, list := range [...][]netip.Prefix{p.AllowedIPs, p.PrimaryRoutes} {
		h.word(uint64(len(list)))
		for _, x := range list {
			a := x.Addr().As16()
			h.word(binary.BigEndian.Uint64(a[:8]))
			h.word(binary.BigEndian.Uint64(a[8:]))
			h.word(uint64(x.Bits()))
		}
	}
	h.word(uint64(len(p.CapMap)))
	return h.sum()
}

func hashViews(v *PeerViews) uint64 {
	h := newHash()
	if v.NoIPv4 {
		h.word(1)
	}
	for i, slot := range v.Slots {
		h.word(uint64(slot))
		h.word(v.Peers[i].hash)
	}
	return h.sum()
}
