package tailnet

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/db"
)

// LedgerConfig configures a Ledger.
type LedgerConfig struct {
	Store    *db.Store    // required
	Tailnet  db.TailnetID // required
	Replica  *Replica     // required
	Instance int64        // this server's row in the instances table
	Reserved []string     // labels that no device may have
	Log      *slog.Logger // nil discards
}

// A Ledger is the only door for writes. What it has returned without an error is on disk.
type Ledger struct {
	cfg  LedgerConfig
	log  *slog.Logger
	wake chan struct{} // one slot

	mu      sync.Mutex // guards the following fields
	pool    *pool      // reports that wait for the next flush
	flushed *pool      // those that are being written; nil when none are
}

// NewLedger returns a Ledger whose reports are written while Run runs.
func NewLedger(cfg LedgerConfig) *Ledger {
	l := &Ledger{cfg: cfg, log: cfg.Log, wake: make(chan struct{}, 1), pool: newPool()}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	return l
}

// Tailnet is the tailnet that the ledger writes to.
func (l *Ledger) Tailnet() db.TailnetID { return l.cfg.Tailnet }

// Do runs fn in a transaction of its own and returns the revision that it made, after the commit.
func (l *Ledger) Do(ctx context.Context, actor db.Actor, fn func(*db.Tx) error) (db.Revision, error) {
	return l.cfg.Store.Update(ctx, l.cfg.Tailnet, actor, fn)
}

// DoWait is Do followed by a wait for the snapshot that includes the change. Once the change is committed an error can only come from ctx.
func (l *Ledger) DoWait(ctx context.Context, actor db.Actor, fn func(*db.Tx) error) (*Snapshot, error) {
	rev, err := l.Do(ctx, actor, fn)
	if err != nil {
		return nil, err
	}
	return l.cfg.Replica.WaitFor(ctx, rev)
}

// An Update is what a client says of itself in a map request: always the whole, never a difference.
type Update struct {
	DiscoKey  key.DiscoPublic
	Endpoints []tailcfg.Endpoint
	HomeDERP  int // 0 keeps the known one: clients send 0 before their first measurement
	Hostinfo  *tailcfg.Hostinfo
	Cap       tailcfg.CapabilityVersion

	// Fill says that this is only wanted for a node of which nothing is known yet. It gives way to any other report.
	Fill bool
}

// After is u, said after old: what u leaves out stands as old has it.
func (u Update) After(old *Update) Update {
	if u.Hostinfo == nil {
		u.Hostinfo = old.Hostinfo
	}
	if u.HomeDERP == 0 {
		u.HomeDERP = old.HomeDERP
	}
	return u
}

// Presence is whether a node has a live map stream.
type Presence struct {
	Online   bool
	Instance int64     // the server that holds, or held, the stream
	Seen     time.Time // when it was last there
}

type pending struct {
	update   *Update
	presence *Presence
}

// pool is a set of reports that go to the database together. done is closed, and err valid, once they are there or refused.
type pool struct {
	reports map[tailcfg.NodeID]*pending
	done    chan struct{}
	err     error
}

func newPool() *pool {
	return &pool{reports: make(map[tailcfg.NodeID]*pending), done: make(chan struct{})}
}

// Report hands in what a node says of itself; the newest report of a node wins. The returned function waits until it is on disk. It must not
// be called with slices or a Hostinfo that change afterwards.
func (l *Ledger) Report(id tailcfg.NodeID, u Update) func(context.Context) error {
	return l.add(id, func(p *pending) {
		switch {
		case p.update == nil:
			p.update = &u
		case !u.Fill:
			u = u.After(p.update)
			p.update = &u
		}
	})
}

// Attach and Detach say that a node's map stream began or ended here.
func (l *Ledger) Attach(id tailcfg.NodeID, now time.Time) func(context.Context) error {
	return l.add(id, func(p *pending) { p.presence = &Presence{Online: true, Instance: l.cfg.Instance, Seen: now} })
}

// Detach is the opposite of Attach. It changes nothing when another server holds the node's stream by then.
func (l *Ledger) Detach(id tailcfg.NodeID, now time.Time) func(context.Context) error {
	return l.add(id, func(p *pending) { p.presence = &Presence{Instance: l.cfg.Instance, Seen: now} })
}

// Unwritten reports whether what was last said by Attach or Detach is not on disk yet: until then the row of the node may tell of an earlier time.
func (l *Ledger) Unwritten(id tailcfg.NodeID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range []*pool{l.pool, l.flushed} {
		if p == nil {
			continue
		}
		if r := p.reports[id]; r != nil && r.presence != nil {
			return true
		}
	}
	return false
}

