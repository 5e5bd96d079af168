package control

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// electPrimaries keeps a living router in front of every prefix that several routers serve. The default, the router with the lowest id, needs
// no row; a row is written when another has to stand in, and stays while that one is well, so that routes do not flap.
func (s *Server) electPrimaries(ctx context.Context) {
	snap := s.cfg.Replica.Current()
	routers := map[netip.Prefix][]*tailnet.Node{}
	for _, n := range snap.Nodes() {
		if n == nil || n.Dead() {
			continue
		}
		for _, r := range n.Routes() {
			if r.Bits() > 0 {
				routers[r] = append(routers[r], n)
			}
		}
	}
	rows, via := snap.ACLTailnet().Primaries, snap.Access().ViaGroups()
	set, drop := map[netip.Prefix]standIn{}, []netip.Prefix{}
	for prefix, list := range routers {
		groups := [][]*tailnet.Node{list}
		for _, slots := range via {
			if g := among(list, slots); len(g) > 1 {
				groups = append(groups, g)
			}
		}
		if c, ok := choose(groups, rows[prefix]); ok {
			set[prefix] = c
		}
	}
	for prefix := range rows {
		if len(routers[prefix]) == 0 {
			drop = append(drop, prefix)
		}
	}
	if len(set) == 0 && len(drop) == 0 {
		return
	}
	s.do(ctx, "elect primary routers", func(tx *db.Tx) error {
		now, err := tx.Primaries()
		if err != nil {
			return err
		}
		for prefix, c := range set {
			// Another server may have seen the same, and a router may be back.
			if rec, err := tx.Node(c.gone); now[prefix] != rows[prefix] || err == nil && rec.State.Online {
				continue
			} else if err != nil && !errors.Is(err, db.ErrNotFound) {
				return err
			}
			if rec, err := tx.Node(c.next); err != nil || !rec.State.Online {
				continue
			}
			if err := tx.SetPrimary(prefix, c.next); err != nil {
				return err
			}
		}
		for _, prefix := range drop {
			if err := tx.DeletePrimary(prefix); err != nil {
				return err
			}
		}
		return nil
	})
}

func among(list []*tailnet.Node, slots []int) (out []*tailnet.Node) {
	for _, n := range list {
		if _, ok := slices.BinarySearch(slots, n.Slot); ok {
			out = append(out, n)
		}
	}
	return out
}

// standIn is a router that takes the place of another.
type standIn struct{ gone, next tailcfg.NodeID }

// choose looks for a router that has to stand in. Each group elects for itself, all routers of a prefix and those that a grant steers to with
// via: the router of the row, if it is a member, else the first. As a prefix has one row for all of them, a change has to leave fewer groups
// with a router that is gone, whatever it does to the order; so it is never taken back without need.
func choose(groups [][]*tailnet.Node, row tailcfg.NodeID) (c standIn, ok bool) {
	lost, gone := dark(groups, row)
	if lost == 0 {
		return c, false
	}
	for _, n := range groups[0] {
		if !n.State.Online {
			continue
		}
		if left, _ := dark(groups, n.ID); left < lost {
			lost, c, ok = left, standIn{gone, n.ID}, true
		}
	}
	return c, ok
}

// dark counts the groups that would elect an offline router although another is online, and returns the first such router.
func dark(groups [][]*tailnet.Node, row tailcfg.NodeID) (count int, gone tailcfg.NodeID) {
	for _, g := range groups {
		cur := g[0]
		if i := slices.IndexFunc(g, func(n *tailnet.Node) bool { return n.ID == row }); i >= 0 {
			cur = g[i]
		}
		if cur.State.Online || !slices.ContainsFunc(g, func(n *tailnet.Node) bool { return n.State.Online }) {
			continue
		}
		if count++; count == 1 {
			gone = cur.ID
		}
	}
	return count, gone
}
