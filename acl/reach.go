package acl

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"go4.org/netipx"
	"tailscale.com/tailcfg"
	"tailscale.com/types/ipproto"
)

// Endpoint is one end of a connection: an address, and the node that has it.
type Endpoint struct {
	Slot int // -1 when no node has the address
	Addr netip.Addr
}

// Endpoints finds what a name means as one end of a connection: a node by
// host name, full name, id or address (all its addresses, IPv4 first), a host
// alias of one address, a service, or any other address. A name of several
// devices or addresses is refused: what holds for one need not for the others.
func (a *Access) Endpoints(name string) ([]Endpoint, error) {
	g := a.prog
	if addr, err := netip.ParseAddr(name); err == nil {
		return []Endpoint{g.endpoint(addr.Unmap())}, nil
	}
	full := strings.TrimSuffix(name, ".")
	var found []int
	for slot := range g.live.all {
		n := &g.t.Nodes[slot]
		if strings.EqualFold(n.Hostname, name) || full != "" && strings.EqualFold(strings.TrimSuffix(n.FQDN, "."), full) || strconv.FormatInt(int64(n.ID), 10) == name {
			found = append(found, slot)
		}
	}
	switch {
	case len(found) == 1:
		return g.nodeEndpoints(found[0]), nil
	case len(found) > 1:
		return nil, fmt.Errorf("%q names %d nodes; use an id or an address", name, len(found))
	}
	if svc := g.svc[name]; svc != nil {
		var out []Endpoint
		for _, addr := range svc.addrs() {
			out = append(out, Endpoint{-1, addr})
		}
		return out, nil
	}
	if h := g.p.hosts[name]; h != nil {
		if !h.prefix.IsSingleIP() {
			return nil, fmt.Errorf("%q is %v: name one address", name, h.prefix)
		}
		return []Endpoint{g.endpoint(h.prefix.Addr())}, nil
	}
	if err := g.severalDevices(name); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("%q is no node, host, service or address of this tailnet", name)
}

// maxNamed is how many devices are offered in place of a name for several.
const maxNamed = 10

// severalDevices is the error for a selector of rules where one end is to be
// named; nil when the name is no selector either.
func (g *program) severalDevices(name string) error {
	s, err := (&reader{p: g.p}).selector(text{s: name})
	if err != nil {
		return nil
	}
	switch s.kind {
	case selPrefix, selRange:
		return fmt.Errorf("%q is a range: name one address", name)
	case selIPSet:
		return fmt.Errorf("%q is not one device: name one address", name)
	case selUser:
		if u, err := g.user(s.name); err != nil || u == nil {
			return err
		}
	case selTag, selGroup, selUserDomain, selRole, selMember, selTagged:
	default:
		return nil
	}
	var names []string
	for slot := range g.live.all {
		if g.inSelector(&s, Endpoint{Slot: slot}, true) {
			names = append(names, g.name(slot))
		}
	}
	switch n := len(names); {
	case n == 0:
		return fmt.Errorf("%q is not one device, and no device is meant", name)
	case n == 1:
		return fmt.Errorf("%q is not one device: name %s", name, names[0])
	case n > maxNamed:
		names = append(names[:maxNamed], fmt.Sprintf("%d others", n-maxNamed))
	}
	return fmt.Errorf("%q is not one device: name one of %s", name, strings.Join(names, ", "))
}

func (g *program) endpoint(addr netip.Addr) Endpoint {
	if slot, ok := g.owner(addr); ok {
		return Endpoint{slot, addr}
	}
	return Endpoint{-1, addr}
}

func (g *program) nodeEndpoints(slot int) []Endpoint {
	var out []Endpoint
	for _, a := range [...]netip.Addr{g.t.Nodes[slot].IPv4, g.t.Nodes[slot].IPv6} {
		if a.IsValid() {
			out = append(out, Endpoint{slot, a})
		}
	}
	return out
}

// ownerText is owner for a rendered address.
func (g *program) ownerText(addr string) (int, bool) {
	a, err := netip.ParseAddr(addr)
	if err != nil {
		return 0, false
	}
	return g.owner(a)
}

