package tailnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signalbox-net/signalbox/db"
)

// ReplicaConfig configures a Replica.
type ReplicaConfig struct {
	Store   *db.Store    // required
	Tailnet db.TailnetID // required
	Log     *slog.Logger // nil discards

	// Gap is the time between two announcements, asked before each: the least, and what it grows to while changes do not end. It lets the
	// fan-out of one finish before the next begins. Nil means none.
	Gap func() (least, most time.Duration)

	// FanOut is told, at each announcement, how long the one before took: from it until the last session that had something to write for it
	// had handed that over. Who comes later than the next announcement, such as a reader that is stuck, is no longer counted. An announcement for
	// which nobody had to write is left out. It must not block. Nil: nobody is told.
	FanOut func(time.Duration)
}

// A Replica keeps the current Snapshot of one tailnet up to date by following the change log. There is no other way for a change to get
// into a Snapshot, whoever made it.
type Replica struct {
	cfg   ReplicaConfig
	log   *slog.Logger
	cur   atomic.Pointer[Snapshot]
	nudge chan struct{} // one slot: somebody waits for a revision

	mu        sync.Mutex    // guards the following fields
	published chan struct{} // closed when cur is replaced
	announced chan struct{} // closed at announcements
	told      *Snapshot     // what the last announcement was of
	wanted    db.Revision   // the newest one that somebody waits for
	watchers  []func(prev, now *Snapshot)
	batches   []func(*db.Batch)
	fault     error // why following fails; nil while it works

	pace pace // owned by Run
}

// NewReplica loads the tailnet. It fails when the database cannot be read.
func NewReplica(ctx context.Context, cfg ReplicaConfig) (*Replica, error) {
	r := &Replica{cfg: cfg, log: cfg.Log, nudge: make(chan struct{}, 1), published: make(chan struct{}), announced: make(chan struct{})}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	b, err := cfg.Store.Load(ctx, cfg.Tailnet)
	if err != nil {
		return nil, fmt.Errorf("load tailnet: %w", err)
	}
	s, err := Build(nil, b)
	if err != nil {
		r.log.Warn("stored setting ignored", "err", err)
	}
	r.cur.Store(s)
	r.told = s
	return r, nil
}

// Current is the newest snapshot. It never blocks.
func (r *Replica) Current() *Snapshot { return r.cur.Load() }

// ReservedLabels are the labels that no device may be named: own, and those of the extra records that are known now.
func (r *Replica) ReservedLabels(own []string) []string {
	return slices.Concat(own, r.Current().Settings().RecordLabels())
}

// Announced is closed when there is something new to tell clients. A session takes the channel first, then Current, so that it misses
// nothing. Announcements are spaced by ReplicaConfig.Gap; Current is always newest.
func (r *Replica) Announced() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.announced
}

// News is the snapshot that was last announced, and a channel that is closed at the next announcement. Sessions move from one announced
// snapshot to the next, so that many of them go the same way and share what is encoded for it.
func (r *Replica) News() (told *Snapshot, next <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.told, r.announced
}

// OnPublish registers f to be called with each new snapshot, in order, by the goroutine of Run. f must not block.
func (r *Replica) OnPublish(f func(prev, now *Snapshot)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.watchers = append(r.watchers, f)
}

// OnBatch registers f to be called with what each step of the log holds, after the snapshot that includes it is current. f must not block.
func (r *Replica) OnBatch(f func(*db.Batch)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.batches = append(r.batches, f)
}

// Fault is the reason for which the replica cannot follow the database at the moment, nil when it can.
func (r *Replica) Fault() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.fault
}

// WaitFor returns a snapshot that includes rev: what a writer needs in order to read what it wrote.
func (r *Replica) WaitFor(ctx context.Context, rev db.Revision) (*Snapshot, error) {
	for {
		r.mu.Lock()
		ch := r.published
		r.wanted = max(r.wanted, rev)
		r.mu.Unlock()
		if s := r.Current(); s.rev >= rev {
			return s, nil
		}
		select {
		case r.nudge <- struct{}{}:
		default:
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for revision %d: %w", rev, ctx.Err())
		}
	}
}

// catchUpIn bounds CatchUp.
const catchUpIn = 3 * time.Second

