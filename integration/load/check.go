package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"tailscale.com/tailcfg"
)

// wrong says how p differs from what is true, "" when it does not.
func (p *peer) wrong(f *fact) string {
	if p.right.Load() == f.version {
		return ""
	}
	if why := differs(p.node, f); why != "" {
		return why
	}
	p.right.Store(f.version)
	return ""
}

func differs(n *tailcfg.Node, f *fact) string {
	switch {
	case n.Key != f.key:
		return "node key"
	case n.DiscoKey != f.disco:
		return fmt.Sprintf("disco key %v", n.DiscoKey.ShortString())
	case !slices.Equal(n.Endpoints, f.endpoints):
		return fmt.Sprintf("endpoints %v, want %v", n.Endpoints, f.endpoints)
	case n.HomeDERP != f.derp:
		return fmt.Sprintf("home DERP %d, want %d", n.HomeDERP, f.derp)
	case n.Online == nil:
		return "online unknown"
	case *n.Online != f.online:
		return fmt.Sprintf("online %v, want %v", *n.Online, f.online)
	case !strings.HasPrefix(n.Name, f.hostname+"."):
		return fmt.Sprintf("name %q, want host %q", n.Name, f.hostname)
	case n.Cap != capability:
		return fmt.Sprintf("capability version %d, want the peer's own %d", n.Cap, capability)
	case n.Expired:
		return "expired"
	case !n.MachineAuthorized:
		return "not authorized"
	case len(n.Addresses) == 0:
		return "no addresses"
	case f.self == nil:
		return ""
	case n.Name != f.self.Name:
		return fmt.Sprintf("name %q, the node itself has %q", n.Name, f.self.Name)
	case n.ID != f.self.ID || n.StableID != f.self.StableID:
		return fmt.Sprintf("ID %d %s, the node itself has %d %s", n.ID, n.StableID, f.self.ID, f.self.StableID)
	case !slices.Equal(n.Tags, f.self.Tags) || n.User != ownerShown(f.self):
		return fmt.Sprintf("user %d tags %v, the node itself has %d %v", n.User, n.Tags, f.self.User, f.self.Tags)
	case !slices.Equal(n.Addresses, f.self.Addresses):
		return fmt.Sprintf("addresses %v, the node itself has %v", n.Addresses, f.self.Addresses)
	case !slices.Equal(n.AllowedIPs, f.self.AllowedIPs):
		return fmt.Sprintf("allowed IPs %v, the node itself has %v", n.AllowedIPs, f.self.AllowedIPs)
	}
	return ""
}

// taggedUser owns the tagged nodes that peers see, under the number that
// Headscale uses.
const taggedUser tailcfg.UserID = 2147455555

// ownerShown is the user that a node's peers must see as its owner. To itself
// a tagged node belongs to a user of its own, or clients would take all tagged
// nodes for those of one person.
func ownerShown(self *tailcfg.Node) tailcfg.UserID {
	if len(self.Tags) > 0 {
		return taggedUser
	}
	return self.User
}

// mismatch finds the first thing wrong with a client's view, beginning at peer
// from: a view that lacks one peer mostly still lacks it when asked again.
// Caller holds c.viewMu.
func (f *fleet) mismatch(c *client, from int) (peer int, why string) {
	if c.halted.Load() {
		return 0, "" // we keep it away: it has no view that could be wrong
	}
	v := c.view
	if v == nil || !c.full {
		return from, "no map"
	}
	n := len(f.clients)
	for k := range n {
		j := (from + k) % n
		if j == c.index {
			continue
		}
		p := v.at(j)
		switch sees := f.sees[c.index].has(j); {
		case p == nil && sees:
			return j, "missing"
		case p != nil && !sees:
			return j, "visible against the policy"
		case p != nil:
			if why := p.wrong(f.clients[j].fact.Load()); why != "" {
				return j, why
			}
		}
	}
	for slot := n; slot < len(v.peers); slot++ {
		if v.peers[slot] != nil {
			return slot, fmt.Sprintf("a node that is none of ours: %s", v.peers[slot].node.Name)
		}
	}
	return 0, f.ownMismatch(c)
}