// path says where packets from one endpoint to another arrive.
type path struct {
	receiver int          // slot of the node whose filter decides; -1 when none
	route    netip.Prefix // the receiver's route; invalid when it has the address itself
	missing  string       // why there is no receiver
}

// droppedRanges are destinations that clients drop whatever the rules say:
// multicast and link-local addresses.
var droppedRanges = []netip.Prefix{
	netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("ff00::/8"),
	netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10"),
}

// metadataAddr is the one link-local address that clients let through, a
// cloud provider's DNS and metadata service.
var metadataAddr = netip.MustParseAddr("169.254.169.254")

func dropped(a netip.Addr) bool {
	return a != metadataAddr && slices.ContainsFunc(droppedRanges, func(p netip.Prefix) bool { return p.Contains(a) })
}

// unforwarded are destinations that no exit node forwards, although its default
// route contains them: private networks and the tailnet's own ranges. Its own
// subnet routes are another matter.
var unforwarded = append([]netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/16"),
	cgnat, netip.MustParsePrefix("fd7a:115c:a1e0::/48"),
}, droppedRanges...)

func forwarded(a netip.Addr) bool {
	return !slices.ContainsFunc(unforwarded, func(p netip.Prefix) bool { return p.Contains(a) })
}

// paths finds the receivers of packets: the node with the address, or the peer
// that the sender's routing table names for it. There are several only between
// exit nodes, of which the sender's user chooses one; there is always at least
// one entry, which may say that there is no way. A sender that is no node is
// taken to stand behind the primary router of its address.
func (a *Access) paths(from Endpoint, to netip.Addr) []path {
	g := a.prog
	if from.Slot >= 0 && !a.uses(from.Slot, from.Addr) {
		return []path{{receiver: -1, missing: fmt.Sprintf("%s does not use its address %v", g.name(from.Slot), from.Addr)}}
	}
	owner, owned := g.owner(to)
	if owned && a.uses(owner, to) {
		return []path{{receiver: owner}}
	}
	if dropped(to) {
		return []path{{receiver: -1, missing: fmt.Sprintf("%v is a link-local or multicast address; clients drop it", to)}}
	}
	sender := from.Slot
	if sender < 0 {
		if sender = a.routerOf(from.Addr); sender < 0 {
			return []path{{receiver: -1, missing: fmt.Sprintf("%v is neither a node nor behind a router of this tailnet", from.Addr)}}
		}
	}
	none := path{receiver: -1, missing: fmt.Sprintf("no router offers a route to %v that %v may use", to, from.Addr)}
	if owned {
		none.missing = fmt.Sprintf("%s does not use its address %v", g.name(owner), to)
	}
	if slices.ContainsFunc(a.self[sender].AllowedIPs, func(p netip.Prefix) bool { return p.Bits() > 0 && p.Contains(to) }) {
		none.missing = fmt.Sprintf("%v is on the sender's own side of a route", to)
	}
	var best []path
	v := a.views[sender]
	for i, slot := range v.Slots {
		if !a.rows[sender].Has(slot) {
			continue
		}
		for _, p := range v.Peers[i].AllowedIPs {
			if p.Bits() == 0 && !forwarded(to) && !g.routesTo(slot, to) {
				continue
			}
			switch {
			case !p.Contains(to) || len(best) > 0 && p.Bits() < best[0].route.Bits():
			case len(best) > 0 && p.Bits() == best[0].route.Bits():
				best = append(best, path{receiver: slot, route: p})
			default:
				best = []path{{receiver: slot, route: p}}
			}
		}
	}
	if len(best) == 0 {
		return []path{none}
	}
	return best
}

// uses reports whether the node uses its address: with disable-ipv4 it has an
// IPv4 address that it does not use.
func (a *Access) uses(slot int, addr netip.Addr) bool {
	return slices.Contains(a.self[slot].Addresses, singlePrefix(addr))
}

