package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/c2n"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// maxMisses is how many probes in a row a router may leave unanswered until it is unhealthy.
const maxMisses = 2

// probes is what this server remembers of the routers that it probes.
type probes struct {
	misses map[tailcfg.NodeID]int // owned by watchRouters
}

// watchRouters probes the routers that share a route and have their stream here, until ctx ends. A machine that hangs keeps its connections
// open: without probes its silence is noticed when TCP gives up, minutes later.
func (s *Server) watchRouters(ctx context.Context) error {
	if s.cfg.ProbeInterval < 0 {
		return nil
	}
	tick := time.NewTicker(s.cfg.ProbeInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		round, cancel := context.WithTimeout(ctx, s.cfg.ProbeTimeout)
		s.probeRouters(ctx, round)
		cancel()
	}
}

// probeRouters is one round of probes, which ends with the context round at the latest. Who has fallen silent or is back becomes a row, and
// so a revision: all servers agree on it.
func (s *Server) probeRouters(ctx, round context.Context) {
	snap := s.cfg.Replica.Current()
	shared := sharedRouters(snap)
	results := s.probeAll(round, shared)
	if ctx.Err() != nil {
		return // the round was cut short
	}
	misses := map[tailcfg.NodeID]int{}
	news := map[tailcfg.NodeID]verdict{}
	for id, err := range results {
		switch {
		case err == nil:
			news[id] = verdict{false, "it answers"}
		case errors.Is(err, c2n.ErrOffline), errors.Is(err, c2n.ErrUnknownNode):
		default:
			if misses[id] = s.probes.misses[id] + 1; misses[id] >= maxMisses {
				news[id] = verdict{true, fmt.Sprintf("%d probes without an answer", misses[id])}
			}
		}
	}
	s.probes.misses = misses
	for _, n := range snap.Nodes() {
		// What is not probed counts as well: nobody would notice that it is.
		if n != nil && n.State.Unhealthy && (!n.State.Online || !shared[n.ID]) {
			news[n.ID] = verdict{false, "it is not probed any more"}
		}
	}
	maps.DeleteFunc(news, func(id tailcfg.NodeID, v verdict) bool {
		n := snap.Node(id)
		return n == nil || n.State.Unhealthy == v.unhealthy
	})
	if len(news) > 0 {
		s.noteHealth(ctx, news)
	}
}

// sharedRouters are the online routers of routes that another online router serves too.
func sharedRouters(snap *tailnet.Snapshot) map[tailcfg.NodeID]bool {
	out := map[tailcfg.NodeID]bool{}
	for _, list := range routers(snap) {
		list = slices.DeleteFunc(list, func(n *tailnet.Node) bool { return !n.State.Online })
		if len(list) < 2 {
			continue
		}
		for _, n := range list {
			out[n.ID] = true
		}
	}
	return out
}

// probeAll probes those of the nodes whose stream is here and has brought them a map.
func (s *Server) probeAll(round context.Context, nodes map[tailcfg.NodeID]bool) map[tailcfg.NodeID]error {
	var mu sync.Mutex // guards results
	results := map[tailcfg.NodeID]error{}
	var all sync.WaitGroup
	for id := range nodes {
		if !s.Poll.Told(id) {
			continue
		}
		all.Go(func() {
			err := s.C2N.Probe(round, id)
			mu.Lock()
			defer mu.Unlock()
			results[id] = err
		})
	}
	all.Wait()
	return results
}

// verdict is the health of a node and why it is that.
type verdict struct {
	unhealthy bool
	reason    string
}

// noteHealth writes what is news. A node that another server holds by now is that one's business.
func (s *Server) noteHealth(ctx context.Context, news map[tailcfg.NodeID]verdict) {
	ids := slices.Sorted(maps.Keys(news))
	s.do(ctx, "note the health of routers", func(tx *db.Tx) error {
		recs, err := tx.NodesByID(ids)
		if err != nil {
			return err
		}
		for _, id := range ids {
			rec, v := recs[id], news[id]
			if rec == nil || rec.State.Unhealthy == v.unhealthy || rec.State.Online && rec.State.Instance != s.cfg.Instance.ID || !rec.State.Online && v.unhealthy {
				continue
			}
			if err := tx.SetUnhealthy(id, v.unhealthy); err != nil {
				return err
			}
			action := "node.healthy"
			if v.unhealthy {
				action = "node.unhealthy"
			}
			if err := tx.Audit(action, fmt.Sprintf("node:%d", id), nil, map[string]string{"name": rec.GivenName, "reason": v.reason}); err != nil {
				return err
			}
		}
		return nil
	})
}
