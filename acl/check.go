package acl

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"tailscale.com/tailcfg"
	"tailscale.com/types/ipproto"
)

// Check runs the policy's tests and sshTests and returns those that do not
// hold. a is p compiled for t. A person or tag without a device is tested with
// an imaginary one, so that a policy can be tested before anyone has joined;
// so is a source whose test gives its posture attributes.
func Check(p *Policy, t *Tailnet, a *Access) []Failure {
	if len(p.tests) == 0 && len(p.sshTests) == 0 {
		return nil
	}
	k := &checker{p: p, t: t, a: a}
	k.imagine()
	for _, x := range p.tests {
		k.test(x)
	}
	for _, x := range p.sshTests {
		k.sshTest(x)
	}
	return k.fails
}

// checker evaluates tests against the compiled flows.
type checker struct {
	p     *Policy
	t     *Tailnet
	a     *Access
	r     *resolver // of its own: the one of an Access must not change any more
	fails []Failure

	// imaginary devices of tests with srcPostureAttrs, by the test's place
	posed map[int][]int
}

func (k *checker) fail(at int, format string, args ...any) {
	e := k.p.errorAt(at, fmt.Sprintf(format, args...))
	k.fails = append(k.fails, Failure{Line: e.Line, Column: e.Column, Path: e.Path, Message: e.Message})
}

// imagine adds devices for principals that have none, and recompiles when it
// had to.
func (k *checker) imagine() {
	k.r = newResolver(k.t)
	r := k.r
	b := &imagination{k: k, t: *k.t, posed: map[int][]int{}, made: map[string]bool{}}
	b.t.Nodes = slices.Clone(k.t.Nodes)
	for _, x := range k.p.tests {
		b.source(r, x.at, x.src.s, x.posture)
		for _, list := range [][]text{x.accept, x.deny} {
			for _, d := range list {
				if host, _, ok := cutPort(d.s); ok {
					b.missing(r, host)
				}
			}
		}
	}
	for _, x := range k.p.sshTests {
		b.source(r, x.at, x.src.s, x.posture)
		for _, d := range x.dst {
			b.missing(r, d.s)
		}
	}
	if len(b.t.Nodes) == len(k.t.Nodes) {
		return
	}
	a, _, err := CompileStored(k.p, &b.t)
	if err != nil {
		// The same policy compiled a moment ago; only a limit can be in the
		// way, and then the tests run on real devices alone.
		return
	}
	k.t, k.a, k.posed = &b.t, a, b.posed
	k.r = newResolver(k.t)
}

// imagination collects imaginary devices.
type imagination struct {
	k     *checker
	t     Tailnet
	posed map[int][]int
	made  map[string]bool
	next  uint32
}

// source makes a device for the source of a test if it gives attributes or if
// there is none.
func (b *imagination) source(r *resolver, at int, name string, posture map[string]any) {
	if posture == nil {
		b.missing(r, name)
		return
	}
	for _, n := range b.devices(r, name) {
		n.Posture = posture
		b.posed[at] = append(b.posed[at], b.add(n))
	}
}

func (b *imagination) missing(r *resolver, name string) {
	if b.made[name] {
		return
	}
	b.made[name] = true
	for _, n := range b.devices(r, name) {
		have := r.byUser[n.User]
		if n.Tagged() {
			if s := r.byTag[n.Tags[0]]; s != nil && !s.empty() {
				continue
			}
		} else if len(have) > 0 {
			continue
		}
		b.add(n)
	}
}

// devices are the kinds of device that a name stands for.
func (b *imagination) devices(r *resolver, name string) []Node {
	s, err := (&reader{p: b.k.p}).selector(text{s: name})
	if err != nil {
		return nil
	}
	var out []Node
	switch s.kind {
	case selTag:
		out = append(out, Node{Tags: []string{s.name}})
	case selUser, selGroup, selUserDomain, selRole, selMember:
		for i := range r.t.Users {
			if u := &r.t.Users[i]; r.isUser(b.k.p, &s, u) {
				out = append(out, Node{User: u.ID})
			}
		}
	}
	return out
}

// add places the device behind all others, with addresses that no real device
// has: 100.64.0.0/10 ends with them and the tailnet's IPv6 range leaves room.
func (b *imagination) add(n Node) int {
	for {
		b.next++
		v4 := 0x647fffff - b.next
		n.IPv4 = netip.AddrFrom4([4]byte{byte(v4 >> 24), byte(v4 >> 16), byte(v4 >> 8), byte(v4)})
		if _, taken := b.k.a.prog.owner(n.IPv4); !taken {
			break
		}
	}
	six := netip.MustParseAddr("fd7a:115c:a1e0:ffff:ffff::").As16()
	six[12], six[13], six[14], six[15] = byte(b.next>>24), byte(b.next>>16), byte(b.next>>8), byte(b.next)
	n.IPv6 = netip.AddrFrom16(six)
	n.ID = tailcfg.NodeID(1)<<62 + tailcfg.NodeID(b.next)
	n.Hostname = "(imaginary)"
	b.t.Nodes = append(b.t.Nodes, n)
	return len(b.t.Nodes) - 1
}

