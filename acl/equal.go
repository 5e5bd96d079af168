package acl

import (
	"maps"
	"slices"

	"tailscale.com/tailcfg"
)

// Hash is a digest of the content.
func (f *Filter) Hash() uint64 { return f.hash }

// Equal compares the rules, order included.
func (f *Filter) Equal(o *Filter) bool {
	return f == o || f.hash == o.hash && slices.EqualFunc(f.Rules, o.Rules, equalRule)
}

func equalRule(a, b tailcfg.FilterRule) bool {
	return equalStrings(a.SrcIPs, b.SrcIPs) && slices.Equal(a.IPProto, b.IPProto) &&
		slices.EqualFunc(a.DstPorts, b.DstPorts, func(x, y tailcfg.NetPortRange) bool {
			return x.IP == y.IP && x.Ports == y.Ports
		}) &&
		slices.EqualFunc(a.CapGrant, b.CapGrant, func(x, y tailcfg.CapGrant) bool {
			return slices.Equal(x.Dsts, y.Dsts) && slices.Equal(x.Caps, y.Caps) &&
				maps.EqualFunc(x.CapMap, y.CapMap, slices.Equal[[]tailcfg.RawMessage])
		})
}

// equalStrings is slices.Equal with a short cut for shared backing arrays,
// which is the usual case for rendered sources.
func equalStrings(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	return len(a) == 0 || &a[0] == &b[0] || slices.Equal(a, b)
}

// Hash is a digest of the content, policy lines excepted.
func (s *SSH) Hash() uint64 { return s.hash }

// Equal compares the rules with their check periods. The policy line does not
// count, so that moving a rule in the text changes nothing.
func (s *SSH) Equal(o *SSH) bool {
	return s == o || s.hash == o.hash && slices.EqualFunc(s.Rules, o.Rules, equalSSHRule)
}

func equalSSHRule(a, b SSHRule) bool {
	return a.Check == b.Check && a.CheckAlways == b.CheckAlways && a.CheckPeriod == b.CheckPeriod &&
		maps.Equal(a.SSHUsers, b.SSHUsers) && slices.Equal(a.AcceptEnv, b.AcceptEnv) &&
		equalPrincipals(a.Principals, b.Principals) &&
		equalSSHAction(a.Action, b.Action) && equalSSHAction(a.Accepted, b.Accepted)
}

func equalPrincipals(a, b []*tailcfg.SSHPrincipal) bool {
	if len(a) == len(b) && len(a) > 0 && &a[0] == &b[0] {
		return true
	}
	return slices.EqualFunc(a, b, func(x, y *tailcfg.SSHPrincipal) bool { return x.NodeIP == y.NodeIP })
}

func equalSSHAction(a, b *tailcfg.SSHAction) bool {
	x, y := *a, *b
	if !slices.Equal(x.Recorders, y.Recorders) {
		return false
	}
	if (x.OnRecordingFailure == nil) != (y.OnRecordingFailure == nil) ||
		x.OnRecordingFailure != nil && *x.OnRecordingFailure != *y.OnRecordingFailure {
		return false
	}
	return x.Accept == y.Accept && x.HoldAndDelegate == y.HoldAndDelegate &&
		x.AllowAgentForwarding == y.AllowAgentForwarding &&
		x.AllowLocalPortForwarding == y.AllowLocalPortForwarding &&
		x.AllowRemotePortForwarding == y.AllowRemotePortForwarding
}

// Hash is a digest of the content.
func (c *Caps) Hash() uint64 { return c.hash }

// Equal compares the capabilities and their values.
func (c *Caps) Equal(o *Caps) bool {
	return c == o || c.hash == o.hash && maps.EqualFunc(c.Map, o.Map, slices.Equal[[]tailcfg.RawMessage])
}

// Equal compares the content.
func (v *PeerView) Equal(o *PeerView) bool {
	return v == o || slices.Equal(v.AllowedIPs, o.AllowedIPs) && slices.Equal(v.PrimaryRoutes, o.PrimaryRoutes) &&
		maps.EqualFunc(v.CapMap, o.CapMap, slices.Equal[[]tailcfg.RawMessage])
}

// Equal compares the content.
func (v *SelfView) Equal(o *SelfView) bool {
	return v == o || slices.Equal(v.Addresses, o.Addresses) && slices.Equal(v.AllowedIPs, o.AllowedIPs) &&
		slices.Equal(v.PrimaryRoutes, o.PrimaryRoutes)
}

// Hash is a digest of the content.
func (v *PeerViews) Hash() uint64 { return v.hash }

// Equal compares the content.
func (v *PeerViews) Equal(o *PeerViews) bool {
	return v == o || v.hash == o.hash && v.NoIPv4 == o.NoIPv4 && slices.Equal(v.Slots, o.Slots) &&
		slices.EqualFunc(v.Peers, o.Peers, (*PeerView).Equal)
}