// CatchUp returns a snapshot that includes everything which was committed before the call, by whichever server: what a client that comes from
// another server may count on. It is db.ErrUnavailable when that cannot be had now.
func (r *Replica) CatchUp(ctx context.Context) (*Snapshot, error) {
	if !r.cfg.Store.Shared() {
		return r.Current(), nil // whoever answered was this server, and waited for the snapshot
	}
	ctx, cancel := context.WithTimeout(ctx, catchUpIn)
	defer cancel()
	var rev db.Revision
	err := r.cfg.Store.View(ctx, func(rd *db.Reader) (err error) {
		rev, err = rd.In(r.cfg.Tailnet).Revision()
		return err
	})
	if err == nil {
		var s *Snapshot
		if s, err = r.WaitFor(ctx, rev); err == nil {
			return s, nil
		}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w: %w", db.ErrUnavailable, err)
	}
	return nil, fmt.Errorf("catch up with the database: %w", err)
}

// pollEvery is how long a lost wake-up can go unnoticed.
const pollEvery = time.Second

// Run follows the log until ctx ends.
func (r *Replica) Run(ctx context.Context) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	hold := time.NewTimer(0)
	defer hold.Stop()
	due, waited := false, false // something was published and not yet announced; it had to wait
	for {
		var announce <-chan time.Time
		if due {
			var least, most time.Duration
			if r.cfg.Gap != nil {
				least, most = r.cfg.Gap()
			}
			now, revisions := time.Now(), r.untold()
			if wait := r.pace.wait(now, revisions, least, most); wait > 0 {
				waited = true
				hold.Reset(wait)
				announce = hold.C
			} else {
				r.pace.announced(now, waited, revisions, least, most)
				r.announce(now)
				due, waited = false, false
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-announce:
		case <-r.cfg.Store.Wake():
			due = r.follow(ctx) || due
		case <-r.nudge:
			due = r.behind() && r.follow(ctx) || due
		case <-tick.C:
			due = r.follow(ctx) || due
		}
	}
}

// behind reports whether somebody waits for what is not taken in yet. Most often the wake-up that told of it came before the waiting began.
func (r *Replica) behind() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.Current().rev < r.wanted
}

// follow takes in what was committed since the current snapshot and reports whether there was anything.
func (r *Replica) follow(ctx context.Context) bool {
	prev := r.Current()
	b, err := r.cfg.Store.Follow(ctx, r.cfg.Tailnet, prev.rev)
	was := r.setFault(err)
	if err != nil {
		if was == nil && !errors.Is(err, context.Canceled) {
			r.log.Error("follow the change log; clients are served what was known before", "err", err)
		}
		return false
	}
	if was != nil {
		r.log.Info("following the change log again")
	}
	if b.To == prev.rev && !b.Full {
		return false
	}
	s, err := Build(prev, b)
	if err != nil {
		r.log.Warn("stored setting ignored", "err", err)
	}
	if s.policy.Err != nil && s.policy != prev.policy {
		r.log.Error("the stored policy does not compile here; everything is denied", "err", s.policy.Err)
	}
	if s.policy.Stale != nil && s.policy != prev.policy {
		r.log.Warn("the policy has names that denote nobody any more", "err", s.policy.Stale)
	}
	r.publish(prev, s)
	r.mu.Lock()
	batches := r.batches
	r.mu.Unlock()
	for _, f := range batches {
		f(b)
	}
	return true
}

func (r *Replica) publish(prev, s *Snapshot) {
	r.cur.Store(s)
	r.mu.Lock()
	close(r.published)
	r.published = make(chan struct{})
	watchers := r.watchers
	r.mu.Unlock()
	for _, f := range watchers {
		f(prev, s)
	}
}

// untold is how many revisions are not announced yet.
func (r *Replica) untold() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return int(r.Current().rev - r.told.rev)
}

func (r *Replica) announce(at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	close(r.announced)
	r.announced = make(chan struct{})
	if now := r.Current(); now != r.told {
		if d := time.Duration(r.told.spread.Load()); d > 0 && r.cfg.FanOut != nil {
			r.cfg.FanOut(d)
		}
		r.told.retire()
		now.announced = at
		r.told = now
	}
}

func (r *Replica) setFault(err error) (was error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	was, r.fault = r.fault, err
	return was
}