// ownMismatch checks what the client knows of itself.
func (f *fleet) ownMismatch(c *client) string {
	n := c.view.self
	switch {
	case n == nil:
		return "no own node"
	case n.Key != c.node.Public():
		return "own node has another key"
	case !strings.HasPrefix(n.Name, c.hostname+"."):
		return fmt.Sprintf("own name %q, want host %q", n.Name, c.hostname)
	case len(n.Addresses) == 0 || !n.MachineAuthorized || n.Expired:
		return fmt.Sprintf("own node unusable: addresses %v, authorized %v, expired %v", n.Addresses, n.MachineAuthorized, n.Expired)
	case n.User == taggedUser:
		return "own node belongs to the user of tagged peers"
	case !c.view.derpMap:
		return "no DERP map"
	case !c.view.profiles[n.User]:
		return fmt.Sprintf("no profile of the own user %d", n.User)
	}
	return ""
}

// settle waits until all sampled views are right. It returns the time of the
// last message that any of them needed, and how many are still wrong when ctx
// ends.
func (f *fleet) settle(ctx context.Context) (at time.Time, wrong int) {
	type pending struct {
		c    *client
		from int
	}
	var todo []*pending
	for _, c := range f.clients[:f.sample] {
		todo = append(todo, &pending{c, 0})
	}
	for {
		left := todo[:0]
		for _, p := range todo {
			p.c.viewMu.Lock()
			from, why := f.mismatch(p.c, p.from)
			changed := p.c.changedAt
			p.c.viewMu.Unlock()
			if why != "" {
				p.from = min(from, len(f.clients)-1)
				left = append(left, p)
			} else if changed.After(at) {
				at = changed
			}
		}
		todo = left
		if len(todo) == 0 {
			return at, 0
		}
		if !pause(ctx, 10*time.Millisecond) {
			return at, len(todo)
		}
	}
}

// verify checks every sampled view as it is now and counts what is wrong. It
// returns the number of clients with a wrong view.
func (f *fleet) verify(phase string) int {
	wrong := 0
	addrs := map[netip.Prefix]int{}
	for _, c := range f.clients[:f.sample] {
		c.viewMu.Lock()
		at, why := f.mismatch(c, 0)
		var own []netip.Prefix
		if c.view != nil && c.view.self != nil {
			own = c.view.self.Addresses
		}
		c.viewMu.Unlock()
		if why != "" {
			wrong++
			f.faults.add("wrong view", "after %s: client %d, peer %d: %s", phase, c.index, at, why)
		}
		for _, a := range own {
			if other, dup := addrs[a]; dup {
				f.faults.add("address given twice", "%v: clients %d and %d", a, other, c.index)
			}
			addrs[a] = c.index
		}
	}
	f.verifyFilters(phase)
	return wrong
}

// maxFilterViews bounds how many packet filters verify evaluates.
const maxFilterViews = 100

// verifyFilters asks the packet filters of some clients about every visible
// peer and every port that the policy names.
func (f *fleet) verifyFilters(phase string) {
	step := max(1, f.sample/maxFilterViews)
	for i := 0; i < f.sample; i += step {
		c := f.clients[i]
		c.viewMu.Lock()
		if c.view != nil && c.view.self != nil && len(c.view.self.Addresses) > 0 {
			f.verifyFilter(phase, c)
		}
		c.viewMu.Unlock()
	}
}

func (f *fleet) verifyFilter(phase string, c *client) {
	for _, port := range f.scenario.ports() {
		var number uint16
		fmt.Sscan(port, &number)
		for j := range f.clients {
			p := c.view.at(j)
			if p == nil {
				continue
			}
			for k := range min(len(p.node.Addresses), len(c.view.self.Addresses)) {
				src, dst := p.node.Addresses[k].Addr(), c.view.self.Addresses[k].Addr()
				want := f.scenario.allows(j, c.index, port)
				if got := c.view.allows(src, dst, number); got != want {
					f.faults.add("wrong packet filter", "after %s: client %d lets %d (%v) reach %v port %s: %v, the policy says %v",
						phase, c.index, j, src, dst, port, got, want)
				}
			}
		}
	}
}

// allows reports whether TCP from src to dst:port passes the whole filter.
func (v *view) allows(src, dst netip.Addr, port uint16) bool {
	for _, part := range v.filters {
		if part.allows(src, dst, port) {
			return true
		}
	}
	return false
}
