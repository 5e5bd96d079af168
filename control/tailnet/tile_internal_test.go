package tailnet

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/db"
)

// cuts are the runs into which ids are cut.
func cuts(ids []tailcfg.NodeID) (out [][]tailcfg.NodeID) {
	rest := ids
	cut(ids, 0, 63, func(n int) {
		out = append(out, rest[:n])
		rest = rest[n:]
	})
	return out
}

// Ids that follow one another fill their tiles; when most nodes have left, those that stay share them.
func TestCut(t *testing.T) {
	var dense, sparse []tailcfg.NodeID
	for id := tailcfg.NodeID(1); id <= 10_000; id++ {
		dense = append(dense, id)
		if id%100 == 0 {
			sparse = append(sparse, id)
		}
	}
	for _, c := range []struct {
		name string
		ids  []tailcfg.NodeID
		want int
	}{
		{"none", nil, 0}, {"one", dense[:1], 1}, {"64", dense[:64], 1}, {"65", dense[:65], 2}, {"10,000", dense, 157}, {"a hundredth of 10,000", sparse, 3},
		{"the greatest id", []tailcfg.NodeID{1, 1<<63 - 1}, 1},
	} {
		got := cuts(c.ids)
		if len(got) != c.want || !slices.Equal(slices.Concat(got...), c.ids) {
			t.Errorf("%s: %d tiles, want %d", c.name, len(got), c.want)
		}
	}
}

// One node more or less changes the tile that it is in, and at most cuts it in two or joins two.
func TestCutIsLocal(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	for range 200 {
		var ids []tailcfg.NodeID
		for id := tailcfg.NodeID(r.IntN(1000)); len(ids) < 1+r.IntN(800); id += tailcfg.NodeID(1 + r.IntN(1+r.IntN(200))) {
			ids = append(ids, id)
		}
		all, i := cuts(ids), r.IntN(len(ids))
		less := cuts(slices.Delete(slices.Clone(ids), i, i+1))
		kept := 0
		for _, run := range less {
			if len(run) > TileNodes {
				t.Fatalf("a tile of %d", len(run))
			}
			if slices.ContainsFunc(all, func(x []tailcfg.NodeID) bool { return slices.Equal(x, run) }) {
				kept++
			}
		}
		if kept < len(less)-1 || kept < len(all)-2 {
			t.Errorf("of %d tiles %d stay when a node leaves, of then %d", len(all), kept, len(less))
		}
	}
}

func TestTileWord(t *testing.T) {
	r := rand.New(rand.NewPCG(8, 8))
	for range 2000 {
		tile := new(Tile)
		gap := 1 + r.IntN(3)
		for slot := r.IntN(200); len(tile.Slots) < 1+r.IntN(TileNodes); slot += 1 + r.IntN(gap) {
			tile.Slots = append(tile.Slots, slot)
		}
		b := make(Bits, 1+r.IntN(8)) // may end before the tile does
		for i := range b {
			b[i] = r.Uint64()
		}
		var want uint64
		for i, slot := range tile.Slots {
			if b.Has(slot) {
				want |= 1 << i
			}
		}
		if got := tile.Word(b); got != want {
			t.Fatalf("slots %v: %b, want %b", tile.Slots, got, want)
		}
	}
}

// When a node joins, goes or changes, the tiles of the others stay, and with them what was encoded from them.
func TestOtherTilesStay(t *testing.T) {
	user := &db.User{ID: 1, Name: "u"}
	full := &db.Batch{Full: true, To: 1, Nodes: map[tailcfg.NodeID]*db.Node{}, Users: map[tailcfg.UserID]*db.User{1: user}}
	node := func(id tailcfg.NodeID) *db.Node { return &db.Node{ID: id, User: 1, GivenName: fmt.Sprint("n", id)} }
	for id := tailcfg.NodeID(1); id <= 300; id++ {
		full.Nodes[id] = node(id)
	}
	s, err := Build(nil, full)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what  string
		nodes map[tailcfg.NodeID]*db.Node
		fresh int
	}{
		{"a node joins", map[tailcfg.NodeID]*db.Node{301: node(301)}, 1},
		{"a node changes", map[tailcfg.NodeID]*db.Node{70: {ID: 70, User: 1, GivenName: "other"}}, 1},
		{"a node goes", map[tailcfg.NodeID]*db.Node{130: nil}, 1},
		{"nobody", nil, 0},
		{"two of one tile", map[tailcfg.NodeID]*db.Node{5: nil, 9: {ID: 9, User: 1, GivenName: "nine"}}, 1},
	} {
		next, err := Build(s, &db.Batch{From: s.rev, To: s.rev + 1, Nodes: c.nodes})
		if err != nil {
			t.Fatal(err)
		}
		fresh := 0
		for _, tile := range next.tiles {
			if !slices.Contains(s.tiles, tile) {
				fresh++
			}
		}
		if fresh != c.fresh {
			t.Errorf("%s: %d of %d tiles are new, want %d", c.what, fresh, len(next.tiles), c.fresh)
		}
		s = next
	}
}
