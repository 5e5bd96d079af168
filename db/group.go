package db

import (
	"bytes"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"time"
)

// A group is one database transaction that several ops share, each in its own
// savepoint. All of it is owned by the leader's goroutine, but for the Tx that
// it lends to one op at a time.
type group struct {
	store *Store
	ctx   context.Context

	raw      *sql.Conn
	conn     *conn
	begun    bool
	since    time.Time // when it had its lock, or began
	kept     int       // ops whose work is in the transaction
	tailnets map[TailnetID]*tailnetState
	changes  int    // rows written to the change log
	mailed   bool   // mail was posted
	xid      string // PostgreSQL: the transaction's id, to ask for its fate
}

// A tailnetState is a tailnet's counters. The transaction holds the lock of
// the tailnet's row (SQLite: of the database), so they are ahead of everybody.
type tailnetState struct {
	id       TailnetID
	revision Revision // the newest one given out in this transaction
	first    Revision // as it was at the start
	number   int64    // the newest audit event
	head     [32]byte // hash of that event

	changes []changeRow
	audit   []auditRow
	mailed  bool // mail was posted

	spares spares
}

// runAll runs members, or if there are none the ops that wait, and commits.
// The error is nil when the commit is on disk; each op then has its result.
func (g *group) runAll(w *writer, members []*op) ([]*op, error) {
	if err := g.open(); err != nil {
		g.abandon()
		return members, err
	}
	defer g.release()
	again := members
	for {
		next := again
		if next == nil {
			next = w.take(g.room(len(members)))
			members = append(members, next...)
		}
		for _, o := range next {
			if err := g.run(o); err != nil {
				g.abandon()
				return members, err
			}
		}
		if again != nil || len(next) == 0 || len(members) >= maxGroup || time.Since(g.since) > maxGroupTime {
			break
		}
	}
	if !g.begun {
		return members, nil
	}
	if err := g.flush(w); err != nil {
		g.abandon()
		return members, err
	}
	if err := g.commit(); err != nil {
		return members, err
	}
	for _, t := range g.tailnets {
		w.spares = t.spares
		w.spares.tailnet, w.spares.revision = t.id, t.revision
	}
	return members, nil
}

// room is how many ops may be taken at once by a group that has so many. Other
// servers wait for the lock of a PostgreSQL group, so its time is looked at
// after each op. Whoever waits for SQLite is in the group.
func (g *group) room(members int) int {
	if g.store.pg {
		return 1
	}
	return maxGroup - members
}

func (g *group) open() error {
	raw, err := g.store.write.Conn(g.ctx)
	if err != nil {
		return g.store.fail(g.ctx, fmt.Errorf("connect: %w", err))
	}
	g.raw = raw
	return g.begin()
}

func (g *group) begin() error {
	begin := "BEGIN IMMEDIATE"
	if g.store.pg {
		begin = "BEGIN"
	}
	g.conn = &conn{ConnPool: g.raw, store: g.store, ctx: g.ctx}
	g.tailnets = map[TailnetID]*tailnetState{}
	if err := g.exec(begin); err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	g.begun, g.kept, g.since = true, 0, time.Now()
	return nil
}

func (g *group) exec(query string) error {
	_, err := g.conn.ExecContext(g.ctx, query)
	return g.conn.err(err)
}

// run runs one op. An error is one of the storage: the whole group is lost.
// Until an op was kept, none needs a savepoint: rolling back loses nobody
// else's work.
func (g *group) run(o *op) error {
	if !g.begun {
		if err := g.begin(); err != nil {
			return err
		}
	}
	bare := g.kept == 0
	tx, err := g.prepare(o, bare)
	if err == nil && (o.create == "" || o.created) {
		err = o.lend(tx)
	}
	tx.conn.over.Store(true)
	if f := g.fault(tx); f != nil {
		return f
	}
	if err != nil {
		return g.drop(o, bare, err)
	}
	tx.keep()
	g.kept++
	o.err, o.revision = nil, 0
	if tx.state != nil {
		o.revision = tx.state.revision
	}
	if bare {
		return nil
	}
	return g.exec("RELEASE SAVEPOINT op")
}

// drop undoes what a failed op wrote.
func (g *group) drop(o *op, bare bool, err error) error {
	o.err, o.revision = err, 0
	if o.create != "" {
		delete(g.tailnets, o.tailnet)
	} else if t := g.tailnets[o.tailnet]; t != nil {
		t.spares = spares{} // some were taken by what is undone
	}
	if bare {
		g.begun = false
		return g.exec("ROLLBACK")
	}
	return g.exec("ROLLBACK TO SAVEPOINT op")
}

func (g *group) fault(tx *Tx) error {
	if g.conn.fault != nil {
		return g.conn.fault
	}
	if tx != nil && tx.conn.fault != nil {
		return tx.conn.fault
	}
	return nil
}

// prepare locks the op's tailnet, sets the savepoint and makes the Tx. The lock
// comes first, since PostgreSQL drops it with the savepoint that it was taken
// in; only a tailnet that the op makes itself cannot be locked before.
func (g *group) prepare(o *op, bare bool) (*Tx, error) {
	c := &conn{ConnPool: g.raw, store: g.store, ctx: g.ctx}
	r := &Reader{g: g.store.session(g.ctx, c), conn: c, tailnet: o.tailnet}
	tx := &Tx{Reader: r, now: g.store.now(), actor: o.actor}
	var err error
	if o.create == "" && !o.probe {
		tx.state, err = g.tailnet(r, o.tailnet)
	}
	if !bare {
		if _, err := r.exec("SAVEPOINT op"); err != nil {
			return tx, err
		}
	}
	if o.create != "" {
		tx.state, err = g.makeTailnet(r, o, tx.now)
	}
	return tx, err
}

