package acl

import (
	"fmt"
	"net/netip"
	"slices"
)

// Opening is what a sender may open on a receiver.
type Opening struct {
	Slot  int      // the other node; -1 for a range behind routers
	Range string   // address or range when Slot is -1
	Ports []string // such as "tcp:443"; no protocol means the default set
	Lines []int    // of the rules
}

// ReachableFrom lists what the sender can reach: nodes, and ranges behind
// routers that rules name.
func (a *Access) ReachableFrom(from Endpoint) []Opening {
	g := a.prog
	b := newOpenings()
	for _, f := range g.flows {
		if f.isCap || f.silent || !f.src.contains(from.Addr, from.Slot) {
			continue
		}
		for i := range f.parts {
			pt := &f.parts[i]
			switch pt.kind {
			case partAll:
				for slot := range g.live.all {
					b.add(g, f, pt, slot, "", from)
				}
			case partNodes:
				for slot := range pt.nodes.all {
					b.add(g, f, pt, slot, "", from)
				}
			case partInternet:
				if g.arrives(f, pt, a.paths(from, internetProbe(from.Addr)), Endpoint{-1, internetProbe(from.Addr)}) {
					b.add(g, f, pt, -1, "autogroup:internet", from)
				}
			case partRange:
				g.within(pt.rng, func(slot int) { b.add(g, f, pt, slot, "", from) })
				if to := g.endpoint(pt.rng.From()); to.Slot < 0 && g.arrives(f, pt, a.paths(from, to.Addr), to) {
					b.add(g, f, pt, -1, pt.text, from)
				}
			}
		}
	}
	return b.list
}

// internetProbe is some address of the public Internet.
func internetProbe(from netip.Addr) netip.Addr {
	if from.Is4() {
		return netip.AddrFrom4([4]byte{8, 8, 8, 8})
	}
	return netip.MustParseAddr("2001:4860:4860::8888")
}

// WhoReaches lists the nodes that can reach the receiver, with what they may
// open there.
func (a *Access) WhoReaches(to Endpoint) []Opening {
	g := a.prog
	b := newOpenings()
	for slot := range g.live.all {
		for _, from := range g.nodeEndpoints(slot) {
			if from.Addr.Is4() != to.Addr.Is4() || slot == to.Slot {
				continue
			}
			paths := a.paths(from, to.Addr)
			for _, f := range g.flows {
				if f.isCap || !f.src.contains(from.Addr, slot) {
					continue
				}
				for i := range f.parts {
					if pt := &f.parts[i]; g.arrives(f, pt, paths, to) {
						b.put(g, f, pt, slot, "")
					}
				}
			}
		}
	}
	return b.list
}

// arrives reports whether the part lets packets arrive on one of the paths.
func (g *program) arrives(f *flow, pt *part, paths []path, to Endpoint) bool {
	return slices.ContainsFunc(paths, func(p path) bool {
		return p.receiver >= 0 && g.delivered(f, pt, p.receiver, to)
	})
}

// openings collects by node and range.
type openings struct {
	list  []Opening
	index map[string]int
}

func newOpenings() *openings { return &openings{index: map[string]int{}} }

// add notes a flow to a node, if it reaches an address of the sender's family.
func (b *openings) add(g *program, f *flow, pt *part, slot int, rng string, from Endpoint) {
	if slot >= 0 {
		if slot == from.Slot {
			return
		}
		if !slices.ContainsFunc(g.nodeEndpoints(slot), func(to Endpoint) bool {
			return to.Addr.Is4() == from.Addr.Is4() && g.delivered(f, pt, slot, to)
		}) {
			return
		}
	}
	b.put(g, f, pt, slot, rng)
}

func (b *openings) put(g *program, f *flow, pt *part, slot int, rng string) {
	key := fmt.Sprint(slot, " ", rng)
	i, ok := b.index[key]
	if !ok {
		i = len(b.list)
		b.index[key] = i
		b.list = append(b.list, Opening{Slot: slot, Range: rng})
	}
	o := &b.list[i]
	if text := portsText(f.proto, pt.ports); !slices.Contains(o.Ports, text) {
		o.Ports = append(o.Ports, text)
	}
	line := g.use(pt.rule).Line
	if !slices.Contains(o.Lines, line) {
		o.Lines = append(o.Lines, line)
	}
}
