package acl

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"

	"go4.org/netipx"
)

// point is something that sends or receives: one address of a node, or an
// address range in which all addresses are alike to both policies.
type point struct {
	node int // common index; -1 for a range
	six  bool
	rng  netipx.IPRange // of a range
	at   [2]Endpoint    // by side; invalid Addr when missing
}

// pointSet is the universe of a comparison.
type pointSet struct {
	list  []point
	sends [2][][]int32 // by side and point: ascending ids of sources that contain it
	gets  [2][][]ref   // by side and point: parts that contain it
}

// ref names a part of a flow.
type ref struct{ flow, part int32 }

// collectPoints lists the nodes' addresses and splits the address ranges that
// rules and routes name into pieces that no rule, route or node divides.
func (d *differ) collectPoints() {
	ps := &pointSet{}
	for node := range d.ids {
		for _, six := range [...]bool{false, true} {
			pt := point{node: node, six: six, at: [2]Endpoint{{Slot: -1}, {Slot: -1}}}
			some := false
			for i, s := range d.sides {
				if slot := s.slot[node]; slot >= 0 {
					n := &s.g.t.Nodes[slot]
					addr := n.IPv4
					if six {
						addr = n.IPv6
					}
					if addr.IsValid() && s.a.uses(slot, addr) {
						pt.at[i], some = Endpoint{slot, addr}, true
					}
				}
			}
			if some {
				ps.list = append(ps.list, pt)
			}
		}
	}
	for _, rng := range pieces(d.sides[0].g, d.sides[1].g) {
		pt := point{node: -1, six: rng.From().Is6(), rng: rng}
		pt.at[0], pt.at[1] = Endpoint{-1, rng.From()}, Endpoint{-1, rng.From()}
		ps.list = append(ps.list, pt)
	}
	d.points = ps
	for i := range d.sides {
		d.locate(i)
	}
}

// locate fills in which sources and parts contain which points of one side.
func (d *differ) locate(side int) {
	ps, s := d.points, d.sides[side]
	ps.sends[side], ps.gets[side] = make([][]int32, len(ps.list)), make([][]ref, len(ps.list))
	bySlot := make([][]int, s.g.n)
	var ranges []int
	for k := range ps.list {
		if slot := ps.list[k].at[side].Slot; slot >= 0 {
			if ps.list[k].at[side].Addr.IsValid() {
				bySlot[slot] = append(bySlot[slot], k)
			}
		} else if ps.list[k].node < 0 {
			ranges = append(ranges, k)
		}
	}
	candidates := func(nodes iter.Seq[int], within []netipx.IPRange, yield func(k int)) {
		for slot := range nodes {
			for _, k := range bySlot[slot] {
				yield(k)
			}
		}
		for _, k := range ranges {
			addr := ps.list[k].at[side].Addr
			if slices.ContainsFunc(within, func(r netipx.IPRange) bool { return r.Contains(addr) }) {
				yield(k)
			}
		}
	}
	for _, src := range s.g.distinctSources() {
		nodes, within := newSet(s.g.n), src.ranges
		for _, slot := range src.nodes {
			nodes.add(int(slot))
		}
		for _, r := range src.ranges {
			s.g.within(r, nodes.add)
		}
		if src.any {
			nodes, within = s.g.live, everywhere
		}
		candidates(nodes.all, within, func(k int) {
			if e := ps.list[k].at[side]; src.contains(e.Addr, e.Slot) {
				ps.sends[side][k] = append(ps.sends[side][k], int32(src.id))
			}
		})
	}
	for fi, f := range s.g.flows {
		for pi := range f.parts {
			pt := &f.parts[pi]
			nodes, within := pt.nodes, []netipx.IPRange(nil)
			switch pt.kind {
			case partAll, partInternet:
				nodes, within = s.g.live, everywhere
			case partRange:
				nodes, within = newSet(s.g.n), []netipx.IPRange{pt.rng}
				s.g.within(pt.rng, nodes.add)
			}
			candidates(nodes.all, within, func(k int) {
				if s.g.mayGet(f, pt, ps.list[k].at[side]) {
					ps.gets[side][k] = append(ps.gets[side][k], ref{int32(fi), int32(pi)})
				}
			})
		}
	}
}

var everywhere = []netipx.IPRange{netipx.RangeOfPrefix(zero4), netipx.RangeOfPrefix(zero6)}