func (g *group) makeTailnet(r *Reader, o *op, now time.Time) (*tailnetState, error) {
	n, err := r.exec("INSERT INTO tailnets (name, created) VALUES (?, ?) ON CONFLICT DO NOTHING", o.create, micros(now))
	if err != nil {
		return nil, err
	}
	o.created = n == 1
	if err := r.one(&o.tailnet, "SELECT id FROM tailnets WHERE name = ?", o.create); err != nil {
		return nil, err
	}
	r.tailnet = o.tailnet
	return g.tailnet(r, o.tailnet)
}

func (g *group) tailnet(r *Reader, id TailnetID) (*tailnetState, error) {
	if t := g.tailnets[id]; t != nil {
		return t, nil
	}
	query := "SELECT revision, audit_number, audit_head FROM tailnets WHERE id = ?"
	if g.store.pg {
		query += " FOR UPDATE"
	}
	t := &tailnetState{id: id}
	var head []byte
	if err := r.scan(query, []any{id}, &t.revision, &t.number, &head); err != nil {
		return nil, fmt.Errorf("tailnet %d: %w", id, err)
	}
	copy(t.head[:], head)
	t.first = t.revision
	if len(g.tailnets) == 0 {
		g.since = time.Now()
	}
	g.tailnets[id] = t
	// They are given back when the transaction is committed, and lost otherwise.
	if w := &g.store.writer; w.spares.tailnet == id && w.spares.revision == t.first {
		t.spares = w.spares
	}
	g.store.writer.spares = spares{}
	return t, nil
}

// flush writes the counters, the change rows and the audit rows of all ops.
func (g *group) flush(w *writer) error {
	r := &Reader{g: g.store.session(g.ctx, g.conn), conn: g.conn}
	for _, t := range g.tailnets {
		g.mailed = g.mailed || t.mailed
		if len(t.audit) > 0 {
			if err := r.err(r.g.CreateInBatches(t.audit, g.store.rowBatch()).Error); err != nil {
				return err
			}
		}
		if len(t.changes) > 0 {
			if err := r.err(r.g.CreateInBatches(t.changes, g.store.rowBatch()).Error); err != nil {
				return err
			}
			g.changes += len(t.changes)
		}
		if len(t.audit)+len(t.changes) > 0 {
			if err := g.advance(r, t); err != nil {
				return err
			}
		}
		if len(t.changes) > 0 && w.unpruned >= pruneEvery {
			w.unpruned = 0
			if _, err := prune(r, t.id, t.revision, g.store.now(), g.store.c); err != nil {
				return err
			}
		}
	}
	if g.mailed && g.store.pg {
		var ignored string
		return r.scan("SELECT pg_current_xact_id()::text, pg_notify('"+mailChannel+"', '')::text", nil, &g.xid, &ignored)
	}
	return nil
}

// advance moves a tailnet's counters. The row's lock makes revisions equal to
// commit order without gaps; that they stand where this transaction found them
// is checked all the same.
func (g *group) advance(r *Reader, t *tailnetState) error {
	query := "UPDATE tailnets SET revision = ?, audit_number = ?, audit_head = ? WHERE id = ? AND revision = ?"
	args := []any{t.revision, t.number, bytes.Clone(t.head[:]), t.id, t.first}
	if !g.store.pg {
		n, err := r.exec(query, args...)
		if err == nil && n != 1 {
			err = fmt.Errorf("%w: revision of tailnet %d moved under its lock", ErrUnavailable, t.id)
		}
		return err
	}
	// One statement also announces the commit and learns the transaction's id.
	query += " RETURNING pg_current_xact_id()::text, pg_notify('" + channel + "', id::text)::text"
	var ignored string
	err := r.scan(query, args, &g.xid, &ignored)
	if err == ErrNotFound {
		err = fmt.Errorf("%w: revision of tailnet %d moved under its lock", ErrUnavailable, t.id)
	}
	return err
}

func (g *group) commit() error {
	_, err := g.raw.ExecContext(g.ctx, "COMMIT")
	if err == nil {
		g.begun = false
		return nil
	}
	err = g.store.fail(g.ctx, fmt.Errorf("commit: %w", err))
	g.abandon()
	if g.xid != "" {
		committed, known := g.fate()
		if committed {
			return nil
		}
		if known {
			return &storageFault{cause: err, retry: true}
		}
	}
	// Not to be run again: it is not certain that it was not committed.
	if f, ok := errors.AsType[*storageFault](err); ok {
		return &storageFault{cause: f.cause, corrupt: f.corrupt}
	}
	return &storageFault{cause: err}
}

// fate asks PostgreSQL what became of a transaction whose COMMIT got no answer.
func (g *group) fate() (committed, known bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		var status sql.NullString
		err := g.store.write.QueryRowContext(ctx, "SELECT pg_xact_status($1::text::xid8)", g.xid).Scan(&status)
		if err == nil && status.String != "in progress" {
			return status.String == "committed", status.Valid
		}
		newBackoff(50*time.Millisecond, time.Second).sleep(ctx)
	}
	return false, false
}

// abandon gives up a connection whose state is not certain. Closing it rolls
// its transaction back.
func (g *group) abandon() {
	if g.raw == nil {
		return
	}
	g.raw.Raw(func(any) error { return driver.ErrBadConn })
	g.raw.Close()
	g.raw = nil
}

func (g *group) release() {
	if g.raw == nil {
		return
	}
	if g.begun {
		g.abandon()
		return
	}
	g.raw.Close()
	g.raw = nil
}
