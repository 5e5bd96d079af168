package db

import (
	"net/netip"
	"slices"
)

// spares are addresses that were found free together with one that was asked
// for. They stay free while nobody else writes to the tailnet: at any other
// revision than the one that they are known for, they are forgotten. The
// transaction that holds the tailnet's lock owns them.
type spares struct {
	tailnet  TailnetID
	revision Revision
	pools    Pools
	free     [2][]netip.Addr // IPv4, IPv6, in the order in which they are given out
}

// first is the first address of a family that is free in the pools; invalid
// when none is known.
func (s *spares) first(p Pools, family int) netip.Addr {
	if s.pools != p || len(s.free[family]) == 0 {
		return netip.Addr{}
	}
	return s.free[family][0]
}

// keep remembers what was found free in the pools.
func (s *spares) keep(p Pools, family int, free []netip.Addr) {
	if s.pools != p {
		s.pools, s.free = p, [2][]netip.Addr{}
	}
	s.free[family] = free
}

// created notes the addresses of a new node. After one that it did not get from
// here, the next ones are those after its own.
func (s *spares) created(addrs ...netip.Addr) {
	for i, a := range addrs {
		if len(s.free[i]) > 0 && s.free[i][0] == a {
			s.free[i] = s.free[i][1:]
		} else if a.IsValid() {
			s.free[i] = nil
		}
	}
}

// taken forgets addresses that a node has now.
func (s *spares) taken(addrs ...netip.Addr) {
	for i := range s.free {
		s.free[i] = slices.DeleteFunc(s.free[i], func(a netip.Addr) bool { return slices.Contains(addrs, a) })
	}
}
