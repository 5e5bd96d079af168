package acl

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/tailscale/hujson"
	"tailscale.com/tailcfg"
	"tailscale.com/types/ipproto"
)

var (
	errSelfSource = errors.New("autogroup:self can only be used with users, groups, or supported autogroups")
	zero4         = netip.MustParsePrefix("0.0.0.0/0")
	zero6         = netip.MustParsePrefix("::/0")
)

func (r *reader) acl(v *hujson.Value) {
	ru := &rule{kind: kindACL, at: v.StartOffset, end: v.EndOffset, where: r.p.defaultPosture}
	var action, proto text
	var src, dst []text
	var srcOld, dstOld []text
	protoField := func(v *hujson.Value) {
		if lit, ok := v.Value.(hujson.Literal); ok && lit.Kind() == '0' {
			proto = text{string(lit), v.StartOffset}
			return
		}
		r.textInto(&proto)(v)
	}
	if !r.object(v, map[string]field{
		"action": r.textInto(&action), "proto": protoField,
		"src": r.textsInto(&src), "users": r.textsInto(&srcOld),
		"dst": r.textsInto(&dst), "ports": r.textsInto(&dstOld),
		"srcposture": func(v *hujson.Value) { ru.where = r.postureRefs(v) },
	}) {
		return
	}
	if action.s != "accept" {
		r.fail(orAt(action.at, ru.at), "action=%q is not supported", action.s)
	}
	if n, err := parseProto(proto.s); err != nil {
		r.fail(proto.at, "%v", err)
	} else {
		ru.proto = n
	}
	ru.src = r.sources(append(src, srcOld...))
	for _, t := range append(dst, dstOld...) {
		d, err := r.aclDestination(t, ru.proto)
		if err != nil {
			r.fail(t.at, "%v", err)
			continue
		}
		ru.dst = append(ru.dst, d)
	}
	r.checkSelf(ru)
	r.p.rules = append(r.p.rules, ru)
}

// parseProto reads an ACL's proto: a name or a number, "" for the default set.
func parseProto(s string) (int, error) {
	var p ipproto.Proto
	if len(s) > 1 && s[0] == '0' {
		return 0, fmt.Errorf("proto %q: leading zeros are not permitted", s)
	}
	if err := p.UnmarshalText([]byte(s)); err != nil {
		return 0, err
	}
	return int(p), nil
}

// orAt is the place of a member, or of its object when it is missing.
func orAt(at, object int) int {
	if at == 0 {
		return object
	}
	return at
}

// sources reads a rule's src list.
func (r *reader) sources(list []text) []selector {
	var out []selector
	for _, t := range list {
		s, err := r.selector(t)
		switch {
		case err != nil:
			r.fail(t.at, "src=%v", err)
		case s.kind == selSelf, s.kind == selInternet, s.kind == selNonroot, s.kind == selService:
			r.fail(t.at, "%q not valid on the src side of a rule", t.s)
		default:
			out = append(out, s)
		}
	}
	return out
}

// checkDestination refuses what may never be a destination.
func checkDestination(s *selector) error {
	switch {
	case s.kind == selDangerAll:
		return errors.New("cannot use autogroup:danger-all as a dst")
	case s.kind == selShared, s.kind == selNonroot:
		return fmt.Errorf("%q not valid on the dst side of a rule", s.s)
	case s.kind == selPrefix && (s.prefix == zero4 || s.prefix == zero6):
		return fmt.Errorf(`dst %q: to allow all IP addresses, use "*" or "autogroup:internet"`, s.s)
	}
	return nil
}

// aclDestination reads TARGET:PORTS.
func (r *reader) aclDestination(t text, proto int) (destination, error) {
	var d destination
	i := strings.LastIndexByte(t.s, ':')
	if i < 0 {
		return d, fmt.Errorf("dst=%q: hostport must contain a colon (\":\")", t.s)
	}
	target, ports := strings.TrimSpace(t.s[:i]), strings.TrimSpace(t.s[i+1:])
	if strings.HasPrefix(target, "[") && strings.HasSuffix(target, "]") {
		target = target[1 : len(target)-1]
	}
	var err error
	if d.ports, err = parsePorts(ports, proto); err != nil {
		return d, fmt.Errorf("dst=%q: %w", t.s, err)
	}
	if d.selector, err = r.selector(text{target, t.at}); err != nil {
		return d, fmt.Errorf("dst=%q: %w", target, err)
	}
	return d, checkDestination(&d.selector)
}

// parsePorts reads "*", or a comma list of ports and ranges.
func parsePorts(s string, proto int) ([]tailcfg.PortRange, error) {
	var out []tailcfg.PortRange
	for part := range strings.SplitSeq(s, ",") {
		_, pr, err := tailcfg.ParseHostPortRange("*:" + strings.TrimSpace(part))
		if err != nil {
			return nil, err
		}
		out = append(out, pr)
	}
	return out, checkProtoPorts(proto, out)
}

// checkProtoPorts refuses ports for protocols that have none.
func checkProtoPorts(proto int, ports []tailcfg.PortRange) error {
	switch ipproto.Proto(proto) {
	case 0, ipproto.TCP, ipproto.UDP, ipproto.SCTP:
		return nil
	}
	for _, pr := range ports {
		if pr != tailcfg.PortRangeAny {
			return fmt.Errorf("port range %q: protocol %v has no ports, use '*'", portString(pr), protoName(proto))
		}
	}
	return nil
}

