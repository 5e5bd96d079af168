package control

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/register"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// What an administrator is warned of: this much of a pool in percent, this many nodes of one user.
const (
	poolAlarm = 80
	userAlarm = 200
)

// alarms says what grows towards a limit, or beyond what one would expect, by what it is about.
func alarms(s *tailnet.Snapshot, pools db.Pools) map[string]string {
	out := map[string]string{}
	nodes, of := 0, map[tailcfg.UserID]int{}
	for _, n := range s.Nodes() {
		if n == nil {
			continue
		}
		nodes++
		if !n.Tagged() {
			of[n.User]++
		}
	}
	for _, pool := range []netip.Prefix{pools.IPv4, pools.IPv6} {
		if use := register.PoolUse(pool, nodes); use >= poolAlarm {
			out[pool.String()] = fmt.Sprintf("%.0f %% of the address pool %v are taken; at 95 %% new devices are refused", use, pool)
		}
	}
	for id, n := range of {
		if n < userAlarm {
			continue
		}
		name := fmt.Sprint(id)
		if u := s.User(id); u != nil {
			name = u.Name
		}
		out[fmt.Sprintf("user:%d", id)] = fmt.Sprintf("the user %s has %d devices", name, n)
	}
	return out
}

// warn logs each alarm when it begins.
func (s *Server) warn() {
	now, held := alarms(s.cfg.Replica.Current(), s.cfg.Pools), map[string]bool{}
	for _, about := range slices.Sorted(maps.Keys(now)) {
		if held[about] = true; !s.alarms[about] {
			s.log.Warn(now[about])
		}
	}
	s.alarms = held
}
