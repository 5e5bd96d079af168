package acl

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"

	"tailscale.com/tailcfg"
)

const (
	attrDisableIPv4  = "disable-ipv4"
	capFunnelDefault = tailcfg.CapabilityFunnelPorts + "?ports=443,8443,10000"
)

// attributes are what nodeAttrs, roles and settings say about each node.
type attributes struct {
	caps   []*Caps
	noIPv4 set // nodes that use no IPv4
}

// nodeAttrs gives each node its own capabilities. Nodes that match the same
// entries share one map.
func (c *compiler) nodeAttrs() *attributes {
	a := &attributes{caps: make([]*Caps, c.n), noIPv4: newSet(c.n)}
	targets := make([]set, len(c.p.attrs))
	for i, e := range c.p.attrs {
		targets[i] = c.targetNodes(e.target)
	}
	roles := make(map[tailcfg.UserID]string, len(c.t.Users))
	for i := range c.t.Users {
		roles[c.t.Users[i].ID] = c.t.Users[i].Role
	}
	b := &capsBuilder{c: c, services: c.hosted(), index: map[uint64][]capsEntry{}, content: map[uint64][]*Caps{}}
	for slot := range c.n {
		if !c.live.has(slot) {
			a.caps[slot] = b.intern(tailcfg.NodeCapMap{})
			continue
		}
		n := &c.t.Nodes[slot]
		e := capsEntry{service: b.services[slot], mac: n.operatingSystem() == "macOS"}
		for i, s := range targets {
			if s.has(slot) {
				e.match = append(e.match, i)
			}
		}
		if !n.Tagged() {
			e.role = roles[n.User]
		}
		a.caps[slot] = b.caps(e)
		if _, ok := a.caps[slot].Map[attrDisableIPv4]; ok {
			a.noIPv4.add(slot)
		}
	}
	return a
}

// capsEntry is everything that a node's capabilities depend on.
type capsEntry struct {
	match   []int // nodeAttrs entries
	role    string
	service string
	mac     bool
	caps    *Caps
}

type capsBuilder struct {
	c        *compiler
	services map[int]string
	index    map[uint64][]capsEntry
	content  map[uint64][]*Caps
}

func (b *capsBuilder) caps(e capsEntry) *Caps {
	h := newHash()
	for _, i := range e.match {
		h.word(uint64(i))
	}
	h.text(e.role)
	h.text(e.service)
	if e.mac {
		h.word(1)
	}
	for _, o := range b.index[h.sum()] {
		if o.role == e.role && o.service == e.service && o.mac == e.mac && slices.Equal(o.match, e.match) {
			return o.caps
		}
	}
	e.caps = b.intern(b.c.capMap(e))
	b.index[h.sum()] = append(b.index[h.sum()], e)
	return e.caps
}

func (b *capsBuilder) intern(m tailcfg.NodeCapMap) *Caps {
	n := &Caps{Map: m, hash: hashCaps(m)}
	for _, o := range b.content[n.hash] {
		if o.Equal(n) {
			return o
		}
	}
	b.content[n.hash] = append(b.content[n.hash], n)
	return n
}

func (c *compiler) capMap(e capsEntry) tailcfg.NodeCapMap {
	m := tailcfg.NodeCapMap{}
	for _, i := range e.match {
		c.addAttrs(m, c.p.attrs[i])
	}
	if c.p.randomizePort {
		m[tailcfg.NodeAttrRandomizeClientPort] = nil
	}
	if c.p.disableIPv4 {
		m[attrDisableIPv4] = nil
	}
	if e.role == "owner" || e.role == "admin" {
		m[tailcfg.CapabilityAdmin] = nil
	}
	if e.role == "owner" {
		m[tailcfg.CapabilityOwner] = nil
	}
	switch {
	case e.mac && c.p.oneCGNAT == "mac-always":
		m[tailcfg.NodeAttrOneCGNATEnable] = nil
	case e.mac && c.p.oneCGNAT == "mac-never":
		m[tailcfg.NodeAttrOneCGNATDisable] = nil
	}
	if e.service != "" {
		m[tailcfg.NodeAttrServiceHost] = []tailcfg.RawMessage{tailcfg.RawMessage(e.service)}
	}
	update := tailcfg.RawMessage("false")
	if c.t.AutoUpdates {
		update = "true"
	}
	m[tailcfg.NodeAttrDefaultAutoUpdate] = []tailcfg.RawMessage{update}
	return m
}

func (n *Node) operatingSystem() string {
	if n.OS != "" {
		return n.OS
	}
	os, _ := n.Posture["node:os"].(string)
	return os
}

func (c *compiler) addAttrs(m tailcfg.NodeCapMap, e *nodeAttr) {
	for _, attr := range e.attrs {
		if _, ok := m[tailcfg.NodeCapability(attr)]; !ok {
			m[tailcfg.NodeCapability(attr)] = nil
		}
		if attr == string(tailcfg.NodeAttrFunnel) {
			m[capFunnelDefault] = nil
			if !c.t.HTTPS {
				m[tailcfg.CapabilityWarnFunnelNoHTTPS] = nil
			}
		}
	}
	for _, name := range e.apps {
		have := m[tailcfg.NodeCapability(name)]
		for _, v := range e.app[name] {
			if !slices.Contains(have, v) {
				have = append(slices.Clip(have), v)
			}
		}
		m[tailcfg.NodeCapability(name)] = have
	}
}

