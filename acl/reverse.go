package acl

import (
	"fmt"
	"slices"

	"go4.org/netipx"
)

// Opening is what a sender may open on a receiver.
type Opening struct {
	Slot int // the other node; -1 for addresses behind routers

	// Range is what is meant when Slot is -1: an address, a CIDR or a range
	// a-b; "autogroup:internet" for all of it; or 0.0.0.0/0 or ::/0 for all
	// that an exit node forwards and no subnet router offers.
	Range string

	Ports []string // such as "tcp:443"; no protocol means the default set
	Lines []int    // of the rules
}

// ReachableFrom lists what the sender can reach: nodes, and what routers offer
// of the addresses that rules name.
func (a *Access) ReachableFrom(from Endpoint) []Opening {
	g := a.prog
	type target struct {
		Endpoint
		rng   netipx.IPRange // when no node has the address
		paths []path
	}
	var nodes, ranges []target
	for slot := range g.live.all {
		for _, to := range g.nodeEndpoints(slot) {
			if slot != from.Slot && to.Addr.Is4() == from.Addr.Is4() {
				nodes = append(nodes, target{Endpoint: to, paths: a.paths(from, to.Addr)})
			}
		}
	}
	for _, rng := range pieces(g) {
		if to := (Endpoint{-1, rng.From()}); to.Addr.Is4() == from.Addr.Is4() {
			ranges = append(ranges, target{to, rng, a.paths(from, to.Addr)})
		}
	}
	subnets := g.subnetSet()
	b := newOpenings()
	for _, f := range g.flows {
		if f.isCap || f.silent || !f.src.contains(from.Addr, from.Slot) {
			continue
		}
		for i := range f.parts {
			pt := &f.parts[i]
			for k := range nodes {
				if to := &nodes[k]; pt.contains(to.Addr, to.Slot) && g.arrives(f, pt, to.paths, to.Endpoint) {
					b.put(g, f, pt, to.Slot, "")
				}
			}
			var reached netipx.IPSetBuilder
			some := false
			for k := range ranges {
				if to := &ranges[k]; pt.contains(to.Addr, -1) && g.arrives(f, pt, to.paths, to.Endpoint) {
					reached.AddRange(to.rng)
					some = true
				}
			}
			if !some {
				continue
			}
			for _, text := range rangeTexts(&reached, subnets, from.Addr.Is4(), pt.kind == partInternet) {
				b.put(g, f, pt, -1, text)
			}
		}
	}
	return b.list
}

// subnetSet is what subnet routers offer and nodes have: everything that no
// packet reaches over a default route.
func (g *program) subnetSet() *netipx.IPSet {
	var b netipx.IPSetBuilder
	for i := range g.subnets {
		b.AddPrefix(g.subnets[i].prefix)
	}
	for _, a := range g.byAddr {
		b.Add(a.addr)
	}
	set, err := b.IPSet()
	if err != nil {
		return &netipx.IPSet{} // no valid address makes one
	}
	return set
}

// rangeTexts renders the addresses of one family that a part reaches, those
// behind subnet routers first. What is reached over a default route is one
// text when it is all that can be.
func rangeTexts(reached *netipx.IPSetBuilder, subnets *netipx.IPSet, four, internet bool) []string {
	set, err := reached.IPSet()
	if err != nil {
		return nil
	}
	var inside, beyond, most netipx.IPSetBuilder
	inside.AddSet(set)
	inside.Intersect(subnets)
	beyond.AddSet(set)
	beyond.RemoveSet(subnets)

	all, text := zero6, zero6.String()
	if four {
		all, text = zero4, zero4.String()
	}
	most.AddPrefix(all)
	if internet {
		text = "autogroup:internet"
		most.Intersect(internetSet)
	}
	for _, p := range unforwarded {
		most.RemovePrefix(p)
	}
	most.RemoveSet(subnets)

	var out []string
	if set, err = inside.IPSet(); err == nil {
		out = setStrings(set)
	}
	over, err := beyond.IPSet()
	if err != nil {
		return out
	}
	if full, err := most.IPSet(); err == nil && over.Equal(full) {
		return append(out, text)
	}
	return append(out, setStrings(over)...)
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
