package acl

import (
	"cmp"
	"slices"
	"strings"

	"tailscale.com/tailcfg"
	"tailscale.com/types/ipproto"
)

// span is one thing that may be opened: a run of ports, a protocol without
// ports, or a capability.
type span struct {
	proto       int
	first, last uint16
	app         string
}

// spans is what a part opens, as the client's filter understands it.
func (f *flow) spans(pt *part) []span {
	var out []span
	if f.isCap {
		for _, name := range sortedKeys(f.caps) {
			values := make([]string, len(f.caps[name]))
			for i, v := range f.caps[name] {
				values[i] = string(v)
			}
			out = append(out, span{proto: -1, app: string(name) + "=[" + strings.Join(values, ",") + "]"})
		}
		return out
	}
	for _, proto := range [...]int{int(ipproto.TCP), int(ipproto.UDP), int(ipproto.SCTP)} {
		if protoMatches(f.proto, proto) {
			for _, pr := range pt.ports {
				out = append(out, span{proto: proto, first: pr.First, last: pr.Last})
			}
		}
	}
	switch ipproto.Proto(f.proto) {
	case 0, ipproto.TCP, ipproto.UDP, ipproto.SCTP, ipproto.ICMPv4, ipproto.ICMPv6:
	default:
		if slices.Contains(pt.ports, tailcfg.PortRangeAny) {
			out = append(out, span{proto: f.proto})
		}
	}
	if len(pt.ports) > 0 {
		out = append(out, span{proto: int(ipproto.ICMPv4)})
	}
	return out
}

func compareSpan(a, b span) int {
	return cmp.Or(cmp.Compare(a.proto, b.proto), cmp.Compare(a.app, b.app), cmp.Compare(a.first, b.first), cmp.Compare(a.last, b.last))
}

func mergeSpans(list []span) []span {
	slices.SortFunc(list, compareSpan)
	var out []span
	for _, s := range list {
		if n := len(out); n > 0 && out[n-1].proto == s.proto && out[n-1].app == s.app && int(s.first) <= int(out[n-1].last)+1 {
			out[n-1].last = max(out[n-1].last, s.last)
			continue
		}
		out = append(out, s)
	}
	return out
}

// minusSpans is a without b; both are merged.
func minusSpans(a, b []span) []span {
	var out []span
	for _, s := range a {
		first := int(s.first)
		for _, o := range b {
			if o.proto != s.proto || o.app != s.app || int(o.last) < first || o.first > s.last {
				continue
			}
			if int(o.first) > first {
				out = append(out, span{s.proto, uint16(first), o.first - 1, s.app})
			}
			first = int(o.last) + 1
		}
		if first <= int(s.last) {
			out = append(out, span{s.proto, uint16(first), s.last, s.app})
		}
	}
	return out
}

func (s span) String() string {
	switch ipproto.Proto(s.proto) {
	case ipproto.TCP, ipproto.UDP, ipproto.SCTP:
		return protoName(s.proto) + ":" + portString(tailcfg.PortRange{First: s.first, Last: s.last})
	}
	if s.app != "" {
		return "app:" + s.app
	}
	return protoName(s.proto)
}