// routerOf is the primary router of an address, -1 when it has none.
func (a *Access) routerOf(addr netip.Addr) int {
	best, bits := -1, -1
	for p, id := range a.primaries {
		if p.Contains(addr) && p.Bits() > bits {
			if slot, ok := a.prog.slotOf(id); ok {
				best, bits = slot, p.Bits()
			}
		}
	}
	return best
}

// slotOf finds a node without touching the resolver's caches, which are not
// safe for concurrent use.
func (g *program) slotOf(id tailcfg.NodeID) (int, bool) {
	for slot := range g.live.all {
		if g.t.Nodes[slot].ID == id {
			return slot, true
		}
	}
	return 0, false
}

// delivered reports whether the part is in the receiver's filter with an
// address range that contains to.
func (g *program) delivered(f *flow, pt *part, receiver int, to Endpoint) bool {
	if f.silent || f.via != nil && !f.via.nodes.has(receiver) {
		return false
	}
	switch pt.kind {
	case partAll:
		return f.via == nil || len(g.t.Nodes[receiver].ApprovedRoutes) > 0
	case partInternet:
		return g.exits.has(receiver) && internetSet.Contains(to.Addr)
	case partNodes:
		if to.Slot < 0 || !pt.nodes.has(to.Slot) {
			return false
		}
		return f.via == nil && receiver == to.Slot || g.routesTo(receiver, to.Addr)
	}
	if !pt.rng.Contains(to.Addr) {
		return false
	}
	return f.via == nil && g.hasAddr(receiver, pt.rng) || g.routesInto(receiver, pt.rng)
}

func (g *program) hasAddr(slot int, rng netipx.IPRange) bool {
	n := &g.t.Nodes[slot]
	return n.IPv4.IsValid() && rng.Contains(n.IPv4) || n.IPv6.IsValid() && rng.Contains(n.IPv6)
}

func (g *program) routesTo(slot int, addr netip.Addr) bool {
	return g.routesInto(slot, netipx.IPRangeFrom(addr, addr))
}

// routesInto reports whether the node is an approved router, or a host of a
// service, of part of the range.
func (g *program) routesInto(slot int, rng netipx.IPRange) bool {
	for i := range g.subnets {
		if sn := &g.subnets[i]; int(sn.slot) == slot && rng.Overlaps(netipx.RangeOfPrefix(sn.prefix)) {
			return true
		}
	}
	return false
}

// portMatch follows the client's packet filter: ICMP passes when anything is
// open, protocols without ports only when all ports are.
func portMatch(f *flow, pt *part, proto int, port uint16) bool {
	switch ipproto.Proto(proto) {
	case ipproto.ICMPv4, ipproto.ICMPv6:
		return len(pt.ports) > 0
	case ipproto.TCP, ipproto.UDP, ipproto.SCTP:
		return protoMatches(f.proto, proto) && pt.hasPort(proto, port)
	}
	return protoMatches(f.proto, proto) && slices.Contains(pt.ports, tailcfg.PortRangeAny)
}

// decide finds the parts that let a packet pass the receiver's filter.
func (g *program) decide(from Endpoint, to Endpoint, receiver, proto int, port uint16) []decision {
	if from.Addr.Is4() != to.Addr.Is4() {
		return nil
	}
	var out []decision
	for _, f := range g.flows {
		if f.isCap || !f.src.contains(from.Addr, from.Slot) {
			continue
		}
		for i := range f.parts {
			pt := &f.parts[i]
			if portMatch(f, pt, proto, port) && g.delivered(f, pt, receiver, to) {
				out = append(out, decision{f, pt})
			}
		}
	}
	return out
}

type decision struct {
	flow *flow
	part *part
}

// icmpFor is the ICMP of the address family.
func icmpFor(addr netip.Addr, proto int) int {
	p := ipproto.Proto(proto)
	if (p == ipproto.ICMPv4 || p == ipproto.ICMPv6) && addr.Is6() {
		return int(ipproto.ICMPv6)
	}
	if p == ipproto.ICMPv6 {
		return int(ipproto.ICMPv4)
	}
	return proto
}
