package acl

import (
	"cmp"
	"fmt"
	"slices"

	"go4.org/netipx"
	"tailscale.com/tailcfg"
)

// maxShadowRules bounds the search for shadowed rules, which compares pairs.
const maxShadowRules = 2000

// Warnings lists remarks about a valid policy in the order of the text: that
// everything is allowed, definitions that nothing uses, names that match
// nothing in the tailnet, rules that have no effect there, and rules that an
// earlier rule makes superfluous.
func Warnings(p *Policy, t *Tailnet) []Warning {
	w := &warner{p: p, r: newResolver(t), said: map[string]bool{}}
	if !p.declared {
		w.say(p.root.StartOffset, "no acls or grants: every device reaches every device")
	}
	w.unused()
	w.unmatched()
	w.ineffective()
	w.shadowed()
	slices.SortStableFunc(w.out, func(a, b Warning) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return w.out
}

type warner struct {
	p    *Policy
	r    *resolver
	out  []Warning
	said map[string]bool // names that were reported as matching nothing
}

func (w *warner) say(at int, format string, args ...any) {
	w.out = append(w.out, Warning(*w.p.errorAt(at, fmt.Sprintf(format, args...))))
}

func (w *warner) unused() {
	p := w.p
	report := func(name text) {
		if !p.used[name.s] {
			w.say(name.at, "%q is not used", name.s)
		}
	}
	for _, k := range sortedKeys(p.groups) {
		report(p.groups[k].name)
	}
	for _, k := range sortedKeys(p.hosts) {
		report(p.hosts[k].name)
	}
	for _, k := range sortedKeys(p.ipsets) {
		report(p.ipsets[k].name)
	}
	for _, k := range sortedKeys(p.postures) {
		report(p.postures[k].name)
	}
	for _, k := range sortedKeys(p.tagOwners) {
		if w.r.byTag[k] == nil {
			report(p.tagOwners[k].name)
		}
	}
}

// unmatched reports names that denote nobody, each once.
func (w *warner) unmatched() {
	p := w.p
	for _, k := range sortedKeys(p.groups) {
		w.match(p.groups[k].members)
	}
	for _, k := range sortedKeys(p.tagOwners) {
		for _, o := range p.tagOwners[k].owners {
			// A tag that owns others, as that of a CI system does, needs no device.
			if o.kind != selTag {
				w.match([]selector{o})
			}
		}
	}
	for _, ru := range p.rules {
		w.match(ru.src)
		for i := range ru.dst {
			w.match([]selector{ru.dst[i].selector})
		}
		w.matchTags(ru.via)
	}
	for _, ru := range p.ssh {
		w.match(ru.src)
		w.match(ru.dst)
		w.matchTags(ru.recorders)
	}
	for _, a := range p.attrs {
		w.match(a.target)
	}
	for _, a := range p.approveRoutes {
		w.match(a.by)
	}
	w.match(p.approveExit)
	for _, a := range p.approveSvc {
		w.match([]selector{{text: a.name, kind: selService, name: a.name.s}})
		w.match(a.by)
	}
}

func (w *warner) matchTags(tags []text) {
	for _, t := range tags {
		w.match([]selector{{text: t, kind: selTag, name: t.s}})
	}
}

func (w *warner) match(list []selector) {
	for i := range list {
		s := &list[i]
		if w.said[s.s] {
			continue
		}
		if what := w.missing(s); what != "" {
			w.said[s.s] = true
			w.say(s.at, "%q matches nothing: %s", s.s, what)
		}
	}
}

// missing says why a selector denotes nobody; empty when it denotes somebody.
func (w *warner) missing(s *selector) string {
	switch s.kind {
	case selUser:
		if u, err := w.r.user(s.name); err == nil && u == nil {
			return "no such user"
		}
	case selUserDomain, selRole:
		if !slices.ContainsFunc(w.r.t.Users, func(u User) bool { return w.r.isUser(w.p, s, &u) }) {
			return "no such user"
		}
	case selTag:
		if w.r.byTag[s.name] == nil {
			return "no device has this tag"
		}
	case selGroup:
		if len(w.p.groups[s.name].members) == 0 {
			return "the group is empty"
		}
	case selShared:
		return "no devices of other tailnets are shared"
	case selService:
		if w.r.svc[s.name] == nil {
			return "no such service"
		}
	case selInternet:
		if w.r.exits.empty() {
			return "no exit node is approved"
		}
	case selPrefix, selRange, selIPSet:
		if !w.placed(s, nil) {
			return "no device has or routes an address of it"
		}
	}
	return ""
}

// placed reports whether a node has, or an approved router offers, one of the
// addresses of a selector; with via only those routers count.
func (w *warner) placed(s *selector, via set) bool {
	for _, rng := range s.ranges(w.r.svc) {
		found := false
		if via == nil {
			w.r.within(rng, func(int) { found = true })
		}
		if found || slices.ContainsFunc(w.r.subnets, func(sn subnet) bool {
			return (via == nil || via.has(int(sn.slot))) && rng.Overlaps(netipx.RangeOfPrefix(sn.prefix))
		}) {
			return true
		}
	}
	return false
}

// ineffective reports rules that open nothing, because nobody is in src or
// nobody gets them. A tailnet without devices says nothing about a policy.
func (w *warner) ineffective() {
	if w.r.live.empty() {
		return
	}
	for _, ru := range w.p.rules {
		dst := make([]selector, len(ru.dst))
		for i := range ru.dst {
			dst[i] = ru.dst[i].selector
		}
		if why := w.without(ru.src, dst, ru.where, ru.via); why != "" {
			w.say(ru.at, "this rule has no effect: %s", why)
		}
	}
	for _, ru := range w.p.ssh {
		if why := w.without(ru.src, ru.dst, ru.where, nil); why != "" {
			w.say(ru.at, "this SSH rule has no effect: %s", why)
		}
	}
}

// without says what a rule lacks; empty when it lacks nothing.
func (w *warner) without(src, dst []selector, where []*posture, viaTags []text) string {
	senders, outside := newSet(w.r.n), false
	for i := range src {
		if nodes := w.r.nodes(w.p, &src[i]); nodes != nil {
			senders.or(nodes)
			continue
		}
		for _, rng := range src[i].ranges(w.r.svc) {
			w.r.within(rng, senders.add)
		}
		outside = outside || w.placed(&src[i], nil)
	}
	if senders.empty() && !outside {
		return "no device is in src"
	}
	if len(where) > 0 {
		if senders.and(w.r.satisfying(where)); senders.empty() {
			return "no device in src satisfies srcPosture"
		}
	}
	var via set
	if len(viaTags) > 0 {
		via = newSet(w.r.n)
		for _, t := range viaTags {
			if b := w.r.byTag[t.s]; b != nil {
				via.or(b)
			}
		}
	}
	if !slices.ContainsFunc(dst, func(s selector) bool { return w.receives(&s, senders, via) }) {
		if via != nil {
			return "no device of via routes anything in dst"
		}
		return "no device has or routes anything in dst"
	}
	return ""
}

// receives reports whether some device gets a rule with this destination.
func (w *warner) receives(s *selector, senders, via set) bool {
	r := w.r
	if s.kind == selSelf {
		own := senders.clone()
		own.and(r.untagged)
		return !own.empty()
	}
	if s.kind == selInternet || s.kind == selAll && via != nil {
		for slot := range r.live.all {
			routes := r.exits.has(slot) || s.kind == selAll && len(r.t.Nodes[slot].ApprovedRoutes) > 0
			if routes && (via == nil || via.has(slot)) {
				return true
			}
		}
		return false
	}
	nodes := r.nodes(w.p, s)
	switch {
	case nodes == nil:
		return w.placed(s, via)
	case via == nil:
		return !nodes.empty()
	}
	// Routers get a rule about devices whose addresses they route.
	return slices.ContainsFunc(r.overlay, func(i int) bool {
		inside := nodes.clone()
		inside.and(r.subnets[i].inside)
		return via.has(int(r.subnets[i].slot)) && !inside.empty()
	})
}

// shadowed reports rules of which every source and destination is already
// covered by one earlier rule, and rules that allow everything.
func (w *warner) shadowed() {
	rules := w.p.rules
	for i, ru := range rules {
		if ru.allowsAll() {
			w.say(ru.at, "this rule lets every device reach every device")
		}
		if i >= maxShadowRules || len(ru.apps) > 0 || len(ru.via) > 0 || len(ru.src) == 0 || len(ru.dst) == 0 {
			continue
		}
		for _, o := range rules[:i] {
			if o.covers(ru) {
				w.say(ru.at, "the rule in line %d already allows all of this", w.p.lineOf(o.at))
				break
			}
		}
	}
}

func (ru *rule) allowsAll() bool {
	all := func(s *selector) bool { return s.kind == selAll || s.kind == selDangerAll }
	if len(ru.where) > 0 || len(ru.via) > 0 {
		return false
	}
	open := slices.ContainsFunc(ru.dst, func(d destination) bool {
		return all(&d.selector) && slices.ContainsFunc(ru.portsOf(&d), func(pp protoPorts) bool {
			return pp.proto == 0 && slices.Contains(pp.ports, tailcfg.PortRangeAny)
		})
	})
	return open && slices.ContainsFunc(ru.src, func(s selector) bool { return all(&s) })
}

// portsOf is what the rule opens on one destination.
func (ru *rule) portsOf(d *destination) []protoPorts {
	if ru.kind == kindACL {
		return []protoPorts{{proto: ru.proto, ports: d.ports}}
	}
	return ru.ports
}

// covers compares by name: it finds what is certain without a tailnet.
func (ru *rule) covers(o *rule) bool {
	if len(ru.via) > 0 || len(ru.where) > 0 && !slices.Equal(ru.where, o.where) {
		return false
	}
	for i := range o.src {
		if !slices.ContainsFunc(ru.src, func(s selector) bool { return s.includes(&o.src[i], true) }) {
			return false
		}
	}
	for i := range o.dst {
		d := &o.dst[i]
		for _, need := range o.portsOf(d) {
			for _, pr := range need.ports {
				if !ru.opens(d, need.proto, pr) {
					return false
				}
			}
		}
	}
	return true
}

func (ru *rule) opens(d *destination, proto int, pr tailcfg.PortRange) bool {
	return slices.ContainsFunc(ru.dst, func(own destination) bool {
		return own.includes(&d.selector, false) && slices.ContainsFunc(ru.portsOf(&own), func(pp protoPorts) bool {
			return (pp.proto == proto || pp.proto == 0 && protoMatches(0, proto)) &&
				slices.ContainsFunc(pp.ports, func(x tailcfg.PortRange) bool { return x.First <= pr.First && pr.Last <= x.Last })
		})
	})
}

// includes reports whether the selector surely denotes everything that the
// other one does. As a source, * means only the tailnet's own addresses.
func (s *selector) includes(o *selector, source bool) bool {
	if s.kind == o.kind && s.s == o.s {
		return true
	}
	switch s.kind {
	case selDangerAll:
		return true
	case selAll:
		if source {
			return o.byUser() || o.kind == selTag || o.kind == selTagged
		}
		return o.kind != selInternet
	case selMember:
		return o.byUser()
	case selTagged:
		return o.kind == selTag
	case selPrefix:
		return o.kind == selPrefix && s.prefix.Bits() <= o.prefix.Bits() && s.prefix.Contains(o.prefix.Addr())
	}
	return false
}
