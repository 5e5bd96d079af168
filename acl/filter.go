package acl

import (
	"net/netip"
	"slices"

	"go4.org/netipx"
	"tailscale.com/tailcfg"
)

// target says that one part of a flow applies to a node, and to which address
// of whom: own means the receiving node's addresses, otherwise the part's own
// text, otherwise the addresses of another node whose address the receiving
// node routes.
type target struct {
	flow, part int32
	of         int32 // slot whose addresses are meant, or one of the values below
}

const ofPart = -1 // the part's own text: *, a range, or the Internet

// filters reduces the flows to each node's packet filter.
func (c *compiler) filters() []*Filter {
	targets := c.targets()
	out := make([]*Filter, c.n)
	b := &filterBuilder{c: c, index: map[uint64][]*sharedFilter{}, content: map[uint64][]*Filter{}}
	for slot := range c.n {
		out[slot] = b.build(slot, targets[slot])
	}
	for _, s := range c.sources {
		s.deliver.seal(c.n)
	}
	return out
}

// targets lists for each node the parts that reach it, in rule order. It runs
// over the flows twice, first to count, so that all lists share one slab.
func (c *compiler) targets() [][]target {
	counts := make([]int32, c.n)
	total := 0
	c.eachTarget(func(slot int, t target) {
		counts[slot]++
		c.spend(1, filterRules)
		total++
	})
	slab := make([]target, 0, total)
	out := make([][]target, c.n)
	for slot, n := range counts {
		out[slot] = slab[len(slab) : len(slab) : len(slab)+int(n)]
		slab = slab[:len(slab)+int(n)]
	}
	c.eachTarget(func(slot int, t target) { out[slot] = append(out[slot], t) })
	return out
}

// eachTarget enumerates which node gets which part of which flow.
func (c *compiler) eachTarget(yield func(slot int, t target)) {
	for fi, f := range c.flows {
		for pi := range f.parts {
			c.partTargets(f, &f.parts[pi], func(slot, of int) {
				yield(slot, target{int32(fi), int32(pi), int32(of)})
			})
		}
	}
}

// partTargets enumerates the nodes that a part is delivered to.
func (c *compiler) partTargets(f *flow, pt *part, yield func(slot, of int)) {
	switch pt.kind {
	case partAll:
		if f.via != nil {
			for slot := range f.via.nodes.all {
				if len(c.t.Nodes[slot].ApprovedRoutes) > 0 {
					yield(slot, ofPart)
				}
			}
			return
		}
		for slot := range c.live.all {
			yield(slot, ofPart)
		}
	case partInternet:
		for slot := range c.exits.all {
			if f.via == nil || f.via.nodes.has(slot) {
				yield(slot, ofPart)
			}
		}
	case partNodes:
		if f.via == nil {
			for slot := range pt.nodes.all {
				yield(slot, slot)
			}
		}
		c.routedNodes(f, pt, yield)
	case partRange:
		c.rangeTargets(f, pt, yield)
	}
}

// routedNodes delivers a part also to routers of a subnet that contains
// addresses of the meant nodes.
func (c *compiler) routedNodes(f *flow, pt *part, yield func(slot, of int)) {
	for _, i := range c.overlay {
		sn := &c.subnets[i]
		if f.via != nil && !f.via.nodes.has(int(sn.slot)) {
			continue
		}
		for slot := range sn.inside.all {
			if pt.nodes.has(slot) && slot != int(sn.slot) {
				yield(int(sn.slot), slot)
			}
		}
	}
}

