package acl

import (
	"cmp"
	"fmt"
	"slices"

	"tailscale.com/tailcfg"
)

// maxShadowRules bounds the search for shadowed rules, which compares pairs.
const maxShadowRules = 2000

// Warnings lists remarks about a valid policy in the order of the text: that
// everything is allowed, definitions that nothing uses, names that match
// nothing in the tailnet, and rules that an earlier rule makes superfluous.
func Warnings(p *Policy, t *Tailnet) []Warning {
	w := &warner{p: p, r: newResolver(t), said: map[string]bool{}}
	if !p.declared {
		w.say(p.root.StartOffset, "no acls or grants: every device reaches every device")
	}
	w.unused()
	w.unmatched()
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

// unmatched reports names in rules that denote nobody, each once.
func (w *warner) unmatched() {
	p := w.p
	for _, k := range sortedKeys(p.groups) {
		w.match(p.groups[k].members)
	}
	for _, ru := range p.rules {
		w.match(ru.src)
		for i := range ru.dst {
			w.match([]selector{ru.dst[i].selector})
		}
		for _, t := range ru.via {
			w.match([]selector{{text: t, kind: selTag, name: t.s}})
		}
	}
	for _, ru := range p.ssh {
		w.match(ru.src)
		w.match(ru.dst)
	}
	for _, a := range p.attrs {
		w.match(a.target)
	}
}

func (w *warner) match(list []selector) {
	for i := range list {
		s := &list[i]
		if w.said[s.s] {
			continue
		}
		what := ""
		switch s.kind {
		case selUser:
			if u, err := w.r.user(s.name); err == nil && u == nil {
				what = "no such user"
			}
		case selTag:
			if w.r.byTag[s.name] == nil {
				what = "no device has this tag"
			}
		case selGroup:
			if len(w.p.groups[s.name].members) == 0 {
				what = "the group is empty"
			}
		case selService:
			if w.r.svc[s.name] == nil {
				what = "no such service"
			}
		}
		if what != "" {
			w.said[s.s] = true
			w.say(s.at, "%q matches nothing: %s", s.s, what)
		}
	}
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
