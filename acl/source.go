package acl

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"go4.org/netipx"
)

// source is an interned set of packet sources: nodes, listed by their
// addresses, and address ranges. Sources with equal SrcIPs are one source,
// which is what merging rules by source needs.
type source struct {
	id     int
	nodes  []int32          // ascending
	extra  []string         // everything else, as rendered, sorted
	ranges []netipx.IPRange // what extra means; empty for "*"
	any    bool             // extra has "*"
	wild   bool             // extra includes everything that * means

	srcIPs []string // rendered, sorted
	hash   uint64

	// cover are the nodes with an address or an approved subnet route in the
	// source; deliver those that get a rule with it. Together they decide who
	// sees whom.
	cover, deliver nodeset
}

func (s *source) empty() bool { return len(s.nodes) == 0 && len(s.extra) == 0 }

// contains reports whether packets from the address match. owner is the slot
// of the node that has the address, negative when none does.
func (s *source) contains(a netip.Addr, owner int) bool {
	if s.any {
		return true
	}
	if owner >= 0 {
		if _, ok := slices.BinarySearch(s.nodes, int32(owner)); ok {
			return true
		}
	}
	return slices.ContainsFunc(s.ranges, func(r netipx.IPRange) bool { return r.Contains(a) })
}

// nodeset is a set of slots that is cheap to add to a bitset whether it has
// three members or thousands.
type nodeset struct {
	list []int32
	bits set // only for large sets
}

func (ns *nodeset) orInto(out set) {
	if ns.bits != nil {
		out.or(ns.bits)
		return
	}
	for _, slot := range ns.list {
		out.add(int(slot))
	}
}

// seal sorts the list and decides the representation.
func (ns *nodeset) seal(n int) {
	slices.Sort(ns.list)
	ns.list = slices.Compact(ns.list)
	if len(ns.list) > n/64 {
		ns.bits = newSet(n)
		for _, slot := range ns.list {
			ns.bits.add(int(slot))
		}
	}
}

// sourceSet collects what one rule's src list denotes.
type sourceSet struct {
	nodes set
	extra map[string]netipx.IPRange
	wild  bool // *
	any   bool // autogroup:danger-all
	named bool // the list had an entry, even one that denotes nothing
}

// collect resolves a src list, reduced to the nodes that satisfy the postures.
func (c *compiler) collect(list []selector, where []*posture) *sourceSet {
	ss := &sourceSet{nodes: newSet(c.n), named: len(list) > 0}
	for i := range list {
		c.collectOne(ss, &list[i], len(where) > 0)
	}
	if len(where) > 0 {
		ss.nodes.and(c.satisfying(where))
	}
	return ss
}

// collectOne adds one selector. Under a posture only devices count, so address
// ranges turn into the devices inside them.
func (c *compiler) collectOne(ss *sourceSet, s *selector, devices bool) {
	switch s.kind {
	case selAll:
		if ss.wild = ss.wild || !devices; devices {
			ss.nodes.or(c.live)
		}
		return
	case selDangerAll:
		if ss.any = ss.any || !devices; devices {
			ss.nodes.or(c.live)
		}
		return
	}
	if nodes := c.nodes(c.p, s); nodes != nil {
		ss.nodes.or(nodes)
		return
	}
	for _, rng := range s.ranges(c.svc) {
		if devices {
			c.within(rng, ss.nodes.add)
			continue
		}
		if ss.extra == nil {
			ss.extra = map[string]netipx.IPRange{}
		}
		ss.extra[rangeString(rng)] = rng
	}
}

// ranges are the addresses that an address selector denotes.
func (s *selector) ranges(services map[string]*Service) []netipx.IPRange {
	switch s.kind {
	case selPrefix:
		return []netipx.IPRange{netipx.RangeOfPrefix(s.prefix)}
	case selRange:
		return []netipx.IPRange{s.rng}
	case selIPSet:
		return s.set.Ranges()
	case selService:
		var out []netipx.IPRange
		if svc := services[s.name]; svc != nil {
			for _, a := range svc.addrs() {
				out = append(out, netipx.IPRangeFrom(a, a))
			}
		}
		return out
	}
	return nil
}

// The addresses that * means in a source: the tailnet ranges without the part
// of 100.64.0.0/10 that ChromeOS uses for its own virtual machines.
var wildRanges = []netipx.IPRange{
	netipx.MustParseIPRange("100.64.0.0-100.115.91.255"),
	netipx.MustParseIPRange("100.115.94.0-100.127.255.255"),
	netipx.RangeOfPrefix(netip.MustParsePrefix("fd7a:115c:a1e0::/48")),
}

// source interns the collected set.
func (c *compiler) source(ss *sourceSet) *source {
	extra := ss.extra
	if ss.wild {
		extra = make(map[string]netipx.IPRange, len(ss.extra)+len(c.wild))
		for k, v := range c.wild {
			extra[k] = v
		}
		for k, v := range ss.extra {
			extra[k] = v
		}
	}
	nodes := ss.nodes
	if len(ss.extra) > 0 {
		nodes, extra = c.ownAddresses(nodes, extra)
	}
	var list []int32
	for slot := range nodes.all {
		list = append(list, int32(slot))
	}
	return c.intern(list, extra, ss.any, ss.wild)
}