// rangeTargets delivers literal addresses to the nodes that have or route one
// of them. A node gets them once.
func (c *compiler) rangeTargets(f *flow, pt *part, yield func(slot, of int)) {
	var hit []int
	if f.via == nil {
		c.within(pt.rng, func(slot int) { hit = append(hit, slot) })
	}
	for i := range c.subnets {
		sn := &c.subnets[i]
		if (f.via == nil || f.via.nodes.has(int(sn.slot))) && pt.rng.Overlaps(netipx.RangeOfPrefix(sn.prefix)) {
			hit = append(hit, int(sn.slot))
		}
	}
	if len(hit) > 1 {
		slices.Sort(hit)
		hit = slices.Compact(hit)
	}
	for _, slot := range hit {
		yield(slot, ofPart)
	}
}

// filterBuilder turns target lists into filters and shares equal ones.
type filterBuilder struct {
	c     *compiler
	index map[uint64][]*sharedFilter

	content map[uint64][]*Filter

	ports []tailcfg.NetPortRange // slab
	rules []tailcfg.FilterRule   // slab
}

// sharedFilter is a filter that does not depend on the receiving node's
// addresses, with the targets that made it.
type sharedFilter struct {
	targets []target
	filter  *Filter
}

func (b *filterBuilder) build(slot int, list []target) *Filter {
	shared := !slices.ContainsFunc(list, func(t target) bool { return t.of != ofPart || b.c.flows[t.flow].isCap })
	h := newHash()
	for _, t := range list {
		h.word(uint64(t.flow)<<32 | uint64(uint32(t.part)))
	}
	if shared {
		for _, s := range b.index[h.sum()] {
			if slices.Equal(s.targets, list) {
				b.delivered(slot, list)
				return s.filter
			}
		}
	}
	f := b.intern(&Filter{Rules: b.filterRules(slot, list)})
	b.delivered(slot, list)
	if shared {
		b.index[h.sum()] = append(b.index[h.sum()], &sharedFilter{list, f})
	}
	return f
}

// intern finds a filter of equal content that other targets led to.
func (b *filterBuilder) intern(f *Filter) *Filter {
	f.hash = hashFilter(f.Rules)
	for _, o := range b.content[f.hash] {
		if o.Equal(f) {
			return o
		}
	}
	b.content[f.hash] = append(b.content[f.hash], f)
	return f
}

// delivered notes which sources the node hears of.
func (b *filterBuilder) delivered(slot int, list []target) {
	last := int32(-1)
	for _, t := range list {
		if t.flow != last {
			s := b.c.flows[t.flow].src
			if n := len(s.deliver.list); n == 0 || s.deliver.list[n-1] != int32(slot) {
				s.deliver.list = append(s.deliver.list, int32(slot))
			}
			last = t.flow
		}
	}
}

func (b *filterBuilder) filterRules(slot int, list []target) []tailcfg.FilterRule {
	flows := 0
	for i, t := range list {
		if i == 0 || t.flow != list[i-1].flow {
			flows++
		}
	}
	rules := carve(&b.rules, flows)
	for len(list) > 0 {
		n := 1
		for n < len(list) && list[n].flow == list[0].flow {
			n++
		}
		f := b.c.flows[list[0].flow]
		switch {
		case f.silent:
		case f.isCap:
			if dsts := b.capDsts(slot, f, list[:n]); len(dsts) > 0 {
				rules = append(rules, tailcfg.FilterRule{
					SrcIPs:   f.src.srcIPs,
					CapGrant: []tailcfg.CapGrant{{Dsts: dsts, CapMap: f.caps}},
				})
			}
		default:
			r := tailcfg.FilterRule{SrcIPs: f.src.srcIPs, DstPorts: b.dstPorts(f, list[:n])}
			if f.proto != 0 {
				r.IPProto = protoList(f.proto)
			}
			if len(r.DstPorts) > 0 {
				rules = append(rules, r)
			}
		}
		list = list[n:]
	}
	return rules
}

// carve cuts an empty slice with room for n out of a slab.
func carve[T any](slab *[]T, n int) []T {
	if cap(*slab)-len(*slab) < n {
		*slab = make([]T, 0, max(1024, n))
	}
	start := len(*slab)
	*slab = (*slab)[:start+n]
	return (*slab)[start : start : start+n]
}

