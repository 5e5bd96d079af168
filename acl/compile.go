package acl

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"go4.org/netipx"
	"tailscale.com/tailcfg"
)

// expansion is something that a policy may multiply. The limits are far above
// what any sane policy needs and low enough to keep a hostile one from
// exhausting memory.
type expansion uint8

const (
	sourceAddresses expansion = iota // of all distinct sources
	ruleParts                        // destinations of rules, autogroup:self counting once per user
	filterRules                      // of all nodes
	filterPorts                      // of all nodes
	viewRoutes                       // of all distinct peer views
	sshRules                         // autogroup:self and localpart counting once per user
	sshPrincipals                    // of all distinct sources
	sshNodeRules                     // of all nodes
	expansions
)

var limits = [expansions]struct {
	max  int
	what string
}{
	sourceAddresses: {8 << 20, "source addresses"},
	ruleParts:       {1 << 20, "rules and destinations"},
	filterRules:     {8 << 20, "filter rules"},
	filterPorts:     {8 << 20, "filter destinations"},
	viewRoutes:      {8 << 20, "visible routes"},
	sshRules:        {1 << 18, "SSH rules"},
	sshPrincipals:   {4 << 20, "SSH principals"},
	sshNodeRules:    {8 << 20, "SSH rules of nodes"},
}

// Compile computes what the policy means for the tailnet. The error is of
// type [Errors].
func Compile(p *Policy, t *Tailnet) (*Access, error) {
	c := newCompiler(p, t)
	if errs := c.checkNames(p); len(errs) > 0 {
		return nil, errs
	}
	return c.compile()
}

// CompileStored is Compile for a policy that was accepted before, against the
// tailnet as it is now. Names that the tailnet has come to refute (a domain
// whose last person left, a name that two people have) denote nobody; they are
// reported as stale and close nothing else.
func CompileStored(p *Policy, t *Tailnet) (a *Access, stale Errors, err error) {
	c := newCompiler(p, t)
	stale = c.checkNames(p)
	a, err = c.compile()
	return a, stale, err
}

// compiler holds one compilation.
type compiler struct {
	*resolver
	p *Policy

	wild      map[string]netipx.IPRange // what * means in a source
	wildNodes []int32                   // see wildCover

	rank4, rank6 []int32  // by slot: place of the address in ranked
	ranked       []string // all node addresses, sorted as strings

	sources     []*source
	sourceIndex map[uint64][]*source

	flows []*flow
	merge map[mergeKey]*flow

	own   []set // by user; see ownSet
	spent [expansions]int
}

func newCompiler(p *Policy, t *Tailnet) *compiler {
	return &compiler{resolver: newResolver(t), p: p, sourceIndex: map[uint64][]*source{}}
}

// overflow is the panic with which spend leaves the compilation.
type overflow struct{ message string }

// spend accounts for an expansion before it is made.
func (c *compiler) spend(n int, on expansion) {
	if c.spent[on] += n; c.spent[on] > limits[on].max {
		panic(overflow{fmt.Sprintf("the policy expands to more than %d %s for this tailnet", limits[on].max, limits[on].what)})
	}
}

// program is what stays of a compilation for Check, Explain and Diff.
type program struct {
	*resolver
	p     *Policy
	flows []*flow
}

// flow is one compiled rule before it is reduced to single nodes: who may send
// where. Rules of equal source and protocol are merged into one flow, in which
// every part remembers its rule.
type flow struct {
	src   *source
	proto int // 0 is the default set
	parts []part
	caps  tailcfg.PeerCapMap // of a capability rule, which has no ports
	isCap bool
	// silent flows make peers visible and show routes but send no filter rule:
	// the hosted service does that for app grants with via.
	silent bool
	via    *via
}

// via restricts the delivery of a flow to the routers with one of some tags.
type via struct {
	tags  []string
	nodes set
	key   string
}

type mergeKey struct {
	src   int
	proto int
	via   string
}

type partKind uint8

const (
	partAll      partKind = iota // *
	partNodes                    // the nodes' own addresses
	partRange                    // literal addresses
	partInternet                 // autogroup:internet
)

// part is one destination of a flow.
type part struct {
	kind  partKind
	rule  *rule
	dst   int // index in rule.dst; -1 for a companion
	ports []tailcfg.PortRange
	nodes set
	rng   netipx.IPRange
	text  string // of rng
}

