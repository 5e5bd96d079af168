package netmap

import (
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"tailscale.com/tailcfg"
	"tailscale.com/types/dnstype"

	"github.com/signalbox-net/signalbox/control/tailnet"
)

// nextDNS is the resolver whose URL may name the device that asks.
const nextDNS = "https://dns.nextdns.io/"

// dnsConfig is what the node in slot is told about names.
func dnsConfig(s *tailnet.Snapshot, slot int) *tailcfg.DNSConfig {
	set := s.Settings()
	d := &set.DNS
	out := &tailcfg.DNSConfig{Proxied: d.MagicDNS, Routes: map[string][]*dnstype.Resolver{}}
	if d.BaseDomain != "" {
		out.ExitNodeFilteredSet = []string{"." + d.BaseDomain}
		if d.MagicDNS {
			out.Domains = append(out.Domains, d.BaseDomain)
			// Handled by the client itself, and so never asked of anybody else.
			out.Routes[d.BaseDomain] = nil
		}
	}
	out.Domains = append(out.Domains, d.SearchDomains...)
	profile, anonymous := nextDNSAttrs(s, slot)
	resolvers := resolverList(d.Global)
	if profile != "" {
		resolvers = []*dnstype.Resolver{{Addr: nextDNS + profile}}
	}
	if !anonymous {
		nameDevice(resolvers, s.NodeAt(slot))
	}
	if d.OverrideLocal || profile != "" {
		out.Resolvers = resolvers
	} else {
		out.FallbackResolvers = resolvers
	}
	for suffix, addrs := range d.Split {
		out.Routes[suffix] = resolverList(addrs)
	}
	out.ExtraRecords = set.Records
	for _, r := range set.Records {
		name := strings.TrimSuffix(r.Name, ".")
		if len(out.Resolvers) == 0 && !underAny(name, out.Routes) {
			out.Routes[name] = nil
		}
	}
	if len(out.Routes) == 0 {
		out.Routes = nil
	}
	return out
}

// underAny reports whether name equals, or lies below, a routed suffix.
func underAny(name string, routes map[string][]*dnstype.Resolver) bool {
	for suffix := range routes {
		if name == suffix || strings.HasSuffix(name, "."+suffix) {
			return true
		}
	}
	return false
}

func resolverList(addrs []string) []*dnstype.Resolver {
	var out []*dnstype.Resolver
	for _, a := range addrs {
		out = append(out, &dnstype.Resolver{Addr: a})
	}
	return out
}

// nextDNSAttrs reads the node attributes nextdns:PROFILE and nextdns:no-device-info, which are meant for the server.
func nextDNSAttrs(s *tailnet.Snapshot, slot int) (profile string, anonymous bool) {
	var names []string
	for k := range s.Access().Caps(slot).Map {
		if v, ok := strings.CutPrefix(string(k), "nextdns:"); ok {
			if v == "no-device-info" {
				anonymous = true
			} else {
				names = append(names, v)
			}
		}
	}
	if len(names) > 0 {
		slices.Sort(names)
		profile = names[0]
	}
	return profile, anonymous
}

// deviceMoved reports whether nameDevice says otherwise of a node.
func deviceMoved(old, now *tailnet.Node) bool {
	return old.GivenName != now.GivenName || old.IPv4 != now.IPv4 || model(old) != model(now)
}

func model(n *tailnet.Node) string {
	if n.State.Hostinfo == nil {
		return ""
	}
	return n.State.Hostinfo.OS
}

func nameDevice(resolvers []*dnstype.Resolver, n *tailnet.Node) {
	for _, r := range resolvers {
		if !strings.HasPrefix(r.Addr, nextDNS) {
			continue
		}
		q := url.Values{"device_name": {n.GivenName}}
		if m := model(n); m != "" {
			q.Set("device_model", m)
		}
		if ip := (netip.Addr{}); n.IPv4 != ip {
			q.Set("device_ip", n.IPv4.String())
		}
		r.Addr += "?" + q.Encode()
	}
}
