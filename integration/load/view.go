package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"tailscale.com/tailcfg"
)

// view is what one client knows in one map session. It starts empty with each
// session, and messages are applied to it as the stock client applies them.
// Not safe for concurrent use.
type view struct {
	book     *book
	peers    []*peer // by slot; nil = not visible
	count    int
	self     *tailcfg.Node
	domain   string
	derpMap  bool
	profiles map[tailcfg.UserID]bool // never deleted from, as in the client
	filters  map[string]*filter

	// touched is called with every peer state that a message brought, also
	// when it equals the old one. Nil peer = removed.
	touched func(slot int, p *peer)
	// fault is called for what the stock client would silently drop or
	// stumble over.
	fault func(kind, format string, args ...any)
}

func newView(b *book) *view {
	return &view{
		book:     b,
		profiles: map[tailcfg.UserID]bool{},
		touched:  func(int, *peer) {},
		fault:    func(string, string, ...any) {},
	}
}

// apply changes v by one message. The order is the client's: user profiles
// are read after the peers there, but a profile that comes with its peer is in
// time, so they go first here.
func (v *view) apply(m *message, now time.Time) error {
	if m.keepAlive {
		return nil
	}
	if v.self == nil && m.node == nil {
		return fmt.Errorf("first message without Node: the client ends the session")
	}
	if m.node != nil {
		n := new(tailcfg.Node)
		if err := json.Unmarshal(m.node, n); err != nil {
			return fmt.Errorf("own node: %w", err)
		}
		upgrade(n)
		v.self = n
		v.book.slot(n.ID, n.Key)
	}
	for _, ids := range m.profiles {
		for _, id := range ids {
			v.profiles[id] = true
		}
	}
	if m.domain != "" {
		v.domain = m.domain
	}
	v.derpMap = v.derpMap || m.derpMap
	v.applyPeers(m, now)
	v.applyFilters(m)
	return nil
}

func (v *view) applyPeers(m *message, now time.Time) {
	if len(m.peers) > 0 {
		v.replace(m.peers)
		return
	}
	// The client turns full nodes into patches before it applies anything, so
	// these follow from what it held before the removals.
	next := make([]*peer, len(m.changed))
	for i, p := range m.changed {
		next[i] = p
		if base := v.at(p.slot); base != nil {
			next[i] = v.book.derive(base, nil, p)
		}
	}
	for _, id := range m.removed {
		slot, ok := v.book.known(id)
		if !ok || v.at(slot) == nil {
			v.fault("unknown node removed", "PeersRemoved %d, which the viewer does not have", id)
			continue
		}
		v.set(slot, nil)
	}
	for i, p := range m.changed {
		if slices.Contains(m.removed, p.node.ID) && next[i] != p {
			v.fault("patch of an unknown node", "node %d removed and changed in one message; the client drops it", p.node.ID)
			continue
		}
		v.checkProfile(p)
		v.set(p.slot, next[i])
	}
	for id, seen := range m.seen {
		v.mutate("PeerSeenChange", id, func(n *tailcfg.Node) {
			n.LastSeen = nil
			if seen {
				n.LastSeen = &now
			}
		})
	}
	for id, online := range m.online {
		v.mutate("OnlineChange", id, func(n *tailcfg.Node) { n.Online = &online })
	}
	for _, p := range m.patches {
		var base *peer
		if p.slot >= 0 {
			base = v.at(p.slot)
		}
		if base == nil {
			v.fault("patch of an unknown node", "PeersChangedPatch for node %d, which the viewer does not have; the client drops it", p.change.NodeID)
			continue
		}
		next := v.book.derive(base, p, nil)
		if next == base {
			v.fault("patch ignored", "PeersChangedPatch for node %d: a disco key with an old LastSeen; the client drops it", p.change.NodeID)
		}
		v.set(p.slot, next)
	}
}

// replace applies a full list, which precludes all other peer fields.
func (v *view) replace(list []*peer) {
	keep := make([]bool, len(v.peers))
	for _, p := range list {
		next := p
		if base := v.at(p.slot); base != nil && olderDisco(base.node, p.node) {
			n := *p.node
			n.DiscoKey, n.LastSeen = base.node.DiscoKey, base.node.LastSeen
			next = &peer{node: &n, slot: p.slot}
		}
		v.checkProfile(p)
		v.set(p.slot, next)
		for len(keep) < len(v.peers) {
			keep = append(keep, false)
		}
		keep[p.slot] = true
	}
	for slot := range v.peers {
		if v.peers[slot] != nil && !keep[slot] {
			v.set(slot, nil)
		}
	}
}

// olderDisco reports whether the client keeps the disco key it has although a
// full list says another: the node is offline and was not seen since.
func olderDisco(was, n *tailcfg.Node) bool {
	if n.DiscoKey.IsZero() || was.DiscoKey == n.DiscoKey || was.LastSeen == nil {
		return false
	}
	if n.Online != nil && *n.Online {
		return false
	}
	return n.LastSeen == nil || !n.LastSeen.After(*was.LastSeen)
}

func (v *view) mutate(what string, id tailcfg.NodeID, change func(*tailcfg.Node)) {
	slot, ok := v.book.known(id)
	if !ok || v.at(slot) == nil {
		v.fault("patch of an unknown node", "%s for node %d, which the viewer does not have; the client drops it", what, id)
		return
	}
	n := *v.peers[slot].node
	change(&n)
	v.set(slot, &peer{node: &n, slot: slot})
}

func (v *view) at(slot int) *peer {
	if slot >= len(v.peers) {
		return nil
	}
	return v.peers[slot]
}

func (v *view) set(slot int, p *peer) {
	for slot >= len(v.peers) {
		v.peers = append(v.peers, nil)
	}
	switch old := v.peers[slot]; {
	case old == nil && p != nil:
		v.count++
	case old != nil && p == nil:
		v.count--
	}
	v.peers[slot] = p
	v.touched(slot, p)
}

func (v *view) checkProfile(p *peer) {
	for _, u := range [2]tailcfg.UserID{p.node.User, p.node.Sharer} {
		if u != 0 && !v.profiles[u] {
			v.fault("user profile missing", "node %d (%s) shown before the profile of its user %d", p.node.ID, p.node.Name, u)
		}
	}
}

// applyFilters keeps the sticky map of named filters: "*": null clears it
// before the rest of the message is applied, null deletes one name.
func (v *view) applyFilters(m *message) {
	if m.filters == nil {
		return
	}
	if f, ok := m.filters["*"]; ok && f == nil {
		v.filters = nil
	}
	for name, f := range m.filters {
		switch {
		case name == "*":
		case f == nil:
			delete(v.filters, name)
		default:
			if v.filters == nil {
				v.filters = map[string]*filter{}
			}
			v.filters[name] = f
		}
	}
}

// namesPort reports whether some rule of the whole filter names this port.
func (v *view) namesPort(port uint16) bool {
	for _, f := range v.filters {
		if f.namesPort(port) {
			return true
		}
	}
	return false
}
