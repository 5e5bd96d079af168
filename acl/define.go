package acl

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/tailscale/hujson"
	"go4.org/netipx"
	"tailscale.com/tailcfg"
)

// groups reads in reverse name order, because the hosted service reports the
// last group by name first.
func (r *reader) groups(v *hujson.Value) {
	type entry struct {
		g *group
		v *hujson.Value
	}
	var entries []entry
	r.table(v, func(name text, v *hujson.Value) {
		if !strings.HasPrefix(name.s, "group:") || name.s == "group:" {
			r.fail(name.at, `groups[%q]: group names must start with "group:"`, name.s)
			return
		}
		g := &group{name: name}
		r.p.groups[name.s] = g
		entries = append(entries, entry{g, v})
	})
	slices.SortFunc(entries, func(a, b entry) int { return strings.Compare(b.g.name.s, a.g.name.s) })
	for _, e := range entries {
		for _, t := range r.texts(e.v) {
			switch {
			case strings.HasPrefix(t.s, "group:"):
				r.fail(t.at, "groups[%q]: %q: group members cannot be recursive", e.g.name.s, t.s)
			case !isUserName(t.s):
				r.fail(t.at, "groups[%q]: %q: group members must be users", e.g.name.s, t.s)
			default:
				e.g.members = append(e.g.members, selector{text: t, kind: selUser, name: fold(t.s)})
			}
		}
	}
}

// isUserName reports whether s can only mean a person: an e-mail address or
// "name@".
func isUserName(s string) bool {
	at := strings.IndexByte(s, '@')
	return at > 0 && !strings.ContainsAny(s, ":*/ \t")
}

func (r *reader) hosts(v *hujson.Value) {
	r.table(v, func(name text, v *hujson.Value) {
		t, ok := r.text(v)
		if !ok {
			return
		}
		if name.s == "" || name.s == "*" || strings.ContainsAny(name.s, ":@/, ") {
			r.fail(name.at, "hosts[%q]: invalid host name", name.s)
			return
		}
		prefix, single, ok := parsePrefix(t.s)
		if !ok {
			r.fail(t.at, "hosts[%q]: %q: invalid address", name.s, t.s)
			return
		}
		r.p.hosts[name.s] = &host{name: name, prefix: prefix, single: single}
	})
}

func (r *reader) tagOwners(v *hujson.Value) {
	owners := map[*tagOwner]*hujson.Value{}
	var order []*tagOwner
	r.table(v, func(name text, v *hujson.Value) {
		if err := checkTag(name.s); err != nil {
			r.fail(name.at, "tagOwners[%q]: %v", name.s, err)
			return
		}
		o := &tagOwner{name: name}
		r.p.tagOwners[name.s] = o
		owners[o], order = v, append(order, o)
	})
	for _, o := range order {
		o.owners = r.owners(owners[o], fmt.Sprintf("tagOwners[%q]: ", o.name.s))
	}
}

func checkTag(tag string) error {
	if !strings.HasPrefix(tag, "tag:") {
		return fmt.Errorf(`tag names must start with "tag:"`)
	}
	return tailcfg.CheckTag(tag)
}

// owners reads a list of who may decide something: users, groups, tags and
// autogroups of nodes.
func (r *reader) owners(v *hujson.Value, where string) []selector {
	var out []selector
	for _, t := range r.texts(v) {
		s, err := r.selector(t)
		switch {
		case err != nil:
			r.fail(t.at, "%s%v", where, err)
		case s.byUser() || s.kind == selTag || s.kind == selTagged:
			out = append(out, s)
		default:
			r.fail(t.at, "%s%q: must be a user, group, tag or autogroup", where, t.s)
		}
	}
	return out
}

// The public Internet: what autogroup:internet means in a destination.
var internetRanges = []string{
	"0.0.0.0-9.255.255.255",
	"11.0.0.0-100.63.255.255",
	"100.128.0.0-169.253.255.255",
	"169.255.0.0-172.15.255.255",
	"172.32.0.0-192.167.255.255",
	"192.169.0.0-255.255.255.255",
	"2000::-3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
}

