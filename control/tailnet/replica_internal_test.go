package tailnet

import (
	"runtime"
	"testing"
	"time"
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
		r.announce(time.Now())
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

func TestFanOutLastsUntilTheLatestDelivery(t *testing.T) {
	first, err := Build(nil, &db.Batch{Full: true, To: 1, Users: map[tailcfg.UserID]*db.User{}})
	if err != nil {
		t.Fatal(err)
	}
	var took []time.Duration
	r := &Replica{published: make(chan struct{}), announced: make(chan struct{}), told: first}
	r.cfg.FanOut = func(d time.Duration) { took = append(took, d) }
	r.cur.Store(first)
	first.Delivered() // its sessions began with it
	step := func() *Snapshot {
		prev := r.Current()
		s, err := Build(prev, &db.Batch{From: prev.rev, To: prev.rev + 1})
		if err != nil {
			t.Fatal(err)
		}
		r.publish(prev, s)
		r.announce(time.Now())
		return s
	}
	s := step()
	s.Delivered()
	early := s.spread.Load()
	s.announced = s.announced.Add(-time.Second)
	s.Delivered()
	s.announced = s.announced.Add(time.Second)
	s.Delivered() // takes nothing back
	if late := s.spread.Load(); early <= 0 || late < int64(time.Second) {
		t.Errorf("the first delivery took %d ns, the latest %d", early, late)
	}
	if len(took) != 0 {
		t.Errorf("told before the end: %v", took)
	}
	step() // nobody has to write for this one
	step().Delivered()
	r.announce(time.Now()) // of nothing new
	if len(took) != 1 || took[0] < time.Second {
		t.Errorf("fan-outs took %v, want the one of over a second", took)
	}
	step()
	if len(took) != 2 {
		t.Errorf("fan-outs took %v, want two", took)
	}
}
