package tailnet

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"

	"tailscale.com/tailcfg"
)

// Caps on what a client says of itself. What is above them is cut off and never hurts the maps of peers.
const (
	maxHostname    = 255
	maxString      = 512
	maxRoutes      = 2000
	maxServices    = 512
	maxRequestTags = 64
	maxSSHKeys     = 16
	maxSSHKey      = 2048
	maxEndpoints   = 64
	maxMACs        = 32
	maxRegions     = 256
	maxHostinfo    = 64 << 10 // of the whole, as JSON
)

// CleanHostinfo returns a copy of h with every part cut to its cap: strings valid, printable and short, routes masked and few. A nil h
// gives nil.
func CleanHostinfo(h *tailcfg.Hostinfo) *tailcfg.Hostinfo {
	if h == nil {
		return nil
	}
	c := *h
	c.Hostname = cleanString(c.Hostname, maxHostname)
	cutStrings(&c, maxString)
	c.RoutableIPs = cleanRoutes(c.RoutableIPs)
	c.RequestTags = cleanStrings(c.RequestTags, maxRequestTags, maxString)
	c.WoLMACs = cleanStrings(c.WoLMACs, maxMACs, maxString)
	c.SSH_HostKeys = cleanStrings(c.SSH_HostKeys, maxSSHKeys, maxSSHKey)
	if len(c.Services) > maxServices {
		c.Services = c.Services[:maxServices]
	}
	services := make([]tailcfg.Service, 0, len(c.Services))
	for _, s := range c.Services {
		s.Description = cleanString(s.Description, maxString)
		s.Proto = tailcfg.ServiceProto(cleanString(string(s.Proto), 32))
		services = append(services, s)
	}
	c.Services = services
	c.NetInfo = cleanNetInfo(c.NetInfo)
	c.Location = cleanLocation(c.Location)
	if c.TPM != nil {
		t := *c.TPM
		t.Manufacturer, t.Vendor, t.FamilyIndicator = cleanString(t.Manufacturer, 64), cleanString(t.Vendor, 64), cleanString(t.FamilyIndicator, 64)
		c.TPM = &t
	}
	// What peers and the policy need goes last. JSON writes some characters as six, so that even the strings alone may be too much; once they
	// are short too, there is nothing left that could be.
	for _, shorten := range []func(){
		func() { c.Services = peerServices(c.Services) },
		func() { c.SSH_HostKeys, c.WoLMACs = nil, nil },
		func() { c.RoutableIPs = c.RoutableIPs[:min(len(c.RoutableIPs), maxRoutes/4)] },
		func() { c.RequestTags = nil },
		func() {
			if c.NetInfo != nil {
				c.NetInfo.DERPLatency = nil
			}
		},
		func() { cutStrings(&c, maxString/8) },
	} {
		if text, err := json.Marshal(&c); err == nil && len(text) <= maxHostinfo {
			break
		}
		shorten()
	}
	return &c
}

// cutStrings cleans the strings of c that have no cap of their own and cuts them to n bytes.
func cutStrings(c *tailcfg.Hostinfo, n int) {
	for _, s := range []*string{
		&c.IPNVersion, &c.FrontendLogID, &c.BackendLogID, &c.OS, &c.OSVersion, &c.Env, &c.Distro, &c.DistroVersion, &c.DistroCodeName,
		&c.Package, &c.DeviceModel, &c.PushDeviceToken, &c.GoArch, &c.GoArchVar, &c.GoVersion, &c.Machine, &c.App, &c.Cloud,
		&c.ServicesHash, (*string)(&c.ExitNodeID),
	} {
		*s = cleanString(*s, n)
	}
}

// peerServices are the first of each kind of the services that peers are told of: Taildrop, exit node DNS and ping depend on them.
func peerServices(list []tailcfg.Service) []tailcfg.Service {
	var out []tailcfg.Service
	for _, s := range list {
		switch s.Proto {
		case tailcfg.PeerAPI4, tailcfg.PeerAPI6, tailcfg.PeerAPIDNS:
			if !slices.ContainsFunc(out, func(o tailcfg.Service) bool { return o.Proto == s.Proto }) {
				out = append(out, tailcfg.Service{Proto: s.Proto, Port: s.Port})
			}
		}
	}
	return out
}

