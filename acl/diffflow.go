package acl

import (
	"cmp"
	"fmt"
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
	for _, rng := range d.pieces() {
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
// no client sends.
func (d *differ) pieces() []netipx.IPRange {
	var routed, named, nodes netipx.IPSetBuilder
	var cuts []netip.Addr // first addresses of pieces
	cut := func(r netipx.IPRange) {
		cuts = append(cuts, r.From())
		if next := r.To().Next(); next.IsValid() {
			cuts = append(cuts, next)
		}
	}
	for _, s := range d.sides {
		for i := range s.g.subnets {
			routed.AddPrefix(s.g.subnets[i].prefix)
			cut(netipx.RangeOfPrefix(s.g.subnets[i].prefix))
		}
		for slot := range s.g.exits.all {
			for _, p := range s.g.t.Nodes[slot].ApprovedRoutes {
				if p.Bits() == 0 {
					routed.AddPrefix(p)
				}
			}
		}
		for _, a := range s.g.byAddr {
			nodes.Add(a.addr)
		}
		s.g.namedRanges(func(r netipx.IPRange) {
			named.AddRange(r)
			cut(r)
		})
	}
	for _, r := range internetSet.Ranges() {
		cut(r)
	}
	for _, p := range droppedRanges {
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

// namedRanges enumerates the address ranges of sources and destinations.
func (g *program) namedRanges(yield func(netipx.IPRange)) {
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

// flows compares what may be opened, between classes of points that both
// policies treat alike.
func (d *differ) flows() []FlowChange {
	d.collectPoints()
	ps := d.points
	senders := d.classes(func(h *hasher, k int) {
		for i := range d.sides {
			h.word(uint64(i) << 50)
			for _, id := range ps.sends[i][k] {
				h.word(uint64(id))
			}
			h.word(d.routingOf(i, k))
		}
	})
	receivers := d.classes(func(h *hasher, k int) {
		if ps.list[k].node < 0 {
			h.word(uint64(k)) // a range is a class of its own
		}
		for i := range d.sides {
			h.word(uint64(i) << 50)
			for _, r := range ps.gets[i][k] {
				h.word(uint64(r.flow)<<32 | uint64(r.part))
			}
		}
	})
	byReceiver := newGrouping(len(ps.list))
	spans := map[string]span{}
	for _, to := range receivers {
		if d.unchanged(to[0]) {
			continue
		}
		acc := map[string]set{}
		for _, from := range senders {
			if ps.list[from[0]].six != ps.list[to[0]].six {
				continue
			}
			was, now := d.opens(0, from[0], to[0]), d.opens(1, from[0], to[0])
			for opened, list := range [...][]span{minusSpans(was, now), minusSpans(now, was)} {
				for _, sp := range list {
					key := fmt.Sprint(opened, " ", sp)
					spans[key] = sp
					if acc[key] == nil {
						acc[key] = newSet(len(ps.list))
					}
					for _, k := range from {
						acc[key].add(k)
					}
				}
			}
		}
		for _, key := range sortedKeys(acc) {
			for _, k := range to {
				byReceiver.add(key, acc[key], k)
			}
		}
	}
	var out []FlowChange
	for _, e := range byReceiver.list {
		c := FlowChange{Opened: e.key[0] == '1', span: spans[e.key], from: members(e.set), to: members(e.members)}
		if d.onlySelf(c.from, c.to) {
			continue
		}
		c.Allow, c.From, c.To = c.span.String(), d.pointNames(c.from), d.pointNames(c.to)
		out = append(out, c)
	}
	slices.SortStableFunc(out, func(a, b FlowChange) int {
		return cmp.Or(slices.Compare(a.From, b.From), slices.Compare(a.To, b.To), cmp.Compare(a.Allow, b.Allow))
	})
	return out
}

func members(s set) []int {
	var out []int
	for i := range s.all {
		out = append(out, i)
	}
	return out
}

// onlySelf reports whether all pairs are of a node with itself.
func (d *differ) onlySelf(from, to []int) bool {
	for _, f := range from {
		for _, t := range to {
			if n := d.points.list[f].node; n < 0 || n != d.points.list[t].node {
				return false
			}
		}
	}
	return true
}

// classes groups points by digest. Points of different families never share a
// class, nor do points that exist on different sides.
func (d *differ) classes(digest func(h *hasher, k int)) [][]int {
	index := map[uint64]int{}
	var out [][]int
	for k := range d.points.list {
		h := newHash()
		pt := &d.points.list[k]
		if pt.six {
			h.word(6)
		}
		for _, e := range pt.at {
			if e.Addr.IsValid() {
				h.word(1)
			} else {
				h.word(0)
			}
		}
		digest(&h, k)
		i, ok := index[h.sum()]
		if !ok {
			i = len(out)
			index[h.sum()] = i
			out = append(out, nil)
		}
		out[i] = append(out[i], k)
	}
	return out
}

// routingOf digests where a sender's packets to ranges go.
func (d *differ) routingOf(i, k int) uint64 {
	e := d.points.list[k].at[i]
	if !e.Addr.IsValid() {
		return 0
	}
	slot := e.Slot
	if slot < 0 {
		if slot = d.sides[i].a.routerOf(e.Addr); slot < 0 {
			return 1
		}
	}
	h := newHash()
	a := d.sides[i].a
	h.word(a.views[slot].Hash())
	for _, router := range a.views[slot].Slots {
		if a.rows[slot].Has(router) {
			h.word(uint64(router))
		}
	}
	return h.sum()
}

// unchanged reports whether nothing can have changed for a receiver, because
// it gets the same things from the same senders on both sides. Ranges are
// always compared, as routing matters too.
func (d *differ) unchanged(k int) bool {
	pt := &d.points.list[k]
	if pt.node < 0 || !pt.at[0].Addr.IsValid() || !pt.at[1].Addr.IsValid() {
		return false
	}
	var keys [2][]uint64
	for i := range keys {
		for _, r := range d.points.gets[i][k] {
			f := d.sides[i].g.flows[r.flow]
			h := newHash()
			h.word(d.sourceDigest(i, f.src))
			for _, sp := range f.spans(&f.parts[r.part]) {
				h.word(uint64(sp.proto)<<32 | uint64(sp.first)<<16 | uint64(sp.last))
				h.text(sp.app)
			}
			keys[i] = append(keys[i], h.sum())
		}
		slices.Sort(keys[i])
		keys[i] = slices.Compact(keys[i])
	}
	return slices.Equal(keys[0], keys[1])
}

// sourceDigest identifies a source by the points it contains.
func (d *differ) sourceDigest(i int, src *source) uint64 {
	s := d.sides[i]
	if s.digests == nil {
		s.digests = map[int]*hasher{}
		for k, list := range d.points.sends[i] {
			for _, id := range list {
				if s.digests[int(id)] == nil {
					h := newHash()
					s.digests[int(id)] = &h
				}
				s.digests[int(id)].word(uint64(k))
			}
		}
	}
	if h := s.digests[src.id]; h != nil {
		return h.sum()
	}
	return 0
}

// opens is what a sender may open on a receiver.
func (d *differ) opens(i, from, to int) []span {
	s := d.sides[i]
	a, b := d.points.list[from].at[i], d.points.list[to].at[i]
	if !a.Addr.IsValid() || !b.Addr.IsValid() {
		return nil
	}
	var out []span
	var paths []path
	for _, r := range d.points.gets[i][to] {
		f := s.g.flows[r.flow]
		if _, ok := slices.BinarySearch(d.points.sends[i][from], int32(f.src.id)); !ok {
			continue
		}
		if b.Slot < 0 {
			if paths == nil {
				paths = s.a.paths(a, b.Addr)
			}
			if !s.g.arrives(f, &f.parts[r.part], paths, b) {
				continue
			}
		}
		out = append(out, f.spans(&f.parts[r.part])...)
	}
	return mergeSpans(out)
}

// pointNames lists nodes by name and joins neighbouring ranges. A node of which
// only one address is meant says which.
func (d *differ) pointNames(points []int) []string {
	families := map[int]int{}
	var ranges netipx.IPSetBuilder
	for _, k := range points {
		pt := &d.points.list[k]
		switch {
		case pt.node < 0:
			ranges.AddRange(pt.rng)
		case pt.six:
			families[pt.node] |= 2
		default:
			families[pt.node] |= 1
		}
	}
	var nodes []int
	for node := range families {
		nodes = append(nodes, node)
	}
	slices.Sort(nodes)
	out := []string{}
	for _, node := range nodes {
		name := d.names[node]
		if missing := d.familiesOf(node) &^ families[node]; missing == 1 {
			name += " (IPv6)"
		} else if missing == 2 {
			name += " (IPv4)"
		}
		out = append(out, name)
	}
	if set, err := ranges.IPSet(); err == nil {
		out = append(out, setStrings(set)...)
	}
	return out
}

func (d *differ) familiesOf(node int) int {
	have := 0
	for _, s := range d.sides {
		if slot := s.slot[node]; slot >= 0 {
			if s.g.t.Nodes[slot].IPv4.IsValid() {
				have |= 1
			}
			if s.g.t.Nodes[slot].IPv6.IsValid() {
				have |= 2
			}
		}
	}
	return have
}
