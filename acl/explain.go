package acl

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"tailscale.com/tailcfg"
	"tailscale.com/types/ipproto"
)

// Query asks whether one endpoint may open a connection to another.
type Query struct {
	From, To Endpoint
	Proto    int // IP protocol number; 0 is TCP
	Port     uint16
}

// Verdict answers a Query and says why. It equals what the receiving client's
// packet filter does.
type Verdict struct {
	Query
	Allowed bool
	Reason  string // one sentence

	Receiver int          // slot of the node whose filter decides; -1 when the packet has no way
	Route    netip.Prefix // the route over the receiver; invalid when it has the address itself
	Via      bool         // a grant with via chose the receiver

	Rules []RuleUse  // those that allow it, in the order of the text
	Near  []NearMiss // when denied: the rules that come closest
	SSH   []RuleUse  // the SSH rules of the receiver for this source
}

// RuleUse is a rule that applies and how its selectors got there.
type RuleUse struct {
	Line     int      `json:"line"`
	Column   int      `json:"column"`
	Path     string   `json:"path"`
	Text     string   `json:"text"`
	Src      []string `json:"src,omitempty"`      // selectors that contain the source
	SrcMeans []string `json:"srcMeans,omitempty"` // for each of Src what in it does: a member, a range; "" when the name says it
	Dst      string   `json:"dst,omitempty"`      // selector that contains the destination
	DstMeans string   `json:"dstMeans,omitempty"` // as SrcMeans
	Ports    string   `json:"ports,omitempty"`
	Via      []string `json:"via,omitempty"`
	Postures []string `json:"postures,omitempty"` // those of the rule that hold
	Users    []string `json:"users,omitempty"`    // of an SSH rule: the login names
	Check    bool     `json:"check,omitempty"`    // of an SSH rule
}

// NearMiss is a rule that would apply if not for some of its parts.
type NearMiss struct {
	RuleUse
	Fails []string `json:"fails"` // what does not fit, in words

	distance int // another destination is farther off than another source or port
}

// maxNear bounds the near misses of a verdict.
const maxNear = 3

// Explain answers q.
func (a *Access) Explain(q Query) *Verdict {
	if q.Proto == 0 {
		q.Proto = int(ipproto.TCP)
	}
	q.Proto = icmpFor(q.To.Addr, q.Proto)
	g := a.prog
	v := &Verdict{Query: q, Receiver: -1}
	defer func() {
		if !v.Allowed {
			v.Near = g.nearMisses(q, v.Receiver)
		}
	}()
	if q.From.Addr.Is4() != q.To.Addr.Is4() {
		v.Reason = fmt.Sprintf("%v and %v are of different address families", q.From.Addr, q.To.Addr)
		return v
	}
	paths := a.paths(q.From, q.To.Addr)
	p := paths[0]
	if p.receiver < 0 {
		v.Reason = p.missing
		return v
	}
	decisions := g.decide(q.From, q.To, p.receiver, q.Proto, q.Port)
	for _, other := range paths[1:] {
		if len(decisions) == 0 {
			if found := g.decide(q.From, q.To, other.receiver, q.Proto, q.Port); len(found) > 0 {
				p, decisions = other, found
			}
		}
	}
	v.Receiver, v.Route = p.receiver, p.route
	for _, d := range decisions {
		v.Via = v.Via || d.flow.via != nil
		v.Rules = append(v.Rules, g.ruleUse(q, d))
	}
	slices.SortStableFunc(v.Rules, func(a, b RuleUse) int { return a.Line - b.Line })
	v.Allowed = len(v.Rules) > 0
	v.SSH = a.sshUses(q.From, p.receiver)
	switch {
	case v.Allowed && p.route.IsValid():
		v.Reason = fmt.Sprintf("allowed by line %d, over the route %v of %s", v.Rules[0].Line, p.route, g.name(p.receiver))
	case v.Allowed:
		v.Reason = fmt.Sprintf("allowed by line %d", v.Rules[0].Line)
	case p.route.IsValid():
		v.Reason = fmt.Sprintf("no rule lets %v through %s, which routes %v", q.From.Addr, g.name(p.receiver), p.route)
	default:
		v.Reason = "no rule allows it"
	}
	return v
}

func (g *program) name(slot int) string {
	if h := g.t.Nodes[slot].Hostname; h != "" {
		return h
	}
	return fmt.Sprint("node ", g.t.Nodes[slot].ID)
}

// impliedText is shown for the rule of a policy without acls and grants.
const impliedText = "no acls or grants: every device reaches every device"

func (g *program) ruleUse(q Query, d decision) RuleUse {
	ru := d.part.rule
	u := g.use(ru)
	u.Src, u.SrcMeans = g.matching(ru, q.From)
	u.Ports = portsText(d.flow.proto, d.part.ports)
	if d.part.dst >= 0 {
		s := &ru.dst[d.part.dst].selector
		u.Dst, u.DstMeans = s.s, g.means(s, q.To)
	}
	if len(ru.where) > 0 {
		u.Postures, _ = g.postures(ru, q.From)
	}
	return u
}