// targetNodes is the set of nodes that a target or approver list denotes.
func (c *compiler) targetNodes(list []selector) set {
	out := newSet(c.n)
	for i := range list {
		s := &list[i]
		if nodes := c.nodes(c.p, s); nodes != nil {
			out.or(nodes)
			continue
		}
		for _, rng := range s.ranges(c.svc) {
			c.within(rng, out.add)
		}
	}
	return out
}

// hosted renders for each host of services the value of its service-host
// capability.
func (c *compiler) hosted() map[int]string {
	byHost := map[int]map[string][]netip.Addr{}
	for i := range c.t.Services {
		s := &c.t.Services[i]
		for _, id := range s.Hosts {
			if slot, ok := c.slotByID(id); ok {
				if byHost[slot] == nil {
					byHost[slot] = map[string][]netip.Addr{}
				}
				byHost[slot][s.Name] = s.addrs()
			}
		}
	}
	out := make(map[int]string, len(byHost))
	for slot, m := range byHost {
		b, err := json.Marshal(m)
		if err == nil {
			out[slot] = string(b)
		}
	}
	return out
}

func hashCaps(m tailcfg.NodeCapMap) uint64 {
	h := newHash()
	for _, name := range sortedKeys(m) {
		h.text(string(name))
		for _, v := range m[name] {
			h.text(string(v))
		}
	}
	return h.sum()
}

// approvals lists for each node the advertised routes and the services that
// need no approval by hand. An exit route is approved only by exitNode; a
// subnet route by an entry for it or for a prefix around it.
func (c *compiler) approvals() ([][]netip.Prefix, [][]string) {
	type entry struct {
		prefix netip.Prefix
		nodes  set
	}
	entries := make([]entry, len(c.p.approveRoutes))
	for i, a := range c.p.approveRoutes {
		entries[i] = entry{a.prefix, c.targetNodes(a.by)}
	}
	exit := c.targetNodes(c.p.approveExit)
	routes := make([][]netip.Prefix, c.n)
	for slot := range c.live.all {
		for _, p := range c.t.Nodes[slot].RoutableIPs {
			ok := false
			if p.Bits() == 0 {
				ok = exit.has(slot)
			} else {
				ok = slices.ContainsFunc(entries, func(e entry) bool {
					return e.prefix.Bits() <= p.Bits() && e.prefix.Contains(p.Addr()) && e.nodes.has(slot)
				})
			}
			if ok {
				routes[slot] = append(routes[slot], p)
			}
		}
	}
	services := make([][]string, c.n)
	for _, a := range c.p.approveSvc {
		for slot := range c.targetNodes(a.by).all {
			services[slot] = append(services[slot], a.name.s)
		}
	}
	for slot := range services {
		slices.Sort(services[slot])
	}
	return routes, services
}

// IPPools are the address ranges from which the policy wants new addresses of
// such a node to be taken, none when it does not care. Existing nodes keep
// theirs.
func (p *Policy) IPPools(t *Tailnet, n *Node) []netip.Prefix {
	if !slices.ContainsFunc(p.attrs, func(a *nodeAttr) bool { return len(a.pool) > 0 }) {
		return nil
	}
	one := &Tailnet{Users: t.Users, Nodes: []Node{*n}, Domains: t.Domains}
	if one.Nodes[0].ID == 0 {
		one.Nodes[0].ID = 1
	}
	c := &compiler{resolver: newResolver(one), p: p}
	var out []netip.Prefix
	for _, e := range p.attrs {
		if len(e.pool) > 0 && c.targetNodes(e.target).has(0) {
			out = append(out, e.pool...)
		}
	}
	return out
}

// MayTag reports whether a user, or a device or key that holds the given tags,
// may give the tag want. An owner that is a tag stands for who holds it and
// for that tag's own owners. A tag with an empty owner list belongs to the
// tailnet's owners, admins and network admins.
func (p *Policy) MayTag(t *Tailnet, user tailcfg.UserID, tags []string, want string) bool {
	var u *User
	for i := range t.Users {
		if t.Users[i].ID == user && user != 0 {
			u = &t.Users[i]
		}
	}
	r := newResolver(&Tailnet{Users: t.Users})
	seen := map[string]bool{}
	var owns func(tag string) bool
	owns = func(tag string) bool {
		o := p.tagOwners[tag]
		if o == nil || seen[tag] {
			return false
		}
		seen[tag] = true
		if len(o.owners) == 0 {
			return u != nil && (u.Role == "owner" || u.Role == "admin" || u.Role == "network-admin")
		}
		return slices.ContainsFunc(o.owners, func(s selector) bool {
			if s.kind == selTag {
				return slices.Contains(tags, s.name) || owns(s.name)
			}
			return u != nil && r.isUser(p, &s, u)
		})
	}
	return owns(want)
}

// isUser reports whether the selector denotes the person.
func (r *resolver) isUser(p *Policy, s *selector, u *User) bool {
	switch s.kind {
	case selMember:
		return true
	case selRole:
		return u.Role == s.name
	case selUserDomain:
		return emailDomain(u) == s.name
	case selUser:
		got, err := r.user(s.name)
		return err == nil && got != nil && got.ID == u.ID
	case selGroup:
		return slices.ContainsFunc(p.groups[strings.TrimSpace(s.name)].members, func(m selector) bool {
			return r.isUser(p, &m, u)
		})
	}
	return false
}
