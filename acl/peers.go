package acl

import "slices"

// rows computes who sees whom. Two nodes are peers when a rule delivered to
// one of them has a source that overlaps the other's addresses or approved
// subnet routes; peers are always mutual.
//
// Nodes that hear the same sources and lie in the same sources form a class
// and share one row, so the work is classes times sources, not pairs.
func (c *compiler) rows() []*Row {
	hears := c.perNode(func(s *source) *nodeset { return &s.deliver })
	lies := c.perNode(func(s *source) *nodeset { return &s.cover })

	type class struct {
		slot int
		row  *Row
	}
	classes := map[uint64][]class{}
	rows := map[uint64][]*Row{}
	out := make([]*Row, c.n)
	for slot := range c.n {
		h := newHash()
		for _, id := range hears[slot] {
			h.word(uint64(id))
		}
		h.word(1 << 40)
		for _, id := range lies[slot] {
			h.word(uint64(id))
		}
		for _, k := range classes[h.sum()] {
			if slices.Equal(hears[k.slot], hears[slot]) && slices.Equal(lies[k.slot], lies[slot]) {
				out[slot] = k.row
				break
			}
		}
		if out[slot] != nil {
			continue
		}
		s := newSet(c.n)
		for _, id := range hears[slot] {
			c.sources[id].cover.orInto(s)
		}
		for _, id := range lies[slot] {
			c.sources[id].deliver.orInto(s)
		}
		out[slot] = internRow(rows, s)
		classes[h.sum()] = append(classes[h.sum()], class{slot, out[slot]})
	}
	return out
}

// perNode inverts a relation of sources to nodes: for each node the ids of the
// sources, ascending.
func (c *compiler) perNode(of func(*source) *nodeset) [][]int32 {
	counts := make([]int32, c.n)
	total := 0
	for _, s := range c.sources {
		list := of(s).list
		total += len(list)
		for _, slot := range list {
			counts[slot]++
		}
	}
	slab := make([]int32, total)
	out := make([][]int32, c.n)
	for slot, n := range counts {
		out[slot], slab = slab[:0:n], slab[n:]
	}
	for _, s := range c.sources {
		for _, slot := range of(s).list {
			out[slot] = append(out[slot], int32(s.id))
		}
	}
	return out
}
