package acl

import (
	"cmp"
	"fmt"
	"slices"

	"go4.org/netipx"
)

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
