package tailnet

import (
	"slices"
	"sync"

	"tailscale.com/tailcfg"
)

// TileNodes is the greatest number of nodes in one Tile.
const TileNodes = 64

// A Tile stands for some neighbouring nodes at one moment. A snapshot shares the Tiles of its predecessor whose nodes, and whose look to peers,
// did not change; so a Tile's identity is a cache key for everything encoded from it. Which nodes are in one depends on the ids of all of them
// and on nothing else, so that servers which came to the same revision by different ways cut their messages alike.
type Tile struct {
	Slots []int    // of its nodes, ascending; 1 to TileNodes
	Memo  sync.Map // for netmap
}

// Word tells which nodes of t are in b: bit i is that of Slots[i].
func (t *Tile) Word(b Bits) (w uint64) {
	first, n := t.Slots[0], len(t.Slots)
	if t.Slots[n-1]-first == n-1 { // no holes between them
		w = b.Word(first/64) >> (first % 64)
		w |= b.Word(first/64+1) << (64 - first%64)
		return w & (^uint64(0) >> (64 - n))
	}
	for i, slot := range t.Slots {
		if b.Has(slot) {
			w |= 1 << i
		}
	}
	return w
}

// cut gives add the ids, which are ascending and less than 1<<bits apart from base, run by run: the fewest ranges of ids, each a power of two
// and a multiple of itself, in which there are at most TileNodes of them.
func cut(ids []tailcfg.NodeID, base tailcfg.NodeID, bits int, add func(n int)) {
	if len(ids) == 0 {
		return
	}
	if len(ids) <= TileNodes {
		add(len(ids))
		return
	}
	bits--
	middle := base + 1<<bits
	i, _ := slices.BinarySearch(ids, middle)
	cut(ids[:i], base, bits, add)
	cut(ids[i:], middle, bits, add)
}

// takeTiles keeps the tiles of prev in which neither a node nor its look to peers moved.
func (s *Snapshot) takeTiles(prev *Snapshot, m *moved) {
	var old []*Tile
	if prev != nil && prev.layout == s.layout {
		old = prev.tiles
	}
	if old != nil && !m.members {
		s.tiles = slices.Clone(old)
		for i, t := range old {
			if !s.sameTile(prev, t, m) {
				s.tiles[i] = &Tile{Slots: t.Slots}
			}
		}
		return
	}
	ids, slots := make([]tailcfg.NodeID, 0, len(s.nodes)), make([]int, 0, len(s.nodes))
	for i, n := range s.nodes {
		if n != nil {
			ids, slots = append(ids, n.ID), append(slots, i)
		}
	}
	cut(ids, 0, 63, func(n int) {
		own := slots[:n]
		slots = slots[n:]
		for len(old) > 0 && old[0].Slots[0] < own[0] {
			old = old[1:]
		}
		if len(old) > 0 && slices.Equal(old[0].Slots, own) && s.sameTile(prev, old[0], m) {
			s.tiles = append(s.tiles, old[0])
		} else {
			s.tiles = append(s.tiles, &Tile{Slots: slices.Clone(own)})
		}
	})
}

// sameTile reports whether the nodes of t, a tile of prev, are as they were there, and look so.
func (s *Snapshot) sameTile(prev *Snapshot, t *Tile, m *moved) bool {
	for _, i := range t.Slots {
		if m.touched[i] || s.access != prev.access && !s.access.Base(i).Equal(prev.access.Base(i)) {
			return false
		}
	}
	return true
}