// sender is one address from which a test's source may send.
type sender struct {
	addr  netip.Addr
	owner int // slot, -1 when no node has the address
}

// senders resolves the src of a test. Every one of them must pass. posed says
// that the test gives attributes, which only imagined devices can have: an
// address is that of a real device, with attributes of its own.
func (k *checker) senders(at int, src text, posed bool) ([]sender, error) {
	if src.s == "" {
		return nil, fmt.Errorf("src must be specified")
	}
	var out []sender
	add := func(slot int) {
		n := &k.t.Nodes[slot]
		for _, a := range [...]netip.Addr{n.IPv4, n.IPv6} {
			if a.IsValid() {
				out = append(out, sender{a, slot})
			}
		}
	}
	if posed := k.posed[at]; posed != nil {
		for _, slot := range posed {
			add(slot)
		}
		return out, nil
	}
	s, err := (&reader{p: k.p}).selector(src)
	if err != nil {
		return nil, err
	}
	if posed && s.kind != selTag && !s.byUser() {
		return nil, fmt.Errorf("src %q: srcPostureAttrs needs a user, a group or a tag", src.s)
	}
	r := k.r
	switch s.kind {
	case selUser:
		if err := r.somebody(&s); err != nil {
			return nil, fmt.Errorf("src %q: %w", src.s, err)
		}
	case selPrefix:
		if !s.prefix.IsSingleIP() {
			return nil, fmt.Errorf("src %q: must be one address", src.s)
		}
		owner := -1
		if slot, ok := r.owner(s.prefix.Addr()); ok {
			owner = slot
		}
		return []sender{{s.prefix.Addr(), owner}}, nil
	case selGroup, selTag, selMember, selTagged, selRole, selUserDomain:
	default:
		return nil, fmt.Errorf("src %q: must be a user, group, tag, host or address", src.s)
	}
	for slot := range r.nodes(k.p, &s).all {
		// Devices that another test imagined with posture attributes are not
		// this test's business.
		if k.t.Nodes[slot].ID < imaginaryID || !k.isPosed(slot) {
			add(slot)
		}
	}
	return out, nil
}

const imaginaryID = tailcfg.NodeID(1) << 62

func (k *checker) isPosed(slot int) bool {
	for _, list := range k.posed {
		if slices.Contains(list, slot) {
			return true
		}
	}
	return false
}

// cutPort splits HOST:PORT.
func cutPort(s string) (host, port string, ok bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return "", "", false
	}
	host = s[:i]
	if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		host = host[1 : len(host)-1]
	}
	return host, s[i+1:], true
}

func (k *checker) test(x *test) {
	if len(x.accept) == 0 && len(x.deny) == 0 {
		k.fail(x.at, "a test needs accept or deny")
		return
	}
	proto, err := testProto(x.proto.s)
	if err != nil {
		k.fail(x.proto.at, "%v", err)
		return
	}
	senders, err := k.senders(x.at, x.src, x.posture != nil)
	if err != nil {
		k.fail(orAt(x.src.at, x.at), "%v", err)
		return
	}
	if len(senders) == 0 {
		k.fail(x.src.at, "src %q: no device is meant", x.src.s)
		return
	}
	for _, d := range x.accept {
		k.testDst(x, d, senders, proto, true)
	}
	for _, d := range x.deny {
		k.testDst(x, d, senders, proto, false)
	}
}

// testProto allows the protocols that have ports; none means TCP.
func testProto(s string) (int, error) {
	if s == "" {
		return int(ipproto.TCP), nil
	}
	n, err := parseProto(fold(s))
	if err != nil {
		return 0, err
	}
	switch ipproto.Proto(n) {
	case ipproto.TCP, ipproto.UDP, ipproto.SCTP:
		return n, nil
	}
	return 0, fmt.Errorf("proto %q: tests need tcp, udp or sctp", s)
}

