package db

import (
	"context"
	"sync"
	"time"
)

// health remembers the last storage fault and finds out when it has healed.
type health struct {
	store *Store

	mu      sync.Mutex // guards the following fields
	fault   *storageFault
	healthy time.Time // of the last commit, by the monotonic clock
	probing chan struct{}
	result  error
}

// freshFor is how long a commit proves that the storage works.
const freshFor = 2 * time.Second

func (h *health) note(f *storageFault) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fault == nil || f.corrupt || !h.fault.corrupt {
		h.fault = f
	}
	h.healthy = time.Time{}
}

func (h *health) committed() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fault == nil || !h.fault.corrupt {
		h.fault = nil
		h.healthy = time.Now()
	}
}

// refuseWrites keeps a damaged file from being written to, which could make
// the damage worse. A check that finds it whole again lifts that.
func (h *health) refuseWrites() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fault != nil && h.fault.corrupt {
		return h.fault
	}
	return nil
}

// Healthy is nil when the database takes writes: something was committed in
// the last seconds, or else a small write that is made now succeeds. Otherwise
// it is ErrUnavailable or ErrCorrupt with the cause. After damage it checks
// the file and, when that is whole again, lets writes through. Concurrent
// calls share one probe.
func (s *Store) Healthy(ctx context.Context) error {
	h := &s.health
	h.mu.Lock()
	if h.fault == nil && time.Since(h.healthy) < freshFor {
		h.mu.Unlock()
		return nil
	}
	done := h.probing
	if done == nil {
		done = make(chan struct{})
		h.probing = done
		go h.probe(done)
	}
	h.mu.Unlock()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-done:
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.result
}

// Fault is the storage fault that the last statement or commit met, nil when
// the storage has worked since. It is ErrUnavailable, or ErrCorrupt while
// writes are refused. It asks nothing of the database.
func (s *Store) Fault() error {
	s.health.mu.Lock()
	defer s.health.mu.Unlock()
	if s.health.fault == nil {
		return nil
	}
	return s.health.fault
}

// probe runs apart from its first caller, whose context must not decide what
// the others are told. It ends within the bounds of a write.
func (h *health) probe(done chan struct{}) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*h.store.c.WriteTimeout)
	defer cancel()
	err := h.recover(ctx)
	if err == nil {
		err = h.store.writer.do(ctx, newProbe())
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.result = err
	h.probing = nil
	close(done)
}

// recover checks a database that was found damaged.
func (h *health) recover(ctx context.Context) error {
	s := h.store
	err := h.refuseWrites()
	if err == nil {
		return nil
	}
	// Connections keep pages of the damaged file: new ones must read it anew.
	// The writer's stays until the file is known to be whole: the last
	// connection that is closed moves SQLite's log into the file.
	s.read.SetMaxIdleConns(0)
	s.read.SetMaxIdleConns(maxReaders)
	if s.pg {
		// PostgreSQL reports damage by statement, and has no cheap check of the
		// whole: the next write decides.
		s.write.SetMaxIdleConns(0)
		s.write.SetMaxIdleConns(2)
		h.clear()
		return nil
	}
	if err := s.quickCheck(ctx, s.read); err != nil {
		return err
	}
	s.write.SetMaxIdleConns(0)
	s.write.SetMaxIdleConns(2)
	s.log.InfoContext(ctx, "database is whole again")
	h.clear()
	return nil
}

func (h *health) clear() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fault = nil
}

// newProbe is a write that belongs to no tailnet.
func newProbe() *op {
	o := newOp(0, Actor{}, func(tx *Tx) error {
		_, err := tx.exec("UPDATE health SET probed = ? WHERE id = 1", micros(tx.now))
		return err
	})
	o.probe = true
	return o
}
