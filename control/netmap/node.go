package netmap

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/control/tailnet"
)

// maxEndpoints is how many endpoints of a node its peers are told.
const maxEndpoints = 32

// peerNode is how n looks to a viewer that sees look. noV4 hides its IPv4 address.
func peerNode(n *tailnet.Node, look *acl.PeerView, noV4 bool) *tailcfg.Node {
	out := &tailcfg.Node{
		ID: n.ID, StableID: n.StableID, Name: n.FQDN, User: n.PeerUser(), Key: n.NodeKey, KeyExpiry: n.Expiry, DiscoKey: n.State.DiscoKey,
		Addresses: prefixes(n), Hostinfo: tailnet.PeerHostinfo(n.State.Hostinfo).View(), Created: n.Created, Cap: n.State.Cap, Tags: n.Tags,
		AllowedIPs: look.AllowedIPs, PrimaryRoutes: look.PrimaryRoutes, CapMap: look.CapMap, MachineAuthorized: true,
	}
	if noV4 {
		v4 := func(p netip.Prefix) bool { return p.Addr().Is4() && p.Addr() == n.IPv4 }
		out.Addresses = slices.DeleteFunc(out.Addresses, v4)
		out.AllowedIPs = slices.DeleteFunc(slices.Clone(out.AllowedIPs), v4)
	}
	if len(out.AllowedIPs) > 0 && len(out.AllowedIPs) < len(out.Addresses) {
		// The policy's attribute disable-ipv4 hides an address of the node itself.
		out.Addresses = slices.DeleteFunc(out.Addresses, func(p netip.Prefix) bool { return !slices.Contains(out.AllowedIPs, p) })
	}
	online := n.State.Online && !n.Dead()
	out.Online = &online
	if !online {
		out.LastSeen = lastSeen(n)
	}
	if n.Dead() {
		out.Expired = true
		return out
	}
	out.Endpoints = endpoints(n)
	out.HomeDERP = n.State.HomeDERP
	return out
}

// lastSeen rounds to seconds: peers need no more, and whole seconds are short.
func lastSeen(n *tailnet.Node) *time.Time {
	if n.State.LastSeen.IsZero() {
		return nil
	}
	t := n.State.LastSeen.UTC().Truncate(time.Second)
	return &t
}

func endpoints(n *tailnet.Node) []netip.AddrPort {
	eps := n.State.Endpoints
	if len(eps) > maxEndpoints {
		eps = eps[:maxEndpoints]
	}
	out := make([]netip.AddrPort, 0, len(eps))
	for _, e := range eps {
		out = append(out, e.Addr)
	}
	return out
}

func prefixes(n *tailnet.Node) []netip.Prefix {
	var out []netip.Prefix
	for _, a := range []netip.Addr{n.IPv4, n.IPv6} {
		if a.IsValid() {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return out
}

// selfNode is how the node in slot sees itself.
func selfNode(s *tailnet.Snapshot, slot int) *tailcfg.Node {
	n := s.NodeAt(slot)
	view := s.Access().Self(slot)
	out := &tailcfg.Node{
		ID: n.ID, StableID: n.StableID, Name: n.FQDN, User: n.SelfUser(), Key: n.NodeKey, KeyExpiry: n.Expiry, DiscoKey: n.State.DiscoKey,
		Addresses: view.Addresses, AllowedIPs: view.AllowedIPs, PrimaryRoutes: view.PrimaryRoutes, Created: n.Created, Tags: n.Tags,
		HomeDERP: n.State.HomeDERP, Endpoints: endpoints(n), MachineAuthorized: true, CapMap: selfCaps(s, slot), Expired: n.Dead(),
	}
	if out.Expired && out.KeyExpiry.IsZero() {
		out.KeyExpiry = longAgo // the key of a tagged node has no expiry, and only a past one makes the client ask for a login
	}
	if h := n.State.Hostinfo; h != nil {
		own := *tailnet.PeerHostinfo(h)
		own.RoutableIPs, own.RequestTags = h.RoutableIPs, h.RequestTags
		out.Hostinfo = own.View()
	}
	return out
}

// selfCaps adds what every node may do to what the policy gives this one.
func selfCaps(s *tailnet.Snapshot, slot int) tailcfg.NodeCapMap {
	opts := &s.Settings().Options
	caps := tailcfg.NodeCapMap{
		tailcfg.CapabilitySSH:                   nil,
		tailcfg.NodeAttrSSHEnvironmentVariables: nil,
		tailcfg.NodeAttrProbeUDPLifetime:        nil,
		tailcfg.NodeAttrStoreAppCRoutes:         nil,
		tailcfg.NodeAttrSSHBehaviorV1:           nil,
	}
	if opts.Taildrop {
		caps[tailcfg.CapabilityFileSharing] = nil
	}
	if opts.RandomizePort {
		caps[tailcfg.NodeAttrRandomizeClientPort] = nil
	}
	name := opts.DisplayName
	if name == "" {
		name = s.Settings().DNS.BaseDomain
	}
	caps[tailcfg.NodeAttrTailnetDisplayName] = []tailcfg.RawMessage{tailcfg.RawMessage(must(name))}
	caps[tailcfg.NodeAttrDefaultAutoUpdate] = []tailcfg.RawMessage{tailcfg.RawMessage(strconv.FormatBool(opts.AutoUpdate))}
	for k, v := range s.Access().Caps(slot).Map {
		caps[k] = v
	}
	return caps
}

// selfMoved reports whether the node in slot must be told about itself.
func selfMoved(d *tailnet.Delta, slot int) bool {
	old, now := d.From.NodeAt(slot), d.To.NodeAt(slot)
	if d.From.Access() != d.To.Access() {
		a, b := d.From.Access(), d.To.Access()
		if !a.Caps(slot).Equal(b.Caps(slot)) || !a.Self(slot).Equal(b.Self(slot)) {
			return true
		}
	}
	if d.Settings && d.From.Settings().SelfKey() != d.To.Settings().SelfKey() {
		return true
	}
	if old.Node == now.Node {
		return false
	}
	return old.NodeKey != now.NodeKey || old.FQDN != now.FQDN || old.User != now.User || old.IPv4 != now.IPv4 || old.IPv6 != now.IPv6 ||
		!old.Expiry.Equal(now.Expiry) || old.Dead() != now.Dead() || !slices.Equal(old.Tags, now.Tags)
}

// userProfile is what the wire says of a person.
func userProfile(s *tailnet.Snapshot, id tailcfg.UserID) tailcfg.UserProfile {
	if id == tailnet.TaggedUser {
		return tailcfg.UserProfile{ID: id, LoginName: "tagged-devices", DisplayName: "Tagged Devices"}
	}
	u := s.User(id)
	if u == nil {
		return tailcfg.UserProfile{ID: id, LoginName: "unknown-" + strconv.FormatInt(int64(id), 10), DisplayName: "Unknown"}
	}
	p := tailcfg.UserProfile{ID: id, LoginName: tailnet.LoginName(u), DisplayName: u.DisplayName, ProfilePicURL: u.ProfilePicURL}
	if p.DisplayName == "" {
		p.DisplayName = u.Name
	}
	return p
}

// selfProfile is the profile of the node's own user.
func selfProfile(s *tailnet.Snapshot, n *tailnet.Node) tailcfg.UserProfile {
	if !n.Tagged() {
		return userProfile(s, n.User)
	}
	return tailcfg.UserProfile{ID: n.SelfUser(), LoginName: strings.TrimSuffix(n.FQDN, "."), DisplayName: n.GivenName}
}