func portString(pr tailcfg.PortRange) string {
	switch {
	case pr == tailcfg.PortRangeAny:
		return "*"
	case pr.First == pr.Last:
		return strconv.Itoa(int(pr.First))
	}
	return fmt.Sprintf("%d-%d", pr.First, pr.Last)
}

func protoName(proto int) string {
	b, _ := ipproto.Proto(proto).MarshalText()
	return string(b)
}

// checkSelf refuses autogroup:self for sources that are no people's devices.
// An acl may use * with it, a grant may not.
func (r *reader) checkSelf(ru *rule) {
	for i := range ru.dst {
		if ru.dst[i].kind != selSelf {
			continue
		}
		for j := range ru.src {
			s := &ru.src[j]
			if !s.byUser() && !(s.kind == selAll && ru.kind == kindACL) {
				r.fail(ru.dst[i].at, "%v", errSelfSource)
				return
			}
		}
	}
}

func (r *reader) grant(v *hujson.Value) {
	ru := &rule{kind: kindGrant, at: v.StartOffset, end: v.EndOffset, where: r.p.defaultPosture}
	var src, dst, ip []text
	var app *hujson.Value
	if !r.object(v, map[string]field{
		"src": r.textsInto(&src), "dst": r.textsInto(&dst), "ip": r.textsInto(&ip), "via": r.textsInto(&ru.via),
		"app":        func(v *hujson.Value) { app = v },
		"srcposture": func(v *hujson.Value) { ru.where = r.postureRefs(v) },
	}) {
		return
	}
	if app != nil {
		r.apps(ru, app)
	}
	if len(ip) == 0 && (app == nil || len(ru.apps) == 0 && len(r.errs) == 0) {
		r.fail(ru.at, "ip and app can not both be empty")
	}
	r.grantPorts(ru, ip)
	ru.src = r.sources(src)
	for _, t := range dst {
		s, err := r.selector(t)
		if err != nil {
			r.fail(t.at, "dst=%q: %v", t.s, err)
			continue
		}
		if err := checkDestination(&s); err != nil {
			r.fail(t.at, "%v", err)
			continue
		}
		if s.kind == selInternet && len(ru.apps) > 0 {
			r.fail(t.at, "cannot use app grants with autogroup:internet")
			continue
		}
		ru.dst = append(ru.dst, destination{selector: s})
	}
	r.checkSelf(ru)
	r.grantVia(ru)
	r.p.rules = append(r.p.rules, ru)
}

func (r *reader) grantVia(ru *rule) {
	for _, t := range ru.via {
		switch {
		case !strings.HasPrefix(t.s, "tag:"):
			r.fail(t.at, "via can only be a tag")
		case r.p.tagOwners[t.s] == nil:
			r.fail(t.at, "tag %q not found", t.s)
		default:
			r.use(t.s)
		}
	}
}

// grantPorts collects the ports of each protocol, protocols in order of first
// appearance.
func (r *reader) grantPorts(ru *rule, ip []text) {
	for _, t := range ip {
		list, err := tailcfg.ParseProtoPortRanges([]string{t.s})
		if err == nil {
			err = checkProtoPorts(list[0].Proto, []tailcfg.PortRange{list[0].Ports})
		}
		if err != nil {
			r.fail(t.at, "%v", err)
			continue
		}
		i := slices.IndexFunc(ru.ports, func(pp protoPorts) bool { return pp.proto == list[0].Proto })
		if i < 0 {
			i = len(ru.ports)
			ru.ports = append(ru.ports, protoPorts{proto: list[0].Proto})
		}
		ru.ports[i].ports = append(ru.ports[i].ports, list[0].Ports)
	}
}

func (r *reader) apps(ru *rule, v *hujson.Value) {
	r.table(v, func(name text, v *hujson.Value) {
		if err := checkCapability(name.s); err != nil {
			r.fail(name.at, "%v", err)
			return
		}
		c := appCap{name: tailcfg.PeerCapability(name.s)}
		r.list(v, func(v *hujson.Value) { c.values = append(c.values, raw(v)) })
		ru.apps = append(ru.apps, c)
	})
	slices.SortFunc(ru.apps, func(a, b appCap) int { return strings.Compare(string(a.name), string(b.name)) })
}

// grantable are the capabilities in Tailscale's own domain that a policy may
// grant. The others are companions that the control plane derives, or belong
// to Tailscale's own services.
var grantable = map[string]bool{
	"drive": true, "golink": true, "kubernetes": true, "proxy-to-grafana": true, "relay": true, "secrets": true,
	"tsidp": true, "webui": true,
}

// CapTaildrop in the app part of a grant lets the sources send files to the
// destinations with Taildrop, also between different people. Clients know that
// as PeerCapabilityFileSharingSend of the sender and
// PeerCapabilityFileSharingTarget of the receiver, whose names are URLs and so
// cannot stand in a policy.
const CapTaildrop tailcfg.PeerCapability = "signalbox.net/cap/taildrop"

func checkCapability(name string) error {
	domain, path, ok := strings.Cut(name, "/")
	if !ok || domain == "" || path == "" || !strings.Contains(domain, ".") || strings.ContainsAny(domain, ": ") {
		return errors.New("capability name must have the form {domain}/{path}")
	}
	if domain == "tailscale.com" {
		if cap, ok := strings.CutPrefix(path, "cap/"); !ok || !grantable[cap] {
			return errors.New("capability name must not be in the tailscale.com domain")
		}
	}
	return nil
}