var internetSet = func() *netipx.IPSet {
	var b netipx.IPSetBuilder
	for _, s := range internetRanges {
		b.AddRange(netipx.MustParseIPRange(s))
	}
	s, err := b.IPSet()
	if err != nil {
		panic(err)
	}
	return s
}()

func (r *reader) ipsets(v *hujson.Value) {
	r.table(v, func(name text, v *hujson.Value) {
		if !strings.HasPrefix(name.s, "ipset:") || name.s == "ipset:" {
			r.fail(name.at, `ipsets[%q]: ipset names must start with "ipset:"`, name.s)
			return
		}
		s := &ipset{name: name}
		r.p.ipsets[name.s] = s
		for _, t := range r.texts(v) {
			op := ipsetOp{member: t}
			verb, rest, spaced := strings.Cut(t.s, " ")
			switch {
			case spaced && verb == "add":
				op.member.s = strings.TrimSpace(rest)
			case spaced && verb == "remove":
				op.remove, op.member.s = true, strings.TrimSpace(rest)
			case spaced:
				r.fail(t.at, `ipsets[%q]: %q: expected "add" or "remove"`, name.s, t.s)
				continue
			}
			s.ops = append(s.ops, op)
		}
	})
	for _, name := range sortedKeys(r.p.ipsets) {
		r.resolveIPSet(r.p.ipsets[name], 0)
	}
}

// maxIPSetRanges bounds one resolved set: sets that include each other could
// otherwise multiply.
const maxIPSetRanges = 10_000

// resolveIPSet applies the operations in order.
func (r *reader) resolveIPSet(s *ipset, depth int) {
	if s.set != nil || s.bad {
		return
	}
	s.busy = true
	defer func() { s.busy = false }()
	var b netipx.IPSetBuilder
	for _, op := range s.ops {
		m, err := r.ipsetMember(s, op.member, depth)
		if err != nil {
			s.bad = true
			r.fail(op.member.at, "ipsets[%q]: %v", s.name.s, err)
			continue
		}
		if op.remove {
			b.RemoveSet(m)
		} else {
			b.AddSet(m)
		}
	}
	set, err := b.IPSet()
	if err != nil {
		s.bad = true
		r.fail(s.name.at, "ipsets[%q]: %v", s.name.s, err)
	}
	if set != nil && len(set.Ranges()) > maxIPSetRanges {
		s.bad = true
		r.fail(s.name.at, "ipsets[%q]: resolves to more than %d ranges", s.name.s, maxIPSetRanges)
	}
	s.set = set
}

func (r *reader) ipsetMember(s *ipset, t text, depth int) (*netipx.IPSet, error) {
	name := strings.TrimPrefix(t.s, "host:")
	r.use(name)
	if strings.HasPrefix(name, "ipset:") {
		o := r.p.ipsets[name]
		switch {
		case o == nil:
			return nil, fmt.Errorf("ipset not found: %q", name)
		case o.busy || depth > maxDepth:
			return nil, fmt.Errorf("%q: ipsets cannot contain themselves", name)
		}
		r.resolveIPSet(o, depth+1)
		if o.bad {
			return nil, fmt.Errorf("%q is invalid", name)
		}
		return o.set, nil
	}
	if name == "autogroup:internet" {
		return internetSet, nil
	}
	var b netipx.IPSetBuilder
	if h := r.p.hosts[name]; h != nil {
		b.AddPrefix(h.prefix)
	} else if p, _, ok := parsePrefix(name); ok {
		b.AddPrefix(p)
	} else if rng, err := netipx.ParseIPRange(name); err == nil {
		b.AddRange(rng)
	} else {
		return nil, fmt.Errorf("%q: must be an address, CIDR, range, host, ipset or autogroup:internet", t.s)
	}
	return b.IPSet()
}

// setStrings renders an address set as filters and people write it: addresses,
// CIDRs, and ranges for what is neither.
func setStrings(s *netipx.IPSet) []string {
	var out []string
	for _, rng := range s.Ranges() {
		out = append(out, rangeString(rng))
	}
	return out
}

func rangeString(rng netipx.IPRange) string {
	if p, ok := rng.Prefix(); ok {
		return prefixString(p)
	}
	return rng.String()
}

// prefixString writes single addresses without their length.
func prefixString(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}
