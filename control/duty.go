package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// system is who acts when nobody asked.
var system = db.Actor{Kind: "system"}

// dutyEvery is how often due dates are looked at.
const dutyEvery = time.Second

// jump is a step of the wall clock after which expiry waits: one bad time server must not log everybody out.
const (
	jump     = 5 * time.Minute
	jumpWait = 10 * time.Minute
)

// duties turns due dates into revisions until ctx ends. Each is written so that any server may do it, and doing it twice changes nothing.
func (s *Server) duties(ctx context.Context) error {
	tick := time.NewTicker(dutyEvery)
	defer tick.Stop()
	s.beat(ctx)
	last, lastWall := time.Now(), s.cfg.Now()
	var resume time.Time // of expiry, after a jump; by the monotonic clock
	var sweep int
	for {
		news := s.cfg.Replica.Announced()
		s.approveRoutes(ctx)
		s.electPrimaries(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-news:
			continue
		case <-tick.C:
		}
		now, wall := time.Now(), s.cfg.Now()
		if off := wall.Round(0).Sub(lastWall.Round(0)) - now.Sub(last); off.Abs() > jump {
			s.log.Error("the clock jumped; key expiry waits", "by", off, "wait", jumpWait)
			resume = now.Add(jumpWait)
		}
		last, lastWall = now, wall
		if now.After(resume) {
			s.expire(ctx, wall)
			s.removeEphemeral(ctx, wall)
		}
		if sweep++; sweep%5 == 0 {
			s.probe(ctx)
		}
		if sweep%int(beatEvery/dutyEvery) == 0 {
			s.beat(ctx)
			s.reap(ctx, wall)
		}
		if sweep%60 == 0 {
			s.sweep(ctx)
			s.warn()
		}
	}
}

func (s *Server) do(ctx context.Context, what string, fn func(*db.Tx) error) {
	_, err := s.cfg.Ledger.DoWait(ctx, system, fn)
	if err != nil && !errors.Is(err, db.ErrNotFound) && ctx.Err() == nil {
		s.log.Error(what, "err", err)
	}
}

// probe looks at the database: after a fault the storage takes writes again only when it was found whole.
func (s *Server) probe(ctx context.Context) {
	look, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err := s.cfg.Store.Healthy(look)
	if err != nil && ctx.Err() == nil && !s.sick {
		s.log.Error("the database is not well; writes are refused", "err", err)
	} else if err == nil && s.sick {
		s.log.Info("the database is well again")
	}
	s.sick = err != nil
}

// A date is when a duty has something to do next, as far as one snapshot tells. It saves looking at every node every second.
type date struct {
	snap *tailnet.Snapshot
	at   time.Time // zero when there is nothing to come
}

// come reports whether it is time to look: at the date, and when there is another snapshot.
func (d *date) come(snap *tailnet.Snapshot, now time.Time) bool {
	return d.snap != snap || !d.at.IsZero() && !now.Before(d.at)
}

// include brings the date forward to at.
func (d *date) include(at time.Time) {
	if d.at.IsZero() || at.Before(d.at) {
		d.at = at
	}
}

// expire marks nodes whose key has ended.
func (s *Server) expire(ctx context.Context, now time.Time) {
	snap := s.cfg.Replica.Current()
	if !s.nextExpiry.come(snap, now) {
		return
	}
	s.nextExpiry = date{snap: snap}
	var due []tailcfg.NodeID
	for _, n := range snap.Nodes() {
		if n == nil || n.Expired || n.Expiry.IsZero() {
			continue
		}
		s.nextExpiry.include(n.Expiry)
		if !n.Expiry.After(now) {
			due = append(due, n.ID)
		}
	}
	if len(due) == 0 {
		return
	}
	s.do(ctx, "expire nodes", func(tx *db.Tx) error {
		for _, id := range due {
			rec, err := tx.Node(id)
			if errors.Is(err, db.ErrNotFound) {
				continue
			}
			if err != nil {
				return err
			}
			if rec.Expired || rec.Expiry.IsZero() || rec.Expiry.After(tx.Now()) {
				continue
			}
			rec.Expired = true
			if err := tx.PutNode(rec); err != nil {
				return err
			}
			if err := tx.Audit("node.expired", fmt.Sprintf("node:%d", id), nil, map[string]any{"name": rec.GivenName, "expiry": rec.Expiry}); err != nil {
				return err
			}
		}
		return nil
	})
}