func (c *compiler) compile() (a *Access, err error) {
	defer func() {
		if r := recover(); r != nil {
			o, ok := r.(overflow)
			if !ok {
				panic(r)
			}
			a, err = nil, Errors{c.p.errorAt(0, o.message)}
		}
	}()
	c.rankAddresses()
	c.wild = make(map[string]netipx.IPRange, 3+len(c.subnets))
	for _, rng := range wildRanges {
		c.wild[rangeString(rng)] = rng
	}
	for i := range c.subnets {
		if sn := &c.subnets[i]; !sn.service {
			c.wild[prefixString(sn.prefix)] = netipx.RangeOfPrefix(sn.prefix)
		}
	}
	c.merge = map[mergeKey]*flow{}
	if !c.p.declared {
		c.rule(allowAll)
	}
	for _, ru := range c.p.rules {
		c.rule(ru)
	}

	a = &Access{prog: &program{resolver: c.resolver, p: c.p, flows: c.flows}}
	attrs := c.nodeAttrs()
	a.filters = c.filters()
	a.rows = c.rows()
	a.caps = attrs.caps
	r := c.elect()
	a.primaries = r.primaries
	a.self = c.selfViews(attrs, r)
	a.base = c.baseViews(attrs)
	a.views = c.peerViews(attrs, r, a.base)
	a.ssh = c.sshPolicies()
	a.approves, a.services = c.approvals()
	return a, nil
}

// allowAll is the meaning of a document without acls and grants.
var allowAll = &rule{
	kind:  kindImplied,
	src:   []selector{{kind: selAll, text: text{s: "*"}}},
	dst:   []destination{{selector: selector{kind: selAll, text: text{s: "*"}}}},
	ports: []protoPorts{{ports: []tailcfg.PortRange{tailcfg.PortRangeAny}}},
}

// rule compiles one rule. Ports come before capabilities. Where autogroup:self
// is among the destinations, the hosted service takes those that are no
// autogroups first and then the autogroups in their order.
func (c *compiler) rule(ru *rule) {
	src := c.collect(ru.src, ru.where)
	var v *via
	if len(ru.via) > 0 {
		v = c.via(ru)
	}
	var parts, plain []part
	self := false
	for i := range ru.dst {
		switch ru.dst[i].kind {
		case selSelf:
			self = true
			continue
		case selMember, selTagged, selRole, selInternet:
		default:
			plain = c.destination(plain, ru, i)
		}
		parts = c.destination(parts, ru, i)
	}
	from := c.source(src)
	if !self {
		c.ports(ru, from, parts, v)
		c.caps(ru, from, src.named, parts, v)
		return
	}
	owners := c.owners(src)
	c.ports(ru, from, plain, v)
	for i := range ru.dst {
		switch ru.dst[i].kind {
		case selSelf:
			for _, o := range owners {
				c.ports(ru, o.src, []part{o.part(ru, i)}, nil)
			}
		case selMember, selTagged, selRole, selInternet:
			c.ports(ru, from, c.destination(nil, ru, i), v)
		}
	}
	c.caps(ru, from, src.named, parts, v)
	for i := range ru.dst {
		if ru.dst[i].kind == selSelf {
			for _, o := range owners {
				c.caps(ru, o.src, true, []part{o.part(ru, i)}, nil)
			}
			break
		}
	}
}

// owner is a user as autogroup:self sees one: those of the user's devices that
// may send, and all of them.
type owner struct {
	src *source
	all set
}

func (o *owner) part(ru *rule, dst int) part {
	return part{kind: partNodes, rule: ru, dst: dst, ports: ru.dst[dst].ports, nodes: o.all}
}

// owners lists the users with devices among the sources.
func (c *compiler) owners(src *sourceSet) []*owner {
	from := src.nodes
	if src.wild {
		from = c.untagged
	}
	var out []*owner
	for i := range c.t.Users {
		own := c.byUser[c.t.Users[i].ID]
		var senders []int32
		for _, slot := range own {
			if from.has(int(slot)) {
				senders = append(senders, slot)
			}
		}
		if len(senders) == 0 {
			continue
		}
		out = append(out, &owner{src: c.intern(senders, nil, false, false), all: c.ownSet(i)})
	}
	return out
}

// ownSet is the set of a user's untagged devices.
func (c *compiler) ownSet(user int) set {
	if c.own == nil {
		c.own = make([]set, len(c.t.Users))
	}
	if c.own[user] == nil {
		c.own[user] = newSet(c.n)
		c.addUser(c.own[user], &c.t.Users[user])
	}
	return c.own[user]
}

func (c *compiler) via(ru *rule) *via {
	v := &via{nodes: newSet(c.n)}
	for _, t := range ru.via {
		v.tags = append(v.tags, t.s)
		if b := c.byTag[t.s]; b != nil {
			v.nodes.or(b)
		}
	}
	v.key = strings.Join(v.tags, " ")
	return v
}

// destination appends the parts of one dst entry.
func (c *compiler) destination(parts []part, ru *rule, i int) []part {
	d := &ru.dst[i]
	base := part{rule: ru, dst: i, ports: d.ports}
	switch d.kind {
	case selAll:
		base.kind = partAll
		return append(parts, base)
	case selInternet:
		base.kind = partInternet
		return append(parts, base)
	}
	if nodes := c.nodes(c.p, &d.selector); nodes != nil {
		base.kind, base.nodes = partNodes, nodes
		return append(parts, base)
	}
	base.kind = partRange
	for _, rng := range d.ranges(c.svc) {
		base.rng, base.text = rng, rangeString(rng)
		parts = append(parts, base)
	}
	return parts
}