// use fills in what a rule says about itself.
func (g *program) use(ru *rule) RuleUse {
	if ru.kind == kindImplied {
		return RuleUse{Line: g.p.lineOf(g.p.root.StartOffset), Column: 1, Text: impliedText}
	}
	e := g.p.errorAt(ru.at, "")
	u := RuleUse{Line: e.Line, Column: e.Column, Path: e.Path, Text: oneLine(g.p.src[ru.at:ru.end])}
	for _, t := range ru.via {
		u.Via = append(u.Via, t.s)
	}
	return u
}

// oneLine joins the lines of a rule.
func oneLine(b []byte) string { return strings.Join(strings.Fields(string(b)), " ") }

// matching lists the src selectors that contain the endpoint, and what in them
// does.
func (g *program) matching(ru *rule, from Endpoint) (names, means []string) {
	for i := range ru.src {
		if s := &ru.src[i]; g.inSelector(s, from, true) {
			names, means = append(names, s.s), append(means, g.means(s, from))
		}
	}
	return names, means
}

// means is what in the selector contains the endpoint: the member of a group,
// the person or tags of an autogroup, the addresses of a host or set. It is
// empty where the selector says it itself.
func (g *program) means(s *selector, e Endpoint) string {
	switch s.kind {
	case selGroup, selUserDomain, selRole, selMember, selSelf, selTagged:
		if e.Slot < 0 {
			return ""
		}
		n := &g.t.Nodes[e.Slot]
		u := g.userOf(n)
		if u == nil {
			return strings.Join(n.Tags, ", ")
		}
		if s.kind == selGroup {
			for i := range g.p.groups[s.name].members {
				if m := &g.p.groups[s.name].members[i]; g.isUser(g.p, m, u) {
					return m.s
				}
			}
		}
		return u.LoginName()
	case selPrefix, selIPSet, selService:
		for _, rng := range s.ranges(g.svc) {
			if text := rangeString(rng); rng.Contains(e.Addr) && text != s.s {
				return text
			}
		}
	}
	return ""
}

// inSelector reports whether the endpoint is among what the selector denotes.
// It resolves afresh, because the resolver's caches are not for concurrent use.
func (g *program) inSelector(s *selector, e Endpoint, source bool) bool {
	switch s.kind {
	case selDangerAll:
		return true
	case selAll:
		if !source {
			return true
		}
		for _, r := range wildRanges {
			if r.Contains(e.Addr) {
				return true
			}
		}
		return slices.ContainsFunc(g.subnets, func(sn subnet) bool { return sn.prefix.Contains(e.Addr) })
	case selInternet:
		return internetSet.Contains(e.Addr)
	}
	for _, r := range s.ranges(g.svc) {
		if r.Contains(e.Addr) {
			return true
		}
	}
	if e.Slot < 0 {
		return false
	}
	n := &g.t.Nodes[e.Slot]
	switch s.kind {
	case selTag:
		return slices.Contains(n.Tags, s.name)
	case selTagged:
		return n.Tagged()
	case selMember, selSelf:
		return !n.Tagged()
	case selUser, selUserDomain, selGroup, selRole:
		u := g.userOf(n)
		return u != nil && g.isUser(g.p, s, u)
	}
	return false
}

func (g *program) userOf(n *Node) *User {
	if n.Tagged() {
		return nil
	}
	for i := range g.t.Users {
		if g.t.Users[i].ID == n.User {
			return &g.t.Users[i]
		}
	}
	return nil
}

func portsText(proto int, ports []tailcfg.PortRange) string {
	list := make([]string, len(ports))
	for i, pr := range ports {
		list[i] = portString(pr)
	}
	text := strings.Join(list, ",")
	if proto != 0 {
		return protoName(proto) + ":" + text
	}
	return text
}

// nearMisses ranks the rules by how few of their parts do not fit.
func (g *program) nearMisses(q Query, receiver int) []NearMiss {
	var out []NearMiss
	for _, ru := range g.p.rules {
		if ru.kind == kindGrant && len(ru.ports) == 0 {
			continue
		}
		if m := g.misses(q, ru, receiver); m.distance > 0 && m.distance <= 2 {
			out = append(out, m)
		}
	}
	slices.SortStableFunc(out, func(a, b NearMiss) int { return a.distance - b.distance })
	return out[:min(len(out), maxNear)]
}

