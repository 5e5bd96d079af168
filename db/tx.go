package db

import (
	"time"

	"tailscale.com/tailcfg"
)

// A Tx reads and writes one tailnet within one Update. Each write method
// changes rows and notes what moved; the notes are committed with them. A
// write method that returns an error other than a storage fault has changed
// nothing, and the Tx may go on.
type Tx struct {
	*Reader
	now   time.Time
	actor Actor
	state *tailnetState

	moved  []moved
	audits []AuditEvent
	suffix suffix // the newest one that FreeName found
	mailed bool   // it posted mail
}

type moved struct {
	kind   Kind
	entity int64
}

// Now is the transaction's time: one value for all its rows.
func (tx *Tx) Now() time.Time { return tx.now }

// Actor is who does what this transaction does.
func (tx *Tx) Actor() Actor { return tx.actor }

// Revision is the tailnet's newest revision, before this transaction.
func (tx *Tx) Revision() (Revision, error) { return tx.state.revision, nil }

// NextRevision is the revision that this transaction makes if it writes.
func (tx *Tx) NextRevision() Revision { return tx.state.revision + 1 }

// note appends a change, once for each thing that moves.
func (tx *Tx) note(kind Kind, entity int64) {
	m := moved{kind, entity}
	// The last few are enough to look at: repetitions come close together, and
	// a batch of states has none.
	for _, have := range tx.moved[max(0, len(tx.moved)-16):] {
		if have == m {
			return
		}
	}
	tx.moved = append(tx.moved, m)
}

func (tx *Tx) noteNode(id tailcfg.NodeID) { tx.note(KindNode, int64(id)) }

// keep gives the transaction's work its revision and audit numbers. Only a Tx
// whose function succeeded is kept.
func (tx *Tx) keep() {
	t := tx.state
	if t == nil {
		return
	}
	tx.conn.store.suffixes.learn(tx.suffix)
	t.mailed = t.mailed || tx.mailed
	if len(tx.moved) > 0 {
		t.revision++
		for i, m := range tx.moved {
			t.changes = append(t.changes, changeRow{
				TailnetID: int64(t.id), Revision: int64(t.revision), Seq: int64(i + 1),
				Kind: int64(m.kind), Entity: m.entity, At: micros(tx.now),
			})
		}
	}
	for i := range tx.audits {
		e := &tx.audits[i]
		t.number++
		e.Number, e.PrevHash = t.number, t.head
		t.head = e.hash()
		t.audit = append(t.audit, auditToRow(e))
	}
}

// guard keeps PostgreSQL's transaction usable when a statement in fn is
// refused, as SQLite's is anyway.
func (tx *Tx) guard(fn func() error) error {
	if !tx.conn.store.pg {
		return fn()
	}
	if _, err := tx.exec("SAVEPOINT statement"); err != nil {
		return err
	}
	err := fn()
	end := "RELEASE SAVEPOINT statement"
	if err != nil {
		end = "ROLLBACK TO SAVEPOINT statement"
	}
	if tx.conn.fault != nil {
		return err
	}
	if _, endErr := tx.exec(end); endErr != nil {
		return endErr
	}
	return err
}
