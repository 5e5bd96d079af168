package db

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
)

type auditRow struct {
	TailnetID int64 `gorm:"primaryKey;autoIncrement:false"`
	Number    int64 `gorm:"primaryKey;autoIncrement:false"`
	Time      int64
	ActorKind string
	ActorID   int64
	ActorName string
	KeyID     string
	Source    string
	Action    string
	Target    string
	Before    *string
	After     *string
	PrevHash  []byte
}

func (auditRow) TableName() string { return "audit_events" }

func auditToRow(e *AuditEvent) auditRow {
	return auditRow{
		TailnetID: int64(e.Tailnet), Number: e.Number, Time: micros(e.Time),
		ActorKind: e.Actor.Kind, ActorID: e.Actor.ID, ActorName: e.Actor.Name, KeyID: e.Actor.KeyID, Source: e.Actor.Source,
		Action: e.Action, Target: e.Target, Before: optional(string(e.Before)), After: optional(string(e.After)),
		PrevHash: e.PrevHash[:],
	}
}

func rowToAudit(r *auditRow) (*AuditEvent, error) {
	e := &AuditEvent{
		Number: r.Number, Tailnet: TailnetID(r.TailnetID), Time: fromMicros(r.Time),
		Actor:  Actor{Kind: r.ActorKind, ID: r.ActorID, Name: r.ActorName, KeyID: r.KeyID, Source: r.Source},
		Action: r.Action, Target: r.Target,
	}
	if r.Before != nil {
		e.Before = json.RawMessage(*r.Before)
	}
	if r.After != nil {
		e.After = json.RawMessage(*r.After)
	}
	copy(e.PrevHash[:], r.PrevHash)
	return e, nil
}

// hash is SHA-256 of the event's canonical encoding: a JSON array of all its
// fields in the order of the table, times in microseconds, documents as the
// text that is stored, the previous hash in hex.
func (e *AuditEvent) hash() [32]byte {
	text, err := json.Marshal([]any{
		e.Tailnet, e.Number, micros(e.Time), e.Actor.Kind, e.Actor.ID, e.Actor.Name, e.Actor.KeyID, e.Actor.Source,
		e.Action, e.Target, string(e.Before), string(e.After), hex.EncodeToString(e.PrevHash[:]),
	})
	if err != nil {
		panic(err) // strings and numbers always marshal
	}
	return sha256.Sum256(text)
}

// Audit records an act of the transaction's actor. before and after are
// marshalled to JSON; nil is none. Secrets must not be in them. The event gets
// its number when the transaction is kept: no act, no event, and no gap.
func (tx *Tx) Audit(action, target string, before, after any) error {
	e := AuditEvent{Tailnet: tx.tailnet, Time: tx.now, Action: clean(action), Target: clean(target), Actor: Actor{
		Kind: clean(tx.actor.Kind), ID: tx.actor.ID, Name: clean(tx.actor.Name),
		KeyID: clean(tx.actor.KeyID), Source: clean(tx.actor.Source),
	}}
	for _, d := range []struct {
		value any
		to    *json.RawMessage
	}{{before, &e.Before}, {after, &e.After}} {
		if d.value == nil {
			continue
		}
		text, err := json.Marshal(d.value)
		if err != nil {
			return fmt.Errorf("audit %s: %w", action, err)
		}
		*d.to = text
	}
	tx.audits = append(tx.audits, e)
	return nil
}

// AuditEvents returns up to limit events with numbers above after, in order.
func (r *Reader) AuditEvents(after int64, limit int) ([]*AuditEvent, error) {
	return find(r, r.mine().Where("number > ?", after).Order("number").Limit(limit), rowToAudit)
}

// AuditHead is the number and the hash of the newest event. Kept outside of
// this database, it proves that nothing up to it was rewritten.
func (r *Reader) AuditHead() (number int64, hash [32]byte, err error) {
	var head []byte
	err = r.scan("SELECT audit_number, audit_head FROM tailnets WHERE id = ?", []any{r.tailnet}, &number, &head)
	copy(hash[:], head)
	return number, hash, err
}

// An AuditError says where the audit chain does not hold.
type AuditError struct {
	Number int64
	Msg    string
}

func (e *AuditError) Error() string { return fmt.Sprintf("audit event %d: %s", e.Number, e.Msg) }

// VerifyAudit reads the tailnet's whole audit log and checks that its numbers
// have no gap and that each event carries the hash of the one before, up to
// the head. It returns how many events there are, or an AuditError.
func (r *Reader) VerifyAudit() (number int64, err error) {
	head, want, err := r.AuditHead()
	if err != nil {
		return 0, err
	}
	var prev [32]byte
	for number < head {
		events, err := r.AuditEvents(number, 1000)
		if err != nil {
			return number, err
		}
		if len(events) == 0 {
			break
		}
		for _, e := range events {
			if e.Number != number+1 {
				return number, &AuditError{number + 1, "is missing"}
			}
			if e.PrevHash != prev {
				return number, &AuditError{number, "was changed, or the event after it was"}
			}
			number, prev = e.Number, e.hash()
		}
	}
	if number != head {
		return number, &AuditError{number + 1, "is missing"}
	}
	if prev != want && head != 0 {
		return number, &AuditError{number, "was changed"}
	}
	return number, nil
}