// mayGet reports whether the part concerns packets to the endpoint. For a node
// that is final; for a range it still depends on the router.
func (g *program) mayGet(f *flow, pt *part, e Endpoint) bool {
	if e.Slot < 0 {
		return !f.isCap && pt.contains(e.Addr, -1)
	}
	if f.isCap {
		return !f.silent && pt.contains(e.Addr, e.Slot)
	}
	return g.delivered(f, pt, e.Slot, e)
}

func (g *program) distinctSources() []*source {
	var out []*source
	seen := map[*source]bool{}
	for _, f := range g.flows {
		if !seen[f.src] && !f.silent {
			seen[f.src] = true
			out = append(out, f.src)
		}
	}
	slices.SortFunc(out, func(a, b *source) int { return cmp.Compare(a.id, b.id) })
	return out
}

// pieces cuts the routed address space at every boundary that a rule, a route
// or a node address makes, and drops what no router offers, no rule names or
// no client sends. All addresses of a piece are alike to all the programs.
func pieces(programs ...*program) []netipx.IPRange {
	var routed, named, nodes netipx.IPSetBuilder
	var cuts []netip.Addr // first addresses of pieces
	cut := func(r netipx.IPRange) {
		cuts = append(cuts, r.From())
		if next := r.To().Next(); next.IsValid() {
			cuts = append(cuts, next)
		}
	}
	for _, g := range programs {
		for i := range g.subnets {
			routed.AddPrefix(g.subnets[i].prefix)
			cut(netipx.RangeOfPrefix(g.subnets[i].prefix))
		}
		for slot := range g.exits.all {
			for _, p := range g.t.Nodes[slot].ApprovedRoutes {
				if p.Bits() == 0 {
					routed.AddPrefix(p)
				}
			}
		}
		for _, a := range g.byAddr {
			nodes.Add(a.addr)
		}
		g.namedRanges(func(r netipx.IPRange) {
			named.AddRange(r)
			cut(r)
		})
	}
	for _, r := range internetSet.Ranges() {
		cut(r)
	}
	for _, p := range unforwarded {
		cut(netipx.RangeOfPrefix(p))
	}
	all := without(&named, &routed, &nodes)
	if all == nil {
		return nil
	}
	slices.SortFunc(cuts, netip.Addr.Compare)
	cuts = slices.Compact(cuts)
	var out []netipx.IPRange
	for _, r := range all.Ranges() {
		from := r.From()
		i, _ := slices.BinarySearchFunc(cuts, from.Next(), netip.Addr.Compare)
		for ; i < len(cuts) && !r.To().Less(cuts[i]); i++ {
			if cuts[i].Is4() == from.Is4() {
				out = append(out, netipx.IPRangeFrom(from, cuts[i].Prev()))
				from = cuts[i]
			}
		}
		out = append(out, netipx.IPRangeFrom(from, r.To()))
	}
	return out
}

// namedRanges enumerates the address ranges of sources and destinations. A
// source that is everybody names whoever sits behind a subnet router.
func (g *program) namedRanges(yield func(netipx.IPRange)) {
	if slices.ContainsFunc(g.flows, func(f *flow) bool { return f.src.any }) {
		for i := range g.subnets {
			yield(netipx.RangeOfPrefix(g.subnets[i].prefix))
		}
	}
	for _, f := range g.flows {
		for _, r := range f.src.ranges {
			yield(r)
		}
		for i := range f.parts {
			switch pt := &f.parts[i]; pt.kind {
			case partRange:
				yield(pt.rng)
			case partInternet:
				for _, r := range internetSet.Ranges() {
					yield(r)
				}
			case partAll:
				for _, r := range everywhere {
					yield(r)
				}
			}
		}
	}
}

// without is what is named and routed but no node's own, less what clients
// never send; nil when the sets cannot be built.
func without(named, routed, nodes *netipx.IPSetBuilder) *netipx.IPSet {
	taken, err := nodes.IPSet()
	if err != nil {
		return nil
	}
	offered, err := routed.IPSet()
	if err != nil {
		return nil
	}
	named.Intersect(offered)
	named.RemoveSet(taken)
	before, err := named.IPSet()
	if err != nil {
		return nil
	}
	for _, p := range droppedRanges {
		named.RemovePrefix(p)
	}
	if before.Contains(metadataAddr) {
		named.Add(metadataAddr)
	}
	all, err := named.IPSet()
	if err != nil {
		return nil
	}
	return all
}
