package dbtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/db"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

func testPolicyStale(t *testing.T, f *fixture) {
	f.view(func(r *db.Reader) error {
		if _, err := r.Policy(); err != db.ErrNotFound {
			t.Errorf("no policy yet: %v", err)
		}
		return nil
	})
	set := func(text string, expected *db.Revision) (v *db.PolicyVersion, err error) {
		_, err = f.Update(t.Context(), f.tailnet, admin, func(tx *db.Tx) error {
			v, err = tx.SetPolicy([]byte(text), "note", expected)
			return err
		})
		return v, err
	}
	none := db.Revision(0)
	first, err := set("{}", &none)
	if err != nil {
		t.Fatal(err)
	}
	if first.Revision != f.revision() || first.Author != admin.Name {
		t.Errorf("stored at revision %d by %q, want %d by %q", first.Revision, first.Author, f.revision(), admin.Name)
	}
	f.node("moves-the-revision")
	second, err := set("{ /* two */ }", &first.Revision)
	if err != nil {
		t.Errorf("an edit of the live policy: %v", err)
	}
	for _, old := range []*db.Revision{&first.Revision, &none} {
		if _, err := set("{ /* lost */ }", old); !errors.Is(err, db.ErrStale) {
			t.Errorf("an edit of revision %d: %v, want ErrStale", *old, err)
		}
	}
	f.view(func(r *db.Reader) error {
		live, err := r.Policy()
		if !reflect.DeepEqual(live, second) {
			t.Errorf("live: %+v, want %+v", live, second)
		}
		versions, _ := r.PolicyVersions(10)
		if len(versions) != 2 || versions[0].ID != second.ID {
			t.Errorf("versions: %v", versions)
		}
		if v, err := r.PolicyVersion(first.ID); err != nil || string(v.Text) != "{}" {
			t.Errorf("the first version: %v, %v", v, err)
		}
		return err
	})
	if _, err := set("", nil); err != nil {
		t.Errorf("an empty text, unconditionally: %v", err)
	}
}

func testSettings(t *testing.T, f *fixture) {
	before := f.revision()
	f.update(func(tx *db.Tx) error { _, err := tx.PutSetting("dns", []byte(`{"magic":true}`)); return err })
	f.update(func(tx *db.Tx) error { _, err := tx.PutSetting("dns", []byte(`{"magic":true}`)); return err })
	if rev := f.revision(); rev != before+1 {
		t.Errorf("the same document twice made revisions %d to %d", before+1, rev)
	}
	f.update(func(tx *db.Tx) error { _, err := tx.PutSetting("dns", []byte(`{"magic":false}`)); return err })
	if err := f.try(func(tx *db.Tx) error { _, err := tx.PutSetting("dns", []byte(`{`)); return err }); err == nil {
		t.Error("a broken document was stored")
	}
	b := f.follow(before)
	if s := b.Settings["dns"]; s == nil || string(s.Value) != `{"magic":false}` || len(s.Hash) != 64 {
		t.Errorf("followers get %+v", b.Settings)
	}
	f.view(func(r *db.Reader) error {
		s, err := r.Setting("dns")
		if err == nil && !reflect.DeepEqual(s, b.Settings["dns"]) {
			t.Errorf("got %+v, want %+v", s, b.Settings["dns"])
		}
		if _, err := r.Setting("none"); err != db.ErrNotFound {
			t.Errorf("a setting that does not exist: %v", err)
		}
		return err
	})
}

