package db

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

const (
	// maxGroup and maxGroupTime bound one shared transaction.
	maxGroup     = 256
	maxGroupTime = 25 * time.Millisecond
)

// Update runs fn in a transaction and commits it before it returns the
// revision that it made. fn runs on the caller's goroutine; it must use only
// tx to reach the database, must not wait for anything else, and may be run
// again when the database asks for a retry. If fn returns an error, it is
// returned as it is and nothing is kept. If fn wrote nothing that followers
// see, the current revision is returned.
//
// A storage fault is ErrUnavailable or ErrCorrupt: nothing was changed. ctx
// ends the wait for the transaction's start; a started one is finished, so
// that an error always means that nothing was changed.
func (s *Store) Update(ctx context.Context, tailnet TailnetID, actor Actor, fn func(*Tx) error) (Revision, error) {
	o := newOp(tailnet, actor, fn)
	err := s.writer.do(ctx, o)
	return o.revision, err
}

// Bootstrap makes the tailnet of that name if it does not exist, and runs init
// in the transaction that makes it. Of several servers that start at once,
// exactly one runs init. The first tailnet of a database is its default one.
func (s *Store) Bootstrap(ctx context.Context, name string, init func(*Tx) error) (id TailnetID, created bool, err error) {
	if name == "" || name != clean(name) {
		return 0, false, &InvalidError{Field: "name", Msg: "is not a tailnet name"}
	}
	o := newOp(0, Actor{Kind: "system"}, init)
	o.create = name
	if err := s.writer.do(ctx, o); err != nil {
		return 0, false, err
	}
	s.defaultTailnet.CompareAndSwap(0, int64(o.tailnet))
	return o.tailnet, o.created, nil
}

// An op is one Update that waits for its turn in a shared transaction.
type op struct {
	tailnet TailnetID
	actor   Actor
	fn      func(*Tx) error
	create  string // Bootstrap: the tailnet to make
	probe   bool   // a health check: no tailnet is involved

	turn chan *Tx      // the leader lends the transaction
	ran  chan error    // fn's result
	done chan struct{} // closed when the result below stands

	// The following fields are the leader's until done is closed.
	gone     bool // fn panicked or ended its goroutine: nobody takes a turn again
	revision Revision
	created  bool
	err      error
}

func newOp(tailnet TailnetID, actor Actor, fn func(*Tx) error) *op {
	return &op{tailnet: tailnet, actor: actor, fn: fn,
		turn: make(chan *Tx), ran: make(chan error, 1), done: make(chan struct{})}
}

var errAborted = errors.New("db: the function of an Update did not return")

// run runs fn and always tells the leader, also when fn panics or ends its
// goroutine.
func (o *op) run(tx *Tx) {
	result := errAborted
	defer func() { o.ran <- result }()
	result = o.fn(tx)
}

// lend has the op's owner run fn.
func (o *op) lend(tx *Tx) error {
	if o.gone {
		return errAborted
	}
	o.turn <- tx
	err := <-o.ran
	o.gone = err == errAborted
	return err
}

func (o *op) finish(rev Revision, err error) {
	o.revision, o.err = rev, err
	close(o.done)
}

// A writer shares transactions between concurrent Updates: while one group
// commits, the next one gathers. Its leader is a goroutine that lives as long
// as there are ops.
type writer struct {
	store *Store

	mu      sync.Mutex // guards the following fields
	pending []*op
	leading bool
	closed  bool
	leaders sync.WaitGroup

	// The following fields are owned by the leader.
	unpruned int // changes since the last pruning step
	spares   spares
}

func (w *writer) do(ctx context.Context, o *op) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if err := w.store.health.refuseWrites(); err != nil {
		return err
	}
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return fmt.Errorf("%w: it is closed", ErrUnavailable)
	}
	w.pending = append(w.pending, o)
	if !w.leading {
		w.leading = true
		w.leaders.Go(w.lead)
	}
	w.mu.Unlock()

	timeout := time.NewTimer(w.store.c.WriteTimeout)
	defer timeout.Stop()
	cancelled := ctx.Done()
	for {
		select {
		case tx := <-o.turn:
			o.run(tx)
		case <-o.done:
			return o.err
		case <-cancelled:
			if w.withdraw(o) {
				return context.Cause(ctx)
			}
			cancelled = nil
		case <-timeout.C:
			if w.withdraw(o) {
				return w.store.fail(context.Background(), &storageFault{cause: errTooSlow})
			}
		}
	}
}

// withdraw takes back an op that no group has taken.
func (w *writer) withdraw(o *op) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	i := slices.Index(w.pending, o)
	if i < 0 {
		return false
	}
	w.pending = slices.Delete(w.pending, i, i+1)
	return true
}

// take takes the first n ops that wait, all when n is negative.
func (w *writer) take(n int) []*op {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n < 0 || n > len(w.pending) {
		n = len(w.pending)
	}
	taken := slices.Clone(w.pending[:n])
	w.pending = slices.Delete(w.pending, 0, n)
	return taken
}

// lead commits groups until nobody waits.
func (w *writer) lead() {
	for {
		w.mu.Lock()
		if len(w.pending) == 0 {
			w.leading = false
			w.mu.Unlock()
			return
		}
		w.mu.Unlock()
		w.commitGroup()
	}
}

// commitGroup runs the waiting ops in one transaction. It begins before it
// takes them: those who come while it waits for a lock still get on, and when
// it cannot begin, all who wait share the verdict instead of waiting in turn.
func (w *writer) commitGroup() {
	s := w.store
	ctx, cancel := context.Background(), context.CancelFunc(func() {})
	if s.pg {
		// SQLite gets no deadline: its lock waits are bounded by busy_timeout,
		// which no context interrupts, and each one with a deadline would cost
		// a goroutine a statement.
		// Half, since an op may wait for one whole group before its own.
		ctx, cancel = context.WithTimeoutCause(ctx, s.c.WriteTimeout/2, errTooSlow)
	}
	defer cancel()
	var members []*op
	for attempt := 1; ; attempt++ {
		began := time.Now()
		g := &group{store: s, ctx: ctx}
		var err error
		members, err = g.runAll(w, members)
		if err == nil {
			if g.kept > 0 && s.c.OnCommit != nil {
				s.c.OnCommit(time.Since(began))
			}
			for _, o := range members {
				o.finish(o.revision, o.err)
			}
			w.unpruned += g.changes
			s.health.committed()
			if g.changes > 0 {
				s.wake.signal()
			}
			if g.mailed {
				s.posts.signal()
			}
			return
		}
		f, ok := errors.AsType[*storageFault](err)
		if ok && f.retry && attempt < 3 && ctx.Err() == nil {
			s.log.Debug("database transaction is run again", "err", err)
			continue
		}
		if len(members) == 0 {
			members = w.take(-1)
		}
		for _, o := range members {
			o.finish(0, err)
		}
		return
	}
}

func (w *writer) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.leaders.Wait()
}
