package tailnet

import (
	"runtime"
	"testing"
	"weak"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/db"
)

// Sessions reach an announced snapshot after newer ones were published, and keep the way to it with it. That must not chain every snapshot
// there ever was to the newest.
func TestOldSnapshotsAreReleased(t *testing.T) {
	first, err := Build(nil, &db.Batch{Full: true, To: 1, Users: map[tailcfg.UserID]*db.User{}})
	if err != nil {
		t.Fatal(err)
	}
	r := &Replica{published: make(chan struct{}), announced: make(chan struct{}), told: first}
	r.cur.Store(first)
	step := func() *Snapshot {
		prev := r.Current()
		s, err := Build(prev, &db.Batch{From: prev.rev, To: prev.rev + 1, Users: map[tailcfg.UserID]*db.User{1: {ID: 1, Name: "u", DisplayName: string(rune('a' + prev.rev))}}})
		if err != nil {
			t.Fatal(err)
		}
		r.publish(prev, s)
		return s
	}
	var old []weak.Pointer[Snapshot]
	at := first
	for range 8 {
		step()
		r.announce()
		told, _ := r.News()
		step() // a newer one, before any session has moved
		if d := Diff(at, told); d != Diff(at, told) {
			t.Fatal("two sessions that go the same way do not share it")
		}
		old = append(old, weak.Make(at))
		at = told
	}
	at, first = nil, nil
	runtime.GC()
	runtime.GC()
	for i, p := range old[:len(old)-1] {
		if p.Value() != nil {
			t.Errorf("snapshot %d of %d is still held", i, len(old))
		}
	}
	runtime.KeepAlive(r)
}
