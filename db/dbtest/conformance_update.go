package dbtest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/signalbox-net/signalbox/db"
)

func testBootstrapOnce(t *testing.T, f *fixture) {
	var mu sync.Mutex
	made := 0
	ids := map[db.TailnetID]bool{}
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			id, created, err := f.Bootstrap(t.Context(), "second", func(tx *db.Tx) error {
				return tx.CreateUser(&db.User{Name: "bert"})
			})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
			}
			if created {
				made++
			}
			ids[id] = true
		})
	}
	wg.Wait()
	if made != 1 || len(ids) != 1 {
		t.Errorf("made %d times with ids %v, want once", made, ids)
	}
	broken := errors.New("no key file")
	if _, _, err := f.Bootstrap(t.Context(), "third", func(*db.Tx) error { return broken }); err != broken {
		t.Errorf("error of init: got %v", err)
	}
	_, created, err := f.Bootstrap(t.Context(), "third", func(*db.Tx) error { return nil })
	if err != nil || !created {
		t.Errorf("a tailnet whose init failed was kept: created=%v, %v", created, err)
	}
	f.view(func(r *db.Reader) error {
		if r.Tailnet() != f.tailnet {
			t.Errorf("View reads tailnet %d, want the default %d", r.Tailnet(), f.tailnet)
		}
		return nil
	})
}

func testUpdateFailureKeepsNothing(t *testing.T, f *fixture) {
	before := f.revision()
	refused := errors.New("refused")
	rev, err := f.Update(t.Context(), f.tailnet, admin, func(tx *db.Tx) error {
		if err := Register(tx, NewNode(f.user), pools, "lost"); err != nil {
			return err
		}
		if err := tx.Audit("node.create", "lost", nil, nil); err != nil {
			return err
		}
		return refused
	})
	if err != refused || rev != 0 {
		t.Errorf("got revision %d and %v, want the function's own error", rev, err)
	}
	f.view(func(r *db.Reader) error {
		nodes, err := r.Nodes()
		if len(nodes) != 0 {
			t.Errorf("%d nodes were kept", len(nodes))
		}
		if n, _, _ := r.AuditHead(); n != 0 {
			t.Errorf("%d audit events were kept", n)
		}
		return err
	})
	if got := f.revision(); got != before {
		t.Errorf("revision %d, want %d", got, before)
	}
	if _, err := f.Update(t.Context(), 4711, admin, func(*db.Tx) error { return nil }); !errors.Is(err, db.ErrNotFound) {
		t.Errorf("update of a tailnet that does not exist: %v", err)
	}
}

func testUpdateWithoutWrite(t *testing.T, f *fixture) {
	before := f.revision()
	rev := f.update(func(tx *db.Tx) error {
		if next := tx.NextRevision(); next != before+1 {
			t.Errorf("next revision %d, want %d", next, before+1)
		}
		return nil
	})
	if rev != before || f.revision() != before {
		t.Errorf("revision moved from %d to %d without a write", before, rev)
	}
	if rev = f.update(func(tx *db.Tx) error { return Register(tx, NewNode(f.user), pools, "one") }); rev != before+1 {
		t.Errorf("revision %d, want %d", rev, before+1)
	}
}

func testCancelledUpdate(t *testing.T, f *fixture) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	ran := false
	_, err := f.Update(ctx, f.tailnet, admin, func(*db.Tx) error { ran = true; return nil })
	if !errors.Is(err, context.Canceled) || ran {
		t.Errorf("cancelled before the start: ran=%v, %v", ran, err)
	}

	// One that waits behind a running one gives up without having run.
	ctx, cancel = context.WithCancel(t.Context())
	running, release := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		f.Update(context.Background(), f.tailnet, admin, func(*db.Tx) error { close(running); <-release; return nil })
	})
	<-running
	result := make(chan error, 1)
	wg.Go(func() {
		_, err := f.Update(ctx, f.tailnet, admin, func(*db.Tx) error { ran = true; return nil })
		result <- err
	})
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) || ran {
		t.Errorf("cancelled while waiting: ran=%v, %v", ran, err)
	}
	close(release)
	wg.Wait()

	// A started one is finished: success is not taken back.
	ctx, cancel = context.WithCancel(t.Context())
	_, err = f.Update(ctx, f.tailnet, admin, func(tx *db.Tx) error {
		cancel()
		return Register(tx, NewNode(f.user), pools, "kept")
	})
	if err != nil {
		t.Errorf("cancelled while running: %v", err)
	}
}

func testGroupCommitIsolation(t *testing.T, f *fixture) {
	const n = 60
	before := f.revision()
	var mu sync.Mutex
	revisions := map[db.Revision]string{}
	failed := errors.New("third")
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			name := fmt.Sprintf("node%d", i)
			defer func() {
				if p := recover(); (p != nil) != (i%3 == 1) {
					t.Errorf("%s: recovered %v", name, p)
				}
			}()
			rev, err := f.Update(t.Context(), f.tailnet, admin, func(tx *db.Tx) error {
				if err := Register(tx, NewNode(f.user), pools, name); err != nil {
					return err
				}
				switch i % 3 {
				case 1:
					panic("second")
				case 2:
					return failed
				}
				return nil
			})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case i%3 == 2 && err != failed:
				t.Errorf("%s: got %v, want its own error", name, err)
			case i%3 == 0 && err != nil:
				t.Errorf("%s: %v", name, err)
			case i%3 == 0:
				if other, twice := revisions[rev]; twice {
					t.Errorf("%s and %s share revision %d", name, other, rev)
				}
				revisions[rev] = name
			}
		})
	}
	close(start)
	wg.Wait()
	f.view(func(r *db.Reader) error {
		nodes, err := r.Nodes()
		if len(nodes) != n/3 {
			t.Errorf("%d nodes are there, want the %d whose updates succeeded", len(nodes), n/3)
		}
		return err
	})
	for rev := before + 1; rev <= before+n/3; rev++ {
		if revisions[rev] == "" {
			t.Errorf("nobody was given revision %d", rev)
		}
	}
}