// ownAddresses folds literal addresses into the node set where that gives the
// same SrcIPs, so that equal sources intern to one.
func (c *compiler) ownAddresses(nodes set, extra map[string]netipx.IPRange) (set, map[string]netipx.IPRange) {
	nodes, rest := nodes.clone(), make(map[string]netipx.IPRange, len(extra))
	has := func(text string) bool { _, ok := extra[text]; return ok || text == "" }
	for text, rng := range extra {
		slot, ok := 0, false
		if rng.From() == rng.To() {
			slot, ok = c.owner(rng.From())
		}
		switch {
		case ok && nodes.has(slot):
		case ok && has(c.text4[slot]) && has(c.text6[slot]):
			nodes.add(slot)
		default:
			rest[text] = rng
		}
	}
	return nodes, rest
}

// intern finds or makes the source of these nodes and ranges.
func (c *compiler) intern(list []int32, extra map[string]netipx.IPRange, any, wild bool) *source {
	texts := sortedKeys(extra)
	if any {
		texts = append(texts, "*")
		slices.Sort(texts)
	}
	h := newHash()
	for _, slot := range list {
		h.word(uint64(slot))
	}
	for _, t := range texts {
		h.text(t)
	}
	for _, s := range c.sourceIndex[h.sum()] {
		if slices.Equal(s.nodes, list) && slices.Equal(s.extra, texts) {
			return s
		}
	}
	s := &source{id: len(c.sources), nodes: list, extra: texts, any: any, wild: wild}
	for _, t := range texts {
		if t != "*" {
			s.ranges = append(s.ranges, extra[t])
		}
	}
	s.srcIPs = c.render(s)
	hs := newHash()
	for _, t := range s.srcIPs {
		hs.text(t)
	}
	s.hash = hs.sum()
	c.cover(s)
	c.sources = append(c.sources, s)
	c.sourceIndex[h.sum()] = append(c.sourceIndex[h.sum()], s)
	return s
}

// render lists the source as SrcIPs, sorted as strings. Addresses are sorted
// through ranks that were computed once.
func (c *compiler) render(s *source) []string {
	c.spend(2*len(s.nodes)+len(s.extra), sourceAddresses)
	ranks := make([]int32, 0, 2*len(s.nodes))
	for _, slot := range s.nodes {
		if r := c.rank4[slot]; r >= 0 {
			ranks = append(ranks, r)
		}
		if r := c.rank6[slot]; r >= 0 {
			ranks = append(ranks, r)
		}
	}
	slices.Sort(ranks)
	out := make([]string, 0, len(ranks)+len(s.extra))
	extra := s.extra
	for _, r := range ranks {
		t := c.ranked[r]
		for len(extra) > 0 && extra[0] < t {
			out, extra = append(out, extra[0]), extra[1:]
		}
		if len(extra) > 0 && extra[0] == t {
			extra = extra[1:]
		}
		out = append(out, t)
	}
	return append(out, extra...)
}

// rankAddresses sorts the rendered addresses of all nodes.
func (c *compiler) rankAddresses() {
	type entry struct {
		text string
		slot int32
		six  bool
	}
	entries := make([]entry, 0, 2*c.n)
	for slot := range c.n {
		if c.text4[slot] != "" {
			entries = append(entries, entry{c.text4[slot], int32(slot), false})
		}
		if c.text6[slot] != "" {
			entries = append(entries, entry{c.text6[slot], int32(slot), true})
		}
	}
	slices.SortFunc(entries, func(a, b entry) int {
		return cmp.Or(strings.Compare(a.text, b.text), cmp.Compare(a.slot, b.slot))
	})
	c.rank4, c.rank6 = make([]int32, c.n), make([]int32, c.n)
	for i := range c.n {
		c.rank4[i], c.rank6[i] = -1, -1
	}
	c.ranked = make([]string, len(entries))
	for i, e := range entries {
		c.ranked[i] = e.text
		if e.six {
			c.rank6[e.slot] = int32(i)
		} else {
			c.rank4[e.slot] = int32(i)
		}
	}
}

// cover computes which nodes the source overlaps.
func (c *compiler) cover(s *source) {
	if s.any {
		for slot := range c.live.all {
			s.cover.list = append(s.cover.list, int32(slot))
		}
		s.cover.seal(c.n)
		return
	}
	s.cover.list = append(s.cover.list, s.nodes...)
	if s.wild {
		s.cover.list = append(s.cover.list, c.wildCover()...)
	}
	for i, rng := range s.ranges {
		if _, ok := c.wild[s.extra[i]]; ok && s.wild {
			continue
		}
		c.within(rng, func(slot int) { s.cover.list = append(s.cover.list, int32(slot)) })
		for k := range c.subnets {
			if sn := &c.subnets[k]; rng.Overlaps(netipx.RangeOfPrefix(sn.prefix)) {
				s.cover.list = append(s.cover.list, sn.slot)
			}
		}
	}
	for _, i := range c.overlay {
		sn := &c.subnets[i]
		if slices.ContainsFunc(s.nodes, func(slot int32) bool { return sn.inside.has(int(slot)) }) {
			s.cover.list = append(s.cover.list, sn.slot)
		}
	}
	s.cover.seal(c.n)
}

// wildCover lists the nodes that * overlaps: those with a tailnet address and
// every approved router.
func (c *compiler) wildCover() []int32 {
	if c.wildNodes == nil {
		c.wildNodes = []int32{}
		for _, rng := range wildRanges {
			c.within(rng, func(slot int) { c.wildNodes = append(c.wildNodes, int32(slot)) })
			for i := range c.subnets {
				if sn := &c.subnets[i]; sn.service && rng.Overlaps(netipx.RangeOfPrefix(sn.prefix)) {
					c.wildNodes = append(c.wildNodes, sn.slot)
				}
			}
		}
		for i := range c.subnets {
			if !c.subnets[i].service {
				c.wildNodes = append(c.wildNodes, c.subnets[i].slot)
			}
		}
	}
	return c.wildNodes
}