func testPrimaries(t *testing.T, f *fixture) {
	a, b := f.node("a"), f.node("b")
	p4, p6 := netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")
	before := f.revision()
	f.update(func(tx *db.Tx) error {
		return errors.Join(tx.SetPrimary(p4, a.ID), tx.SetPrimary(p6, a.ID))
	})
	f.update(func(tx *db.Tx) error { return tx.SetPrimary(p4, a.ID) })
	if rev := f.revision(); rev != before+1 {
		t.Errorf("naming the primary again made revision %d", rev)
	}
	f.update(func(tx *db.Tx) error { return tx.SetPrimary(p4, b.ID) })
	check := func(after db.Revision, want map[netip.Prefix]tailcfg.NodeID) {
		t.Helper()
		batch := f.follow(after)
		if !batch.PrimariesChanged || !reflect.DeepEqual(batch.Primaries, want) {
			t.Errorf("followers get %v, %v; want %v", batch.PrimariesChanged, batch.Primaries, want)
		}
	}
	check(before, map[netip.Prefix]tailcfg.NodeID{p4: b.ID, p6: a.ID})
	rev := f.revision()
	f.update(func(tx *db.Tx) error { return tx.DeleteNode(a.ID) })
	check(rev, map[netip.Prefix]tailcfg.NodeID{p4: b.ID})
	rev = f.revision()
	f.update(func(tx *db.Tx) error { return tx.DeletePrimary(p4) })
	check(rev, map[netip.Prefix]tailcfg.NodeID{})
	rev = f.revision()
	f.update(func(tx *db.Tx) error { return tx.DeletePrimary(p4) })
	if f.revision() != rev {
		t.Error("deleting what is not there made a revision")
	}
	if err := f.try(func(tx *db.Tx) error { return tx.SetPrimary(p4, 4711) }); !errors.Is(err, db.ErrNotFound) {
		t.Errorf("a primary that does not exist: %v", err)
	}
}

func testSecrets(t *testing.T, f *fixture) {
	f.update(func(tx *db.Tx) error {
		if _, err := tx.Secret("noise"); err != db.ErrNotFound {
			t.Errorf("no secret yet: %v", err)
		}
		for _, offered := range []string{"first", "second"} {
			stored, err := tx.PutSecretIfAbsent("noise", []byte(offered))
			if err != nil || string(stored) != "first" {
				t.Errorf("offered %q, stored %q, %v", offered, stored, err)
			}
		}
		return nil
	})
	f.view(func(r *db.Reader) error {
		got, err := r.Secret("noise")
		if string(got) != "first" {
			t.Errorf("read %q", got)
		}
		return err
	})
}