func testRevisionsGapFree(t *testing.T, f *fixture) {
	const writers, each = 8, 12
	first := f.revision()
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				_, err := f.Update(t.Context(), f.tailnet, admin, func(tx *db.Tx) error {
					return Register(tx, NewNode(f.user), pools, fmt.Sprintf("n%d-%d", w, i))
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	finished := make(chan struct{})
	go func() { wg.Wait(); close(finished) }()

	// A follower that reads while others write sees each revision once, in
	// order, and holds all nodes at the end.
	at, nodes := first, map[int64]bool{}
	take := func() {
		b := f.follow(at)
		if b.Full {
			t.Fatal("the log was pruned under the follower")
		}
		for _, c := range b.Changes {
			if c.Revision != at+1 && c.Revision != at {
				t.Fatalf("revision %d follows %d", c.Revision, at)
			}
			at = c.Revision
		}
		if b.To != at {
			t.Fatalf("batch ends at %d, its changes at %d", b.To, at)
		}
		for id := range b.Nodes {
			nodes[int64(id)] = true
		}
	}
	for done := false; !done; {
		select {
		case <-finished:
			done = true
		case <-f.Wake():
		}
		take()
	}
	if at != first+writers*each || len(nodes) != writers*each {
		t.Errorf("followed to revision %d with %d nodes, want %d and %d", at, len(nodes), first+writers*each, writers*each)
	}
}

func testViewIsOneState(t *testing.T, f *fixture) {
	f.view(func(r *db.Reader) error {
		before, err := r.Nodes()
		if err != nil {
			return err
		}
		rev, err := r.Revision()
		if err != nil {
			return err
		}
		f.node("meanwhile")
		after, err := r.Nodes()
		if len(before) != len(after) {
			t.Errorf("a view saw %d nodes, then %d", len(before), len(after))
		}
		if again, _ := r.Revision(); again != rev {
			t.Errorf("a view saw revision %d, then %d", rev, again)
		}
		return err
	})
	refused := errors.New("refused")
	if err := f.View(t.Context(), func(*db.Reader) error { return refused }); err != refused {
		t.Errorf("View returned %v", err)
	}
}

func testTailnetsAreApart(t *testing.T, f *fixture) {
	mine := f.node("laptop")
	other, _, err := f.Bootstrap(t.Context(), "other", func(tx *db.Tx) error {
		u := &db.User{Name: "anna"}
		if err := tx.CreateUser(u); err != nil {
			return err
		}
		n := NewNode(u)
		if err := Register(tx, n, pools, "laptop"); err != nil {
			return err
		}
		if n.IPv4 != mine.IPv4 || n.GivenName != mine.GivenName {
			t.Errorf("the other tailnet's first node is %s %v, want %s %v", n.GivenName, n.IPv4, mine.GivenName, mine.IPv4)
		}
		if n.ID == mine.ID || u.ID == f.user.ID {
			t.Error("ids are used in two tailnets")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Update(t.Context(), other, admin, func(tx *db.Tx) error {
		if _, err := tx.Node(mine.ID); !errors.Is(err, db.ErrNotFound) {
			t.Errorf("read the other tailnet's node: %v", err)
		}
		if _, err := tx.NodeByNodeKey(mine.NodeKey); !errors.Is(err, db.ErrNotFound) {
			t.Errorf("found the other tailnet's node by key: %v", err)
		}
		if err := tx.DeleteNode(mine.ID); !errors.Is(err, db.ErrNotFound) {
			t.Errorf("deleted the other tailnet's node: %v", err)
		}
		if err := tx.PutNodeState(mine.ID, db.NodeState{Online: true}); !errors.Is(err, db.ErrNotFound) {
			t.Errorf("wrote the other tailnet's state: %v", err)
		}
		foreign := *mine
		if err := tx.PutNode(&foreign); !errors.Is(err, db.ErrNotFound) {
			t.Errorf("wrote the other tailnet's node: %v", err)
		}
		n := NewNode(f.user)
		if err := Register(tx, n, pools, "thief"); err == nil {
			t.Error("a node got an owner of the other tailnet")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	f.view(func(r *db.Reader) error {
		nodes, err := r.In(other).Nodes()
		if len(nodes) != 1 || nodes[0].Tailnet != other {
			t.Errorf("the other tailnet has %d nodes, want 1", len(nodes))
		}
		return err
	})
}

func testTxEnds(t *testing.T, f *fixture) {
	var kept *db.Tx
	f.update(func(tx *db.Tx) error { kept = tx; return nil })
	if _, err := kept.Nodes(); err == nil {
		t.Error("a Tx worked after its Update had returned")
	}
	if err := kept.CreateUser(&db.User{Name: "late"}); err == nil {
		t.Error("a Tx wrote after its Update had returned")
	}
	f.view(func(r *db.Reader) error {
		if _, err := r.UserByName("late"); !errors.Is(err, db.ErrNotFound) {
			t.Errorf("the late write is there: %v", err)
		}
		return nil
	})
}