// receivers resolves the dst of a test for one sender: each one's addresses.
func (k *checker) receivers(host string, from sender) ([][]netip.Addr, error) {
	s, err := (&reader{p: k.p}).selector(text{s: host})
	if err != nil {
		return nil, err
	}
	r := k.r
	var out [][]netip.Addr
	add := func(slot int) {
		if k.isPosed(slot) {
			return
		}
		var addrs []netip.Addr
		for _, a := range [...]netip.Addr{k.t.Nodes[slot].IPv4, k.t.Nodes[slot].IPv6} {
			if a.IsValid() {
				addrs = append(addrs, a)
			}
		}
		out = append(out, addrs)
	}
	switch s.kind {
	case selPrefix:
		if !s.single && !s.prefix.IsSingleIP() || strings.Contains(host, "/") {
			return nil, fmt.Errorf("must be one host, not a range")
		}
		return [][]netip.Addr{{s.prefix.Addr()}}, nil
	case selSelf:
		if from.owner >= 0 && !k.t.Nodes[from.owner].Tagged() {
			for _, slot := range r.byUser[k.t.Nodes[from.owner].User] {
				add(int(slot))
			}
		}
		return out, nil
	case selUser:
		if err := r.somebody(&s); err != nil {
			return nil, err
		}
	case selService:
		if svc := r.svc[s.name]; svc != nil {
			return [][]netip.Addr{svc.addrs()}, nil
		}
		return nil, fmt.Errorf("no such service")
	case selGroup, selTag, selMember, selTagged, selRole:
	default:
		return nil, fmt.Errorf("must be one host")
	}
	for slot := range r.nodes(k.p, &s).all {
		add(slot)
	}
	return out, nil
}

func (k *checker) testDst(x *test, d text, senders []sender, proto int, want bool) {
	host, portText, ok := cutPort(d.s)
	port, err := strconv.ParseUint(portText, 10, 16)
	if !ok || err != nil || port == 0 {
		k.fail(d.at, "dst %q: must be one host and one port", d.s)
		return
	}
	for _, from := range senders {
		to, err := k.receivers(host, from)
		if err != nil {
			k.fail(d.at, "dst %q: %v", d.s, err)
			return
		}
		if want && len(to) == 0 {
			k.fail(d.at, "expected %s to reach %s, but no device is meant", x.src.s, d.s)
			return
		}
		for _, addrs := range to {
			got, by := k.reaches(from, addrs, proto, uint16(port))
			switch {
			case got && !want:
				k.fail(d.at, "expected %s not to reach %s (%s), but the rule in line %d allows it from %v",
					x.src.s, d.s, protoName(proto), k.p.lineOf(by.at), from.addr)
				return
			case !got && want && comparable(from.addr, addrs):
				k.fail(d.at, "expected %s to reach %s (%s), but no rule allows it from %v",
					x.src.s, d.s, protoName(proto), from.addr)
				return
			}
		}
	}
}

// comparable reports whether one of the addresses is of the sender's family;
// an IPv4 sender cannot be expected to reach an IPv6 literal.
func comparable(from netip.Addr, to []netip.Addr) bool {
	return slices.ContainsFunc(to, func(a netip.Addr) bool { return a.Is4() == from.Is4() })
}

// reaches reports whether the sender may open the port on one of the
// receiver's addresses of the same family, and by which rule.
func (k *checker) reaches(from sender, to []netip.Addr, proto int, port uint16) (bool, *rule) {
	for _, a := range to {
		if a.Is4() != from.addr.Is4() {
			continue
		}
		if pt := k.a.prog.allows(from, a, proto, port); pt != nil {
			return true, pt.rule
		}
	}
	return false, nil
}

// allows finds the first part of a flow that lets the packet through, whoever
// the receiver is.
func (g *program) allows(from sender, to netip.Addr, proto int, port uint16) *part {
	owner := -1
	if slot, ok := g.owner(to); ok {
		owner = slot
	}
	for _, f := range g.flows {
		if f.isCap || !protoMatches(f.proto, proto) || !f.src.contains(from.addr, from.owner) {
			continue
		}
		for i := range f.parts {
			if pt := &f.parts[i]; pt.hasPort(proto, port) && pt.contains(to, owner) {
				return pt
			}
		}
	}
	return nil
}

// protoMatches says whether a rule for the protocol applies; 0 stands for TCP,
// UDP and both ICMPs.
func protoMatches(rule, packet int) bool {
	if rule != 0 {
		return rule == packet
	}
	switch ipproto.Proto(packet) {
	case ipproto.TCP, ipproto.UDP, ipproto.ICMPv4, ipproto.ICMPv6:
		return true
	}
	return false
}

func (pt *part) hasPort(proto int, port uint16) bool {
	return slices.ContainsFunc(pt.ports, func(pr tailcfg.PortRange) bool { return pr.Contains(port) })
}

func (pt *part) contains(a netip.Addr, owner int) bool {
	switch pt.kind {
	case partAll:
		return true
	case partNodes:
		return owner >= 0 && pt.nodes.has(owner)
	case partInternet:
		return internetSet.Contains(a)
	}
	return pt.rng.Contains(a)
}
