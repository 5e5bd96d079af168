package auth

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/signalbox-net/signalbox/db"
)

// sightEvery is how exact a key's LastSeen is: a write for each request would
// make reading as dear as writing.
const sightEvery = time.Minute

// sightings collects when keys were used until Run has stored it. The map has
// at most one entry for each key that exists.
type sightings struct {
	ledger Ledger
	log    *slog.Logger
	wake   chan struct{} // one slot

	mu  sync.Mutex // guards the following field
	due map[string]time.Time
}

func newSightings(l Ledger, log *slog.Logger) *sightings {
	return &sightings{ledger: l, log: log, wake: make(chan struct{}, 1), due: make(map[string]time.Time)}
}

// add notes that k was used now, unless its row already says about the same.
func (s *sightings) add(k *db.APIKey, now time.Time) {
	if s.ledger == nil || now.Sub(k.LastSeen) < sightEvery {
		return
	}
	s.mu.Lock()
	s.due[k.KeyID] = now
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Run stores when keys were last used, until ctx ends.
func (c *Checker) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.seen.wake:
			c.seen.store(ctx)
		}
	}
}

// store writes what is due. A write that fails is dropped: the next use of the
// key notes it again, and a last use may be lost by a crash anyway.
func (s *sightings) store(ctx context.Context) {
	s.mu.Lock()
	due := s.due
	s.due = make(map[string]time.Time)
	s.mu.Unlock()
	_, err := s.ledger.Do(ctx, db.Actor{Kind: "system", Name: "last use of API keys"}, func(tx *db.Tx) error {
		for id, at := range due {
			k, err := tx.APIKeyByKeyID(id)
			if errors.Is(err, db.ErrNotFound) {
				continue
			}
			if err != nil {
				return err
			}
			if at.Sub(k.LastSeen) < sightEvery {
				continue
			}
			k.LastSeen = at
			if err := tx.PutAPIKey(k); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil && ctx.Err() == nil {
		s.log.Warn("store last use of API keys", "err", err)
	}
}
