package control

import (
	"context"
	"net/netip"
	"slices"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// routers are the living routers of each route, by id. Exit nodes are not among them: clients choose those by themselves.
func routers(snap *tailnet.Snapshot) map[netip.Prefix][]*tailnet.Node {
	out := map[netip.Prefix][]*tailnet.Node{}
	for _, n := range snap.Nodes() {
		if n == nil || n.Dead() {
			continue
		}
		for _, r := range n.Routes() {
			if r.Bits() > 0 {
				out[r] = append(out[r], n)
			}
		}
	}
	return out
}

// electPrimaries keeps a router that works in front of every prefix that several routers serve. The default, the router with the lowest id,
// needs no row; a row is written when another has to stand in, and stays while that one is well, so that routes do not flap.
func (s *Server) electPrimaries(ctx context.Context) {
	snap := s.cfg.Replica.Current()
	routers := routers(snap)
	rows, via := snap.ACLTailnet().Primaries, snap.Access().ViaGroups()
	due, drop := map[netip.Prefix][][]*tailnet.Node{}, []netip.Prefix{}
	for prefix, list := range routers {
		groups := [][]*tailnet.Node{list}
		for _, slots := range via {
			if g := among(list, slots); len(g) > 1 {
				groups = append(groups, g)
			}
		}
		if _, ok := choose(groups, rows[prefix]); ok {
			due[prefix] = groups
		}
	}
	for prefix := range rows {
		if len(routers[prefix]) == 0 {
			drop = append(drop, prefix)
		}
	}
	if len(due) == 0 && len(drop) == 0 {
		return
	}
	s.do(ctx, "elect primary routers", func(tx *db.Tx) error {
		now, err := tx.Primaries()
		if err != nil {
			return err
		}
		for prefix, groups := range due {
			if now[prefix] != rows[prefix] {
				continue // another server has seen the same
			}
			// A router may be back, or gone.
			groups, err := stored(tx, groups)
			if err != nil {
				return err
			}
			if next, ok := choose(groups, rows[prefix]); ok {
				if err := tx.SetPrimary(prefix, next); err != nil {
					return err
				}
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

// stored is the groups as the database has their members now.
func stored(tx *db.Tx, groups [][]*tailnet.Node) ([][]*tailnet.Node, error) {
	var ids []tailcfg.NodeID
	for _, n := range groups[0] {
		ids = append(ids, n.ID)
	}
	recs, err := tx.NodesByID(ids)
	if err != nil {
		return nil, err
	}
	out := make([][]*tailnet.Node, len(groups))
	for i, g := range groups {
		for _, n := range g {
			if rec := recs[n.ID]; rec != nil {
				out[i] = append(out[i], &tailnet.Node{Node: rec, Slot: n.Slot})
			}
		}
	}
	return out, nil
}

// fitness says how well a router can serve: best is one that is online and not known to be silent.
func fitness(n *tailnet.Node) int {
	switch {
	case !n.State.Online:
		return 0
	case n.State.Unhealthy:
		return 1
	}
	return 2
}

// choose looks for a router that has to stand in. Each group elects for itself, all routers of a prefix and those that a grant steers to with
// via: the router of the row, if it is a member, else the first. As a prefix has one row for all of them, a change has to make the groups'
// routers fitter on the whole, whatever it does to the order; so it is never taken back without need.
func choose(groups [][]*tailnet.Node, row tailcfg.NodeID) (next tailcfg.NodeID, ok bool) {
	lost := lack(groups, row)
	if lost == 0 {
		return 0, false
	}
	for _, n := range groups[0] {
		if !n.State.Online {
			continue
		}
		if left := lack(groups, n.ID); left < lost {
			lost, next, ok = left, n.ID, true
		}
	}
	return next, ok
}

// lack sums up how much fitter than its router each group's fittest member is.
func lack(groups [][]*tailnet.Node, row tailcfg.NodeID) (sum int) {
	for _, g := range groups {
		if len(g) == 0 {
			continue
		}
		cur, best := g[0], 0
		for _, n := range g {
			if n.ID == row {
				cur = n
			}
			best = max(best, fitness(n))
		}
		sum += best - fitness(cur)
	}
	return sum
}