// ports adds what the rule allows from one source to some destinations. A rule
// that nobody may use, or whose destinations are nobody, is none: it does not
// even keep a place for later rules to merge into.
func (c *compiler) ports(ru *rule, src *source, parts []part, v *via) {
	somebody := func(pt part) bool { return pt.kind != partNodes || !pt.nodes.empty() }
	if src.empty() || !slices.ContainsFunc(parts, somebody) {
		return
	}
	if ru.kind == kindACL {
		c.addPorts(src, ru.proto, parts, v)
		return
	}
	for _, pp := range ru.ports {
		withPorts := make([]part, len(parts))
		for i, pt := range parts {
			pt.ports = pp.ports
			withPorts[i] = pt
		}
		c.addPorts(src, pp.proto, withPorts, v)
	}
}

// caps adds what the rule grants to applications. A source list that denotes
// nobody still makes a rule; an empty one does not.
func (c *compiler) caps(ru *rule, src *source, named bool, parts []part, v *via) {
	if len(ru.apps) > 0 && named && len(parts) > 0 {
		c.addCaps(ru, src, parts, v)
	}
}

func (c *compiler) addPorts(src *source, proto int, parts []part, v *via) {
	key := mergeKey{src: src.id, proto: proto}
	if v != nil {
		key.via = v.key
	}
	f := c.merge[key]
	if f == nil {
		f = &flow{src: src, proto: proto, via: v}
		c.merge[key] = f
		c.addFlow(f)
	}
	c.spend(len(parts), ruleParts)
	f.parts = append(f.parts, parts...)
}

func (c *compiler) addFlow(f *flow) {
	c.spend(1, ruleParts)
	c.flows = append(c.flows, f)
}

// companions are the capabilities that come back to the sources of a grant.
var companions = []struct{ granted, returned tailcfg.PeerCapability }{
	{tailcfg.PeerCapabilityTaildrive, tailcfg.PeerCapabilityTaildriveSharer},
	{tailcfg.PeerCapabilityRelay, tailcfg.PeerCapabilityRelayTarget},
	{tailcfg.PeerCapabilityFileSharingSend, tailcfg.PeerCapabilityFileSharingTarget},
}

func (c *compiler) addCaps(ru *rule, src *source, parts []part, v *via) {
	caps := make(tailcfg.PeerCapMap, len(ru.apps))
	for _, app := range ru.apps {
		caps[app.name] = app.values
		if app.name == CapTaildrop {
			caps[tailcfg.PeerCapabilityFileSharingSend] = nil
		}
	}
	c.addFlow(&flow{src: src, parts: parts, caps: caps, isCap: true, silent: v != nil, via: v})
	if v != nil {
		return
	}
	for _, comp := range companions {
		if _, ok := caps[comp.granted]; ok {
			c.addFlow(&flow{
				src: c.partsSource(parts), parts: c.sourceParts(ru, src), isCap: true,
				caps: tailcfg.PeerCapMap{comp.returned: nil},
			})
		}
	}
}

// partsSource turns destinations into a source.
func (c *compiler) partsSource(parts []part) *source {
	ss := &sourceSet{nodes: newSet(c.n), extra: map[string]netipx.IPRange{}}
	for i := range parts {
		switch pt := &parts[i]; pt.kind {
		case partAll:
			ss.wild = true
		case partNodes:
			ss.nodes.or(pt.nodes)
		case partRange:
			ss.extra[pt.text] = pt.rng
		}
	}
	return c.source(ss)
}

// sourceParts turns a source into destinations. What * adds to a source beyond
// the tailnet's own ranges, the routes, is no destination of a companion, but
// a range that the rule names beside * is.
func (c *compiler) sourceParts(ru *rule, src *source) []part {
	var parts []part
	if len(src.nodes) > 0 {
		nodes := newSet(c.n)
		for _, slot := range src.nodes {
			nodes.add(int(slot))
		}
		parts = append(parts, part{kind: partNodes, rule: ru, dst: -1, nodes: nodes})
	}
	wild := src.any
	var named []netipx.IPRange
	for i := range ru.src {
		s := &ru.src[i]
		wild = wild || s.kind == selAll && len(ru.where) == 0
		named = append(named, s.ranges(c.svc)...)
	}
	ranges := src.ranges
	if wild {
		parts = append(parts, part{kind: partAll, rule: ru, dst: -1})
		ranges = named
	}
	for _, rng := range ranges {
		parts = append(parts, part{kind: partRange, rule: ru, dst: -1, rng: rng, text: rangeString(rng)})
	}
	return parts
}

// prefixes splits a range for CapGrant.Dsts, which knows only CIDRs.
func (pt *part) prefixes() []netip.Prefix { return pt.rng.Prefixes() }