func (b *filterBuilder) dstPorts(f *flow, list []target) []tailcfg.NetPortRange {
	n := 0
	for _, t := range list {
		pt := &f.parts[t.part]
		switch {
		case t.of != ofPart:
			n += 2 * len(pt.ports)
		case pt.kind == partInternet:
			n += len(internetRanges) * len(pt.ports)
		default:
			n += len(pt.ports)
		}
	}
	b.c.spend(n, filterPorts)
	out := carve(&b.ports, n)
	add := func(ip string, ports []tailcfg.PortRange) {
		if ip == "" {
			return
		}
		for _, pr := range ports {
			out = append(out, tailcfg.NetPortRange{IP: ip, Ports: pr})
		}
	}
	for _, t := range list {
		pt := &f.parts[t.part]
		switch {
		case t.of != ofPart:
			add(b.c.text4[t.of], pt.ports)
			add(b.c.text6[t.of], pt.ports)
		case pt.kind == partInternet:
			for _, ip := range internetRanges {
				add(ip, pt.ports)
			}
		case pt.kind == partAll:
			add("*", pt.ports)
		default:
			add(pt.text, pt.ports)
		}
	}
	return out
}

// capDsts are the addresses on which a capability holds: the node's own, and
// of the policy's ranges those that the node routes.
func (b *filterBuilder) capDsts(slot int, f *flow, list []target) []netip.Prefix {
	c := b.c
	n := &c.t.Nodes[slot]
	var out []netip.Prefix
	add := func(p netip.Prefix) {
		if !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	own := func(node *Node, in func(netip.Addr) bool) {
		for _, a := range [...]netip.Addr{node.IPv4, node.IPv6} {
			if a.IsValid() && in(a) {
				add(singlePrefix(a))
			}
		}
	}
	every := func(netip.Addr) bool { return true }
	for _, t := range list {
		pt := &f.parts[t.part]
		switch {
		case t.of != ofPart:
			own(&c.t.Nodes[t.of], every)
		case pt.kind == partAll:
			own(n, every)
		case pt.kind == partRange:
			own(n, pt.rng.Contains)
			if c.routes(slot, pt.rng) {
				for _, p := range pt.prefixes() {
					add(p)
				}
			}
		}
	}
	return out
}

// routes reports whether the node is an approved router of part of the range.
func (c *compiler) routes(slot int, rng netipx.IPRange) bool {
	for _, p := range c.t.Nodes[slot].ApprovedRoutes {
		if p.Bits() > 0 && rng.Overlaps(netipx.RangeOfPrefix(p)) {
			return true
		}
	}
	return false
}

// protoLists are shared by all rules; index is the protocol number.
var protoLists = func() (lists [256][]int) {
	for i := range lists {
		lists[i] = []int{i}
	}
	return
}()

func protoList(proto int) []int { return protoLists[proto&0xff] }

func hashFilter(rules []tailcfg.FilterRule) uint64 {
	h := newHash()
	for i := range rules {
		r := &rules[i]
		h.word(uint64(len(r.SrcIPs)))
		// Rendered sources are sorted and shared, so their ends and length say
		// almost everything; equality compares the rest.
		if n := len(r.SrcIPs); n > 0 {
			h.text(r.SrcIPs[0])
			h.text(r.SrcIPs[n/2])
			h.text(r.SrcIPs[n-1])
		}
		for _, p := range r.IPProto {
			h.word(uint64(p))
		}
		for _, d := range r.DstPorts {
			h.text(d.IP)
			h.word(uint64(d.Ports.First)<<16 | uint64(d.Ports.Last))
		}
		for _, g := range r.CapGrant {
			h.word(uint64(len(g.Dsts)))
			for _, name := range sortedKeys(g.CapMap) {
				h.text(string(name))
			}
		}
	}
	return h.sum()
}