// removeEphemeral deletes ephemeral nodes that were away too long, also those that registered and never came.
func (s *Server) removeEphemeral(ctx context.Context, now time.Time) {
	if s.cfg.EphemeralTimeout <= 0 {
		return
	}
	snap := s.cfg.Replica.Current()
	if !s.nextRemoval.come(snap, now) {
		return
	}
	s.nextRemoval = date{snap: snap}
	for _, n := range snap.Nodes() {
		if n == nil || !n.Ephemeral || n.State.Online {
			continue
		}
		end := lastSign(n).Add(s.cfg.EphemeralTimeout)
		s.nextRemoval.include(end)
		if now.Before(end) {
			continue
		}
		s.do(ctx, "remove ephemeral node", func(tx *db.Tx) error {
			rec, err := tx.Node(n.ID)
			if err != nil {
				return err
			}
			if rec.State.Online || !rec.Ephemeral || s.Poll.Attached(rec.ID) {
				return nil
			}
			if err := tx.DeleteNode(rec.ID); err != nil {
				return err
			}
			return tx.Audit("node.delete", fmt.Sprintf("node:%d", rec.ID), map[string]any{"name": rec.GivenName, "ephemeral": true, "lastSeen": rec.State.LastSeen}, nil)
		})
	}
}

// lastSign is when a node was last known to be there.
func lastSign(n *tailnet.Node) time.Time {
	if n.State.LastSeen.After(n.Created) {
		return n.State.LastSeen
	}
	return n.Created
}

// sweep forgets what has had its time.
func (s *Server) sweep(ctx context.Context) {
	s.clearRelayMaps(ctx)
	s.do(ctx, "sweep", func(tx *db.Tx) error {
		if _, err := tx.SweepAuthRequests(); err != nil {
			return err
		}
		if _, err := tx.SweepTombstones(); err != nil {
			return err
		}
		return tx.SweepMail()
	})
	if err := s.cfg.Store.Prune(ctx); err != nil && ctx.Err() == nil {
		s.log.Error("prune the change log", "err", err)
	}
}

// approveRoutes approves what the policy's autoApprovers say.
func (s *Server) approveRoutes(ctx context.Context) {
	snap := s.cfg.Replica.Current()
	want := map[tailcfg.NodeID][]netip.Prefix{}
	for slot, n := range snap.Nodes() {
		if n == nil {
			continue
		}
		for _, r := range snap.Access().AutoApproves(slot) {
			if !slices.Contains(n.ApprovedRoutes, r) {
				want[n.ID] = append(want[n.ID], r)
			}
		}
	}
	if len(want) == 0 {
		return
	}
	s.do(ctx, "approve routes by policy", func(tx *db.Tx) error {
		for _, id := range slices.Sorted(maps.Keys(want)) {
			rec, err := tx.Node(id)
			if errors.Is(err, db.ErrNotFound) {
				continue
			}
			if err != nil {
				return err
			}
			before := rec.ApprovedRoutes
			rec.ApprovedRoutes = slices.Clone(before)
			for _, r := range want[id] {
				if !slices.Contains(rec.ApprovedRoutes, r) {
					rec.ApprovedRoutes = append(rec.ApprovedRoutes, r)
				}
			}
			if len(rec.ApprovedRoutes) == len(before) {
				continue
			}
			if err := tx.PutNode(rec); err != nil {
				return err
			}
			if err := tx.Audit("node.routes.auto_approve", fmt.Sprintf("node:%d", id), before, rec.ApprovedRoutes); err != nil {
				return err
			}
		}
		return nil
	})
}