func testInstances(t *testing.T, f *fixture) {
	before := f.revision()
	a := &db.Instance{Name: "a", Version: "1", Started: f.clock.Now()}
	b := &db.Instance{Name: "b", Version: "1", Started: f.clock.Now()}
	f.update(func(tx *db.Tx) error { return errors.Join(tx.Heartbeat(a), tx.Heartbeat(b)) })
	f.clock.Advance(time.Minute)
	again := &db.Instance{Name: "a", Version: "2", Started: f.clock.Now(), Revision: 1 << 40, Streams: 7}
	f.update(func(tx *db.Tx) error { return tx.Heartbeat(again) })
	if again.ID != a.ID || a.ID == b.ID || again.ID == 0 {
		t.Errorf("ids %d, %d, again %d", a.ID, b.ID, again.ID)
	}
	f.view(func(r *db.Reader) error {
		got, err := r.Instances()
		if want := []*db.Instance{again, b}; !reflect.DeepEqual(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
		return err
	})
	if rev := f.revision(); rev != before {
		t.Errorf("heartbeats made revision %d", rev)
	}
}

func testTombstones(t *testing.T, f *fixture) {
	n := f.node("gone")
	before := f.revision()
	f.update(func(tx *db.Tx) error { return tx.DeleteNode(n.ID) })
	b := f.follow(before)
	if got, there := b.Nodes[n.ID]; !there || got != nil {
		t.Errorf("followers are told %v, want the node to be gone", b.Nodes)
	}
	lookup := func() (stone *db.Tombstone, err error) {
		f.view(func(r *db.Reader) error { stone, err = r.Tombstone(n.MachineKey, n.NodeKey); return nil })
		return stone, err
	}
	got, err := lookup()
	if err != nil || got.Node != n.ID || got.StableID != n.StableID || got.Name != n.GivenName || !got.Deleted.Equal(f.clock.Now()) {
		t.Errorf("got %+v, %v", got, err)
	}
	f.view(func(r *db.Reader) error {
		if _, err := r.Tombstone(n.MachineKey, key.NewNode().Public()); err != db.ErrNotFound {
			t.Errorf("another node key of the machine: %v", err)
		}
		return nil
	})
	f.clock.Advance(180*24*time.Hour - time.Second)
	f.update(func(tx *db.Tx) error {
		if n, err := tx.SweepTombstones(); n != 0 || err != nil {
			t.Errorf("swept %d before their time, %v", n, err)
		}
		return nil
	})
	f.clock.Advance(time.Second)
	if _, err := lookup(); err != db.ErrNotFound {
		t.Errorf("after 180 days: %v", err)
	}
	f.update(func(tx *db.Tx) error {
		if n, err := tx.SweepTombstones(); n != 1 || err != nil {
			t.Errorf("swept %d, want 1, %v", n, err)
		}
		return nil
	})
	n = f.node("gone")
	f.update(func(tx *db.Tx) error { return tx.DeleteNode(n.ID) })
	f.update(func(tx *db.Tx) error { return tx.DeleteTombstones(n.MachineKey, n.NodeKey) })
	if _, err := lookup(); err != db.ErrNotFound {
		t.Errorf("after the client registered again: %v", err)
	}
	if err := f.try(func(tx *db.Tx) error { return tx.DeleteNode(n.ID) }); !errors.Is(err, db.ErrNotFound) {
		t.Errorf("deleting a node twice: %v", err)
	}
}

func testStranger(t *testing.T, f *fixture) {
	n := f.node("known")
	stranger := func(k key.MachinePublic) (is bool) {
		f.view(func(r *db.Reader) (err error) { is, err = r.Stranger(k); return err })
		return is
	}
	if stranger(n.MachineKey) {
		t.Error("a machine with a node is a stranger")
	}
	if !stranger(key.NewMachine().Public()) {
		t.Error("a new machine is known")
	}
	f.view(func(r *db.Reader) error {
		if is, err := r.In(f.tailnet + 1).Stranger(n.MachineKey); !is || err != nil {
			t.Errorf("in another tailnet: %t, %v", is, err)
		}
		return nil
	})
	f.update(func(tx *db.Tx) error { return tx.DeleteNode(n.ID) })
	if stranger(n.MachineKey) {
		t.Error("a machine whose node was deleted is a stranger")
	}
	f.update(func(tx *db.Tx) error { return tx.DeleteTombstones(n.MachineKey, n.NodeKey) })
	if !stranger(n.MachineKey) {
		t.Error("a forgotten machine is known")
	}
}

func testAuditChain(t *testing.T, f *fixture) {
	actor := db.Actor{Kind: "apikey", ID: 3, Name: "ci", KeyID: "kabc", Source: "192.0.2.9"}
	refused := errors.New("refused")
	for i := range 5 {
		_, err := f.Update(t.Context(), f.tailnet, actor, func(tx *db.Tx) error {
			for j := range 2 {
				if err := tx.Audit("node.rename", fmt.Sprintf("n%d", j), "old", map[string]int{"i": i}); err != nil {
					return err
				}
			}
			if i == 2 {
				return refused
			}
			return nil
		})
		if (err != nil) != (i == 2) {
			t.Fatal(err)
		}
	}
	var head int64
	f.view(func(r *db.Reader) error {
		events, err := r.AuditEvents(0, 100)
		if err != nil {
			return err
		}
		if len(events) != 8 {
			t.Fatalf("%d events, want 8", len(events))
		}
		for i, e := range events {
			if e.Number != int64(i+1) || e.Actor != actor || e.Action != "node.rename" || !e.Time.Equal(f.clock.Now()) ||
				string(e.Before) != `"old"` || !json.Valid(e.After) {
				t.Errorf("event %d: %+v", i+1, e)
			}
			if first := bytes.Count(e.PrevHash[:], []byte{0}) == 32; first != (i == 0) {
				t.Errorf("event %d: previous hash %x", i+1, e.PrevHash)
			}
		}
		head, err = r.VerifyAudit()
		return err
	})
	if head != 8 {
		t.Errorf("verified up to %d, want 8", head)
	}
}

func testMovedSince(t *testing.T, f *fixture) {
	start := f.revision()
	n := f.node("moves")
	made := f.revision()
	f.update(func(tx *db.Tx) error { return tx.PutNodeState(n.ID, db.NodeState{HomeDERP: 4}) })
	for _, c := range []struct {
		after db.Revision
		kinds []db.Kind
		want  bool
	}{
		{start, []db.Kind{db.KindNode}, true},
		{start, []db.Kind{db.KindUser, db.KindNode}, true},
		{start, []db.Kind{db.KindUser, db.KindPolicy}, false},
		{made, []db.Kind{db.KindNode}, false},
		{made, []db.Kind{db.KindNode, db.KindNodeState}, true},
		{made + 1, []db.Kind{db.KindNodeState}, false},
		{start, nil, false},
	} {
		f.update(func(tx *db.Tx) error {
			got, err := tx.MovedSince(c.after, c.kinds...)
			if err != nil || got != c.want {
				t.Errorf("moved after %d %v = %v, %v, want %v", c.after, c.kinds, got, err, c.want)
			}
			return nil
		})
	}
}

func testFollow(t *testing.T, f *fixture) {
	old := f.node("old")
	start := f.revision()
	if b := f.follow(start); b.Full || b.To != start || len(b.Changes) != 0 {
		t.Errorf("nothing moved: %+v", b)
	}
	n := f.node("new")
	f.update(func(tx *db.Tx) error { return tx.PutNodeState(n.ID, db.NodeState{HomeDERP: 4}) })
	f.update(func(tx *db.Tx) error { _, err := tx.SetPolicy([]byte("{}"), "", nil); return err })
	b := f.follow(start)
	want := []string{fmt.Sprintf("1:%d", n.ID), fmt.Sprintf("2:%d", n.ID), fmt.Sprintf("4:%d", b.Policy.ID)}
	if got := moved(b); !reflect.DeepEqual(got, want) {
		t.Errorf("changes %v, want %v", got, want)
	}
	if b.Full || b.From != start || b.To != start+3 || len(b.Nodes) != 1 || b.Nodes[n.ID].State.HomeDERP != 4 || b.PrimariesChanged {
		t.Errorf("batch %+v", b)
	}

	// Everything at once is the same as what was followed.
	full, err := f.Load(t.Context(), f.tailnet)
	if err != nil {
		t.Fatal(err)
	}
	if !full.Full || full.To != start+3 || len(full.Nodes) != 2 || len(full.Users) != 1 ||
		!reflect.DeepEqual(full.Nodes[n.ID], b.Nodes[n.ID]) || !reflect.DeepEqual(full.Policy, b.Policy) || full.Nodes[old.ID] == nil {
		t.Errorf("loaded %+v", full)
	}
	if b := f.follow(start + 100); !b.Full || b.To != start+3 {
		t.Errorf("a follower from the future: %+v", b)
	}
}

func testFollowAfterPruning(t *testing.T, f *fixture) {
	start := f.revision()
	n := f.node("n")
	for i := range 60 { // 50 revisions are kept
		f.update(func(tx *db.Tx) error { return tx.PutNodeState(n.ID, db.NodeState{HomeDERP: i}) })
	}
	if err := f.Prune(t.Context()); err != nil {
		t.Fatal(err)
	}
	if b := f.follow(start); !b.Full || len(b.Nodes) != 1 {
		t.Errorf("a follower who is too late gets %+v, want everything", b)
	}
	now := f.revision()
	if b := f.follow(now - 50); b.Full || len(b.Changes) != 50 {
		t.Errorf("a follower 50 revisions behind gets Full=%v and %d changes", b.Full, len(b.Changes))
	}
	// Old changes go even when they are few; who is up to date needs none.
	f.clock.Advance(time.Hour)
	if err := f.Prune(t.Context()); err != nil {
		t.Fatal(err)
	}
	if b := f.follow(now - 1); !b.Full {
		t.Errorf("the log still has changes of an hour ago: %+v", b)
	}
	if b := f.follow(now); b.Full || b.To != now {
		t.Errorf("a follower who is up to date gets %+v", b)
	}
}

func testWake(t *testing.T, f *fixture) {
	other, cancel := f.Subscribe()
	defer cancel()
	f.node("n")
	<-f.Wake()
	<-other
}

func testCommitsAreTimed(t *testing.T, f *fixture) {
	before := f.commits.Load()
	f.update(func(tx *db.Tx) error { return tx.CreateUser(&db.User{Name: "bea", Role: "member"}) })
	if n := f.commits.Load() - before; n != 1 {
		t.Errorf("a write was timed %d times, want once", n)
	}
	refusal := errors.New("no")
	if err := f.try(func(*db.Tx) error { return refusal }); err != refusal {
		t.Fatal(err)
	}
	if n := f.commits.Load() - before; n != 1 {
		t.Errorf("%d commits after a refused write, want 1", n)
	}
}

func testHealthy(t *testing.T, f *fixture) {
	if err := f.Healthy(t.Context()); err != nil {
		t.Error(err)
	}
	f.node("n")
	if err := f.Healthy(t.Context()); err != nil {
		t.Error(err)
	}
}