func (l *Ledger) add(id tailcfg.NodeID, set func(*pending)) func(context.Context) error {
	l.mu.Lock()
	p := l.pool
	r := p.reports[id]
	if r == nil {
		r = new(pending)
		p.reports[id] = r
	}
	set(r)
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
	return func(ctx context.Context) error {
		select {
		case <-p.done:
			return p.err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Run writes reports until ctx ends, then once more.
func (l *Ledger) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			l.flush(last)
			return nil
		case <-l.wake:
			if !l.flush(ctx) {
				// The database refuses. Presence was put back; try again soon, and do not spin.
				select {
				case <-ctx.Done():
				case <-time.After(500 * time.Millisecond):
				}
				l.kick()
			}
		}
	}
}

func (l *Ledger) kick() {
	l.mu.Lock()
	n := len(l.pool.reports)
	l.mu.Unlock()
	if n == 0 {
		return
	}
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// maxBatch is how many nodes' reports one transaction takes: a transaction of 500 rows is the largest that keeps other writers' waits short.
const maxBatch = 500

func (l *Ledger) flush(ctx context.Context) bool {
	l.mu.Lock()
	p := l.pool
	l.pool, l.flushed = newPool(), p
	l.mu.Unlock()
	for ids := range slices.Chunk(slices.Sorted(maps.Keys(p.reports)), maxBatch) {
		if err := l.write(ctx, p, ids); err != nil {
			p.err = fmt.Errorf("write reports of %d nodes: %w", len(ids), err)
		}
	}
	if p.err != nil {
		l.log.Error("reports not written", "err", p.err)
	}
	l.settle(p)
	close(p.done)
	return p.err == nil
}

func (l *Ledger) write(ctx context.Context, p *pool, ids []tailcfg.NodeID) error {
	_, err := l.Do(ctx, db.Actor{Kind: "node"}, func(tx *db.Tx) error {
		recs, err := tx.NodesByID(ids)
		if err != nil {
			return err
		}
		states := make(map[tailcfg.NodeID]db.NodeState)
		for _, id := range ids {
			rec := recs[id]
			if rec == nil {
				continue // deleted meanwhile
			}
			st := rec.State
			r := p.reports[id]
			if r.update != nil {
				if err := l.applyUpdate(tx, rec, &st, r.update); err != nil {
					return err
				}
			}
			if r.presence != nil {
				applyPresence(&st, r.presence)
			}
			if !sameState(&rec.State, &st) {
				states[id] = st
			}
		}
		if len(states) == 0 {
			return nil
		}
		return tx.PutNodeStates(states)
	})
	return err
}

// applyUpdate merges what the client said. A changed host name renames the device, unless somebody gave it another name.
func (l *Ledger) applyUpdate(tx *db.Tx, rec *db.Node, st *db.NodeState, u *Update) error {
	if u.Fill && !st.DiscoKey.IsZero() {
		return nil
	}
	st.DiscoKey, st.Endpoints, st.Cap = u.DiscoKey, u.Endpoints, u.Cap
	if u.HomeDERP != 0 {
		st.HomeDERP = u.HomeDERP
	}
	if u.Hostinfo == nil {
		return nil
	}
	st.Hostinfo = u.Hostinfo
	if u.Hostinfo.Hostname == rec.Hostname {
		return nil
	}
	renamed := *rec
	renamed.Hostname = u.Hostinfo.Hostname
	if AutoNamed(rec.GivenName, rec.Hostname) {
		if label := Label(u.Hostinfo.Hostname, rec.ID); label != Label(rec.Hostname, rec.ID) {
			name, err := tx.FreeName(label, rec.Owner(), l.cfg.Replica.ReservedLabels(l.cfg.Reserved)...)
			if err != nil {
				return err
			}
			renamed.GivenName = name
		}
	}
	return tx.PutNode(&renamed)
}

func applyPresence(st *db.NodeState, p *Presence) {
	switch {
	case p.Online:
		st.Online, st.Instance = true, p.Instance
	case st.Instance == p.Instance:
		st.Online, st.Instance, st.LastSeen = false, 0, p.Seen
	}
}

func sameState(a, b *db.NodeState) bool {
	return a.DiscoKey == b.DiscoKey && a.HomeDERP == b.HomeDERP && a.Cap == b.Cap && a.Online == b.Online && a.Instance == b.Instance &&
		a.LastSeen.Equal(b.LastSeen) && slices.Equal(a.Endpoints, b.Endpoints) && (a.Hostinfo == b.Hostinfo || reflect.DeepEqual(a.Hostinfo, b.Hostinfo))
}

// settle ends the writing of p. The presence of a refused batch is put back, under whatever came in since: a stream's end is known only here.
func (l *Ledger) settle(p *pool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flushed = nil
	if p.err == nil {
		return
	}
	for id, r := range p.reports {
		if r.presence == nil {
			continue
		}
		now := l.pool.reports[id]
		if now == nil {
			now = new(pending)
			l.pool.reports[id] = now
		}
		if now.presence == nil {
			now.presence = r.presence
		}
	}
}
