package derp

import (
	"hash/maphash"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"
)

const (
	// unadmittedPerSource holds only for sources with a recent failure: a
	// whole office reconnects at once after a restart, from one address.
	unadmittedPerSource = 16
	failureMemory       = time.Minute

	sourceSlots = 8192
	ways        = 8 // slots that one source may live in
)

// sourceTable counts relay connections that have not been admitted, by
// source. Its size is fixed: strangers can make it forget, never grow.
type sourceTable struct {
	seed maphash.Seed

	mu    sync.Mutex // guards slots
	slots [sourceSlots]sourceSlot
}

type sourceSlot struct {
	source  netip.Addr // zero when free
	pending int
	failed  time.Time // of the latest connection that ended unadmitted
}

func newSourceTable() *sourceTable { return &sourceTable{seed: maphash.MakeSeed()} }

// sourceOf is what counts as one source: an IPv4 address or an IPv6 /64.
func sourceOf(a netip.Addr) netip.Addr {
	if a = a.Unmap().WithZone(""); a.Is6() {
		p, _ := a.Prefix(64)
		return p.Addr()
	}
	return a
}

// begin takes a place for a connection from a. ok is false when the source has
// too many. The caller calls end exactly once.
func (t *sourceTable) begin(a netip.Addr, now time.Time) (end func(failed bool, now time.Time), ok bool) {
	a = sourceOf(a)
	t.mu.Lock()
	defer t.mu.Unlock()
	slot := t.slot(a, now)
	if slot.pending >= unadmittedPerSource && now.Sub(slot.failed) < failureMemory {
		return nil, false
	}
	slot.pending++
	return func(failed bool, now time.Time) { t.end(a, failed, now) }, true
}

func (t *sourceTable) end(a netip.Addr, failed bool, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	slot := t.slot(a, now)
	slot.pending = max(0, slot.pending-1) // it may have been forgotten meanwhile
	if failed {
		slot.failed = now
	}
}

// slot finds a's slot, or frees one for it: an unused one, else one without a
// recent failure, else any.
func (t *sourceTable) slot(a netip.Addr, now time.Time) *sourceSlot {
	h := maphash.Comparable(t.seed, a)
	set := t.slots[(h%(sourceSlots/ways))*ways:][:ways]
	victim := &set[rand.IntN(ways)]
	best := 0
	for i := range set {
		s := &set[i]
		if s.source == a {
			return s
		}
		rank := 1
		switch {
		case !s.source.IsValid():
			rank = 4
		case s.pending == 0 && now.Sub(s.failed) >= failureMemory:
			rank = 3
		case s.pending == 0:
			rank = 2
		}
		if rank > max(best, 1) {
			victim, best = s, rank
		}
	}
	*victim = sourceSlot{source: a}
	return victim
}
