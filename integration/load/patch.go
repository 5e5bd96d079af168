package main

import (
	"errors"
	"slices"

	"tailscale.com/tailcfg"
)

var errUnknownNode = errors.New("no viewer was told of this node")

// upgrade does what the stock client does to a received node: an absent
// AllowedIPs means Addresses (capability version 112).
func upgrade(n *tailcfg.Node) {
	if n.AllowedIPs == nil {
		n.AllowedIPs = slices.Clone(n.Addresses)
	}
}

// applyPatch returns was changed by c, or nil when the client ignores c.
// A zero field of a tailcfg.PeerChange means no change.
func applyPatch(was *tailcfg.Node, c *tailcfg.PeerChange) *tailcfg.Node {
	if staleDisco(was, c) {
		return nil
	}
	n := *was
	if c.DERPRegion != 0 {
		n.HomeDERP = c.DERPRegion
	}
	if c.Cap != 0 {
		n.Cap = c.Cap
	}
	if c.Endpoints != nil {
		n.Endpoints = c.Endpoints
	}
	if c.Key != nil {
		n.Key = *c.Key
	}
	if c.DiscoKey != nil {
		n.DiscoKey = *c.DiscoKey
	}
	if c.Online != nil {
		n.Online = c.Online
	}
	if c.LastSeen != nil {
		n.LastSeen = c.LastSeen
	}
	if c.KeyExpiry != nil {
		n.KeyExpiry = *c.KeyExpiry
	}
	if c.KeySignature != nil {
		n.KeySignature = c.KeySignature
	}
	if c.CapMap != nil {
		n.CapMap = c.CapMap
	}
	return &n
}

// staleDisco reports whether clients of v1.98 to v1.102 throw the whole patch
// away: one with a disco key for a node that is offline, and was not seen
// later than they know, counts as older than what they learnt from the peer.
func staleDisco(was *tailcfg.Node, c *tailcfg.PeerChange) bool {
	if c.DiscoKey == nil || c.Online == nil || c.LastSeen == nil || *c.Online {
		return false
	}
	return was.LastSeen != nil && !c.LastSeen.After(*was.LastSeen)
}

// patchify returns what the client holds after it was told the full node n
// while it held was. Clients turn such a message into a patch where they can,
// and then a field that is zero in n stays as it was. ok is false when they
// cannot, and n simply replaces was.
func patchify(was, n *tailcfg.Node) (_ *tailcfg.Node, ok bool) {
	if !equalButPatchable(was, n) {
		return nil, false
	}
	c := &tailcfg.PeerChange{NodeID: n.ID}
	got := *was
	got.Key, got.KeyExpiry, got.KeySignature = n.Key, n.KeyExpiry, n.KeySignature
	got.Endpoints = n.Endpoints
	if n.HomeDERP != 0 {
		got.HomeDERP = n.HomeDERP
	}
	if n.Cap != 0 {
		got.Cap = n.Cap
	}
	got.CapMap = n.CapMap
	if was.Online != nil && n.Online != nil {
		got.Online = n.Online
		if *was.Online != *n.Online {
			c.Online = n.Online
		}
	}
	if was.LastSeen != nil && n.LastSeen != nil {
		got.LastSeen = n.LastSeen
		if !was.LastSeen.Equal(*n.LastSeen) {
			c.LastSeen = n.LastSeen
		}
	}
	if was.DiscoKey != n.DiscoKey {
		c.DiscoKey = &n.DiscoKey
		got.DiscoKey = n.DiscoKey
	}
	if staleDisco(was, c) {
		return was, true
	}
	return &got, true
}

func equalButPatchable(a, b *tailcfg.Node) bool {
	x, y := *a, *b
	for _, n := range []*tailcfg.Node{&x, &y} {
		var zero tailcfg.Node
		n.Key, n.KeyExpiry, n.KeySignature = zero.Key, zero.KeyExpiry, nil
		n.DiscoKey, n.Endpoints, n.HomeDERP = zero.DiscoKey, nil, 0
		n.Cap, n.CapMap, n.Online, n.LastSeen = 0, nil, nil, nil
	}
	return x.Equal(&y)
}