func cleanNetInfo(n *tailcfg.NetInfo) *tailcfg.NetInfo {
	if n == nil {
		return nil
	}
	c := *n
	c.LinkType, c.FirewallMode = cleanString(c.LinkType, 32), cleanString(c.FirewallMode, 64)
	if len(c.DERPLatency) > maxRegions {
		c.DERPLatency = nil
	}
	for k := range c.DERPLatency {
		if len(k) > 32 {
			c.DERPLatency = nil
			break
		}
	}
	if c.PreferredDERP < 0 || c.PreferredDERP > 1<<16 {
		c.PreferredDERP = 0
	}
	return &c
}

func cleanLocation(l *tailcfg.Location) *tailcfg.Location {
	if l == nil {
		return nil
	}
	c := *l
	for _, s := range []*string{&c.Country, &c.CountryCode, &c.City, &c.CityCode} {
		*s = cleanString(*s, 64)
	}
	return &c
}

// cleanString drops what is not valid UTF-8 or not printable, and cuts to at most n bytes at a character's border.
func cleanString(s string, n int) string {
	if len(s) > 4*n {
		s = s[:4*n]
	}
	clean := true
	for i := 0; i < len(s); i++ {
		if s[i] < 0x20 || s[i] >= 0x7f {
			clean = false
			break
		}
	}
	if !clean {
		s = strings.Map(func(r rune) rune {
			if r < 0x20 || r == 0x7f || r == utf8.RuneError || (r >= 0x80 && r < 0xa0) || r == 0x2028 || r == 0x2029 {
				return -1
			}
			return r
		}, s)
	}
	for len(s) > n {
		_, size := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-size]
	}
	return s
}

func cleanStrings(list []string, n, size int) []string {
	if len(list) > n {
		list = list[:n]
	}
	var out []string
	for _, s := range list {
		if len(s) <= size {
			out = append(out, cleanString(s, size))
		}
	}
	return out
}

// cleanRoutes keeps valid prefixes once each, without host bits: clients drop a whole entry that has them.
func cleanRoutes(list []netip.Prefix) []netip.Prefix {
	if len(list) == 0 {
		return nil
	}
	seen := make(map[netip.Prefix]bool)
	var out []netip.Prefix
	for _, r := range list {
		if !r.IsValid() || seen[r.Masked()] || RefusedRoute(r.Masked()) != "" {
			continue
		}
		if len(out) == maxRoutes {
			break
		}
		seen[r.Masked()] = true
		out = append(out, r.Masked())
	}
	return out
}

// reservedRoutes may never be routed by a node: they mean the device itself, its link, multicast, or the tailnet.
var reservedRoutes = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/3"), netip.MustParsePrefix("100.100.100.100/32"), netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("::/128"),
	netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"), netip.MustParsePrefix("fd7a:115c:a1e0::53/128"),
}

// tailnetRanges are the addresses of tailnets themselves. A node may not advertise a part of them.
var tailnetRanges = []netip.Prefix{netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("fd7a:115c:a1e0::/48")}

// fourVia6 holds IPv4 subnets behind site routers, which are advertised although they lie inside the tailnet's IPv6 range.
var fourVia6 = netip.MustParsePrefix("fd7a:115c:a1e0:b1a::/64")

// RefusedRoute tells why nobody may route r; empty when it is an ordinary route or an exit route.
func RefusedRoute(r netip.Prefix) string {
	if r.Bits() == 0 {
		return ""
	}
	if r.Addr().Is4In6() {
		return "is an IPv4 address in IPv6 form"
	}
	for _, p := range reservedRoutes {
		if p.Contains(r.Addr()) && r.Bits() >= p.Bits() {
			return "lies in " + p.String() + ", which is reserved"
		}
	}
	if r.Addr().Is6() && fourVia6.Contains(r.Addr()) && r.Bits() >= fourVia6.Bits() {
		return ""
	}
	for _, p := range tailnetRanges {
		if p.Overlaps(r) {
			return "overlaps the tailnet's own addresses " + p.String()
		}
	}
	return ""
}

// CleanEndpoints keeps valid endpoints, the first ones when there are too many. types is parallel to addrs or shorter.
func CleanEndpoints(addrs []netip.AddrPort, types []tailcfg.EndpointType) []tailcfg.Endpoint {
	var out []tailcfg.Endpoint
	for i, a := range addrs {
		if !a.IsValid() || a.Port() == 0 || a.Addr().IsUnspecified() || a.Addr().IsMulticast() {
			continue
		}
		if len(out) == maxEndpoints {
			break
		}
		e := tailcfg.Endpoint{Addr: netip.AddrPortFrom(a.Addr().WithZone(""), a.Port())}
		if i < len(types) {
			e.Type = types[i]
		}
		out = append(out, e)
	}
	return out
}
