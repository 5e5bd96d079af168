package dbtest

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/db"
)

// take removes all mail for a server.
func (f *fixture) take(instance int64) (out []*db.Mail) {
	f.t.Helper()
	for more := true; more; {
		f.update(func(tx *db.Tx) error {
			got, err := tx.TakeMail(instance)
			more = len(got) > 0
			out = append(out, got...)
			return err
		})
	}
	return out
}

func (f *fixture) hasMail(instance int64) (has bool) {
	f.t.Helper()
	f.view(func(r *db.Reader) (err error) { has, err = r.HasMail(instance); return err })
	return has
}

func testMail(t *testing.T, f *fixture) {
	n := f.node("n")
	before := f.revision()
	box, cancel := f.Mailbox()
	defer cancel()
	call := &db.Mail{From: 1, To: 2, Call: "a", Node: n.ID, Body: []byte(`{"x":1}`)}
	f.update(func(tx *db.Tx) error { return tx.PostMail(call) })
	<-box
	answer := &db.Mail{From: 2, To: 1, Call: "a", Answer: true, Node: n.ID, Error: "no\x00pe", Body: []byte{0, 0xff, 1}}
	f.update(func(tx *db.Tx) error { return tx.PostMail(answer) })
	if f.revision() != before {
		t.Error("mail made a revision")
	}
	if !f.hasMail(1) || !f.hasMail(2) || f.hasMail(3) {
		t.Error("mail waits for others than those that it is for")
	}
	answer.Error = "nope"
	for instance, want := range map[int64]*db.Mail{2: call, 1: answer} {
		got := f.take(instance)
		if len(got) != 1 || !reflect.DeepEqual(got[0], want) {
			t.Errorf("server %d took %+v, want %+v", instance, got, want)
		}
		if again := f.take(instance); len(again) != 0 || f.hasMail(instance) {
			t.Errorf("server %d took it again: %v", instance, again)
		}
	}
	if call.ID == 0 || answer.ID <= call.ID || !call.Created.Equal(f.clock.Now()) {
		t.Errorf("ids %d and %d, created %v", call.ID, answer.ID, call.Created)
	}
	// Mail of a transaction that fails is not there.
	fails := errors.New("fails")
	err := f.try(func(tx *db.Tx) error {
		if err := tx.PostMail(&db.Mail{To: 2, Call: "lost"}); err != nil {
			return err
		}
		return fails
	})
	if err != fails || f.hasMail(2) {
		t.Errorf("after %v mail is there: %v", err, f.hasMail(2))
	}
}

func testMailBounds(t *testing.T, f *fixture) {
	post := func(m *db.Mail) error { return f.try(func(tx *db.Tx) error { return tx.PostMail(m) }) }
	for what, m := range map[string]*db.Mail{
		"call":   {To: 2, Call: "big", Body: make([]byte, db.MaxMailCall+1)},
		"answer": {To: 2, Call: "big", Answer: true, Body: make([]byte, db.MaxMailAnswer+1)},
	} {
		if invalid, ok := errors.AsType[*db.InvalidError](post(m)); !ok || invalid.Field != "Body" {
			t.Errorf("a %s that is too long: %v", what, invalid)
		}
	}
	if err := post(&db.Mail{To: 3, Call: "big", Answer: true, Body: make([]byte, db.MaxMailAnswer)}); err != nil {
		t.Error("the longest answer:", err)
	}
	n := 0
	var err error
	for ; err == nil && n < 10_000; n++ {
		err = post(&db.Mail{To: 2, Call: strings.Repeat("x", n%5)})
	}
	if !errors.Is(err, db.ErrLimit) {
		t.Errorf("after %d mails: %v", n, err)
	}
	if err := post(&db.Mail{To: 1, Call: "other"}); err != nil {
		t.Error("a full mailbox keeps another one from getting mail:", err)
	}
	if got := f.take(2); len(got) != n-1 {
		t.Errorf("%d mails were taken, want %d", len(got), n-1)
	}

	for _, call := range []string{"a", "b"} {
		for _, to := range []int64{1, 2} {
			if err := post(&db.Mail{To: to, Call: call}); err != nil {
				t.Fatal(err)
			}
		}
	}
	f.update(func(tx *db.Tx) error { return tx.DropMail("a") })
	if got := f.take(2); len(got) != 1 || got[0].Call != "b" {
		t.Errorf("after a call was dropped there is %v", got)
	}
	f.clock.Advance(10*time.Minute - time.Second)
	f.update(func(tx *db.Tx) error { return tx.SweepMail() })
	if !f.hasMail(1) {
		t.Error("swept before its time")
	}
	f.clock.Advance(time.Second)
	f.update(func(tx *db.Tx) error { return tx.SweepMail() })
	if f.hasMail(1) || f.hasMail(3) {
		t.Error("mail that nobody takes stays")
	}
}

func testMailIsApart(t *testing.T, f *fixture) {
	other, _, err := f.Bootstrap(t.Context(), "other", func(tx *db.Tx) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	f.update(func(tx *db.Tx) error { return tx.PostMail(&db.Mail{To: 2, Call: "a"}) })
	_, err = f.Update(t.Context(), other, admin, func(tx *db.Tx) error {
		if got, err := tx.TakeMail(2); err != nil || len(got) > 0 {
			t.Errorf("took %v of another tailnet, %v", got, err)
		}
		return errors.Join(tx.DropMail("a"), tx.SweepMail())
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := f.take(2); len(got) != 1 {
		t.Errorf("left are %v", got)
	}
}

func testUnhealthy(t *testing.T, f *fixture) {
	n, other := f.node("n"), f.node("other")
	set := func(unhealthy bool) db.Revision {
		return f.update(func(tx *db.Tx) error { return tx.SetUnhealthy(n.ID, unhealthy) })
	}
	before := f.revision()
	if rev := set(false); rev != before {
		t.Error("health that is no news made a revision")
	}
	rev := set(true)
	if again := set(true); rev != before+1 || again != rev {
		t.Errorf("revisions %d and %d, want %d once", rev, again, before+1)
	}
	b := f.follow(before)
	if got := b.Nodes[n.ID]; got == nil || !got.State.Unhealthy || b.Nodes[other.ID] != nil {
		t.Errorf("followers get %+v", b.Nodes)
	}
	// Other writes of the node leave it.
	f.update(func(tx *db.Tx) error {
		rec, err := tx.Node(n.ID)
		if err != nil {
			return err
		}
		rec.Hostname = "renamed"
		return errors.Join(tx.PutNode(rec), tx.PutNodeState(n.ID, db.NodeState{Online: true}))
	})
	all, err := f.Load(t.Context(), f.tailnet)
	if err != nil || !all.Nodes[n.ID].State.Unhealthy || !all.Nodes[n.ID].State.Online || all.Nodes[other.ID].State.Unhealthy {
		t.Errorf("loaded %+v, %v", all.Nodes, err)
	}
	before = f.revision()
	if rev := set(false); rev != before+1 {
		t.Errorf("revision %d, want %d", rev, before+1)
	}
	if got := f.follow(before).Nodes[n.ID]; got == nil || got.State.Unhealthy {
		t.Errorf("followers get %+v", got)
	}
	set(true)
	f.update(func(tx *db.Tx) error { return tx.DeleteNode(n.ID) })
	if err := f.try(func(tx *db.Tx) error { return tx.SetUnhealthy(n.ID, true) }); !errors.Is(err, db.ErrNotFound) {
		t.Errorf("of a node that does not exist: %v", err)
	}
}