func (g *program) misses(q Query, ru *rule, receiver int) NearMiss {
	m := NearMiss{RuleUse: g.use(ru)}
	fail := func(format string, args ...any) {
		m.distance++
		m.Fails = append(m.Fails, fmt.Sprintf(format, args...))
	}

	m.Src, m.SrcMeans = g.matching(ru, q.From)
	if len(m.Src) == 0 {
		fail("the source %s is not in src %s", g.endpointText(q.From), selectorTexts(ru.src))
	} else if len(ru.where) > 0 {
		held, why := g.postures(ru, q.From)
		if m.Postures = held; len(held) == 0 {
			fail("%s", why)
		}
	}
	var dsts []*destination
	for i := range ru.dst {
		if d := &ru.dst[i]; g.inSelector(&d.selector, q.To, false) {
			if d.kind == selSelf && !g.sameUser(q.From, q.To) {
				continue
			}
			dsts = append(dsts, d)
		}
	}
	if len(dsts) == 0 {
		fail("the destination %s is not in dst", g.endpointText(q.To))
		m.distance++
		return m
	}
	m.Dst, m.DstMeans = dsts[0].s, g.means(&dsts[0].selector, q.To)
	ports, open := openPorts(ru, dsts, q)
	if m.Ports = ports; !open {
		fail("%s is not among the ports %s", flowText(q), ports)
	}
	if len(ru.via) > 0 && receiver >= 0 && !slices.ContainsFunc(ru.via, func(t text) bool {
		return slices.Contains(g.t.Nodes[receiver].Tags, t.s)
	}) {
		fail("the rule goes via %s, and %s is none of these", strings.Join(m.Via, ", "), g.name(receiver))
	}
	if len(m.Fails) == 0 {
		fail("the rule is not delivered: no node that it names receives these packets")
	}
	return m
}

func flowText(q Query) string {
	switch ipproto.Proto(q.Proto) {
	case ipproto.TCP, ipproto.UDP, ipproto.SCTP:
		return fmt.Sprintf("%s port %d", protoName(q.Proto), q.Port)
	}
	return protoName(q.Proto)
}

// openPorts renders what the rule opens on the destinations and says whether
// the query is among it.
func openPorts(ru *rule, dsts []*destination, q Query) (string, bool) {
	var texts []string
	ok := false
	for _, d := range dsts {
		for _, pp := range ru.portsOf(d) {
			texts = append(texts, portsText(pp.proto, pp.ports))
			ok = ok || portMatch(&flow{proto: pp.proto}, &part{ports: pp.ports}, q.Proto, q.Port)
		}
	}
	return strings.Join(texts, " "), ok
}

func (g *program) sameUser(a, b Endpoint) bool {
	if a.Slot < 0 || b.Slot < 0 {
		return false
	}
	x, y := &g.t.Nodes[a.Slot], &g.t.Nodes[b.Slot]
	return !x.Tagged() && !y.Tagged() && x.User == y.User
}

// postures lists those of the rule's postures that the source satisfies; with
// none it says what is wrong.
func (g *program) postures(ru *rule, from Endpoint) (held []string, why string) {
	if from.Slot < 0 {
		return nil, "only a device can satisfy a posture"
	}
	n := &g.t.Nodes[from.Slot]
	var reasons []string
	for _, ps := range ru.where {
		ok, c := ps.holds(n.attribute)
		if ok {
			held = append(held, ps.name.s)
			continue
		}
		got := "not set"
		if v, set := n.attribute(c.attr); set {
			got = fmt.Sprintf("%#v", v)
		}
		reasons = append(reasons, fmt.Sprintf("%s needs %s, and %s is %s", ps.name.s, c.s, c.attr, got))
	}
	return held, strings.Join(reasons, "; ")
}

func (g *program) endpointText(e Endpoint) string {
	if e.Slot < 0 {
		return e.Addr.String()
	}
	n := &g.t.Nodes[e.Slot]
	who := strings.Join(n.Tags, ", ")
	if u := g.userOf(n); u != nil {
		who = u.LoginName()
	}
	return fmt.Sprintf("%s (%v, %s)", g.name(e.Slot), e.Addr, who)
}

func selectorTexts(list []selector) string {
	out := make([]string, len(list))
	for i := range list {
		out[i] = list[i].s
	}
	return "[" + strings.Join(out, ", ") + "]"
}

// sshUses lists the receiver's SSH rules that know the source.
func (a *Access) sshUses(from Endpoint, receiver int) []RuleUse {
	g := a.prog
	var out []RuleUse
	for i := range a.ssh[receiver].Rules {
		r := &a.ssh[receiver].Rules[i]
		if !slices.ContainsFunc(r.Principals, func(p *tailcfg.SSHPrincipal) bool { return p.NodeIP == from.Addr.String() }) {
			continue
		}
		u := RuleUse{Line: r.Line, Column: 1, Check: r.Check}
		for _, ru := range g.p.ssh {
			if g.p.lineOf(ru.at) == r.Line {
				e := g.p.errorAt(ru.at, "")
				u.Column, u.Path, u.Text = e.Column, e.Path, oneLine(g.p.src[ru.at:ru.end])
				break
			}
		}
		for _, name := range sortedKeys(r.SSHUsers) {
			if r.SSHUsers[name] != "" {
				u.Users = append(u.Users, name)
			}
		}
		if len(u.Users) > 0 {
			out = append(out, u)
		}
	}
	return out
}
