package netmap_test

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/db/dbtest"
)

var postgres dbtest.Postgres

func TestMain(m *testing.M) {
	code := m.Run()
	postgres.Stop()
	os.Exit(code)
}

// A mirror is a database that takes the history of a world, and the servers that follow it there.
type mirror struct {
	servers []*db.Store // on one database
	tailnet db.TailnetID
	next    int // which server reads next

	nodes     map[tailcfg.NodeID]bool // that it has
	users     map[tailcfg.UserID]bool
	primaries map[netip.Prefix]tailcfg.NodeID
}

// reflected makes a world whose snapshots come from a database with as many stores on it.
func reflected(t *testing.T, seed uint64, nodes, stores int, c db.Config) *world {
	w := newWorld(t, seed, nodes)
	m := &mirror{nodes: map[tailcfg.NodeID]bool{}, users: map[tailcfg.UserID]bool{}, primaries: map[netip.Prefix]tailcfg.NodeID{}}
	for range stores {
		s, err := db.Open(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		m.servers = append(m.servers, s)
	}
	var err error
	if m.tailnet, _, err = m.servers[0].Bootstrap(t.Context(), "default", func(*db.Tx) error { return nil }); err != nil {
		t.Fatal(err)
	}
	w.store = m
	m.write(w)
	w.now = w.load()
	for i := range w.replicas {
		w.replicas[i] = replica{snap: w.load()}
	}
	return w
}

// server is the one whose turn it is: all must read the same.
func (m *mirror) server() *db.Store {
	m.next++
	return m.servers[m.next%len(m.servers)]
}

func (m *mirror) load(w *world) *tailnet.Snapshot {
	w.t.Helper()
	b, err := m.server().Load(w.t.Context(), m.tailnet)
	if err != nil {
		w.t.Fatal(err)
	}
	s, err := tailnet.Build(nil, b)
	w.check(s, err)
	return s
}

func (m *mirror) follow(w *world, prev *tailnet.Snapshot) *db.Batch {
	w.t.Helper()
	b, err := m.server().Follow(w.t.Context(), m.tailnet, prev.Revision())
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

// write makes the world's step a revision.
func (m *mirror) write(w *world) {
	w.t.Helper()
	_, err := m.server().Update(w.t.Context(), m.tailnet, db.Actor{Kind: "test"}, func(tx *db.Tx) error { return m.step(w, tx) })
	if err != nil {
		w.t.Fatal(err)
	}
	for id, n := range w.step.Nodes {
		m.nodes[id] = n != nil
	}
	for id := range w.users {
		m.users[id] = true
	}
	m.primaries = maps.Clone(w.primaries)
}

func (m *mirror) step(w *world, tx *db.Tx) error {
	users := w.step.Users
	if len(m.users) == 0 {
		users = w.users
	}
	for _, id := range slices.Sorted(maps.Keys(users)) {
		u := *users[id]
		write := tx.CreateUser
		if m.users[id] {
			write = tx.PutUser
		}
		if err := write(&u); err != nil {
			return err
		}
		if u.ID != id {
			return fmt.Errorf("user %d has id %d in the database", id, u.ID)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(w.step.Nodes)) {
		if err := m.node(tx, id, w.step.Nodes[id]); err != nil {
			return err
		}
	}
	for name, s := range w.step.Settings {
		if _, err := tx.PutSetting(name, s.Value); err != nil {
			return err
		}
	}
	if w.step.Policy != nil {
		if _, err := tx.SetPolicy(w.step.Policy.Text, "", nil); err != nil {
			return err
		}
	}
	for p, id := range w.primaries {
		if m.primaries[p] != id {
			if err := tx.SetPrimary(p, id); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *mirror) node(tx *db.Tx, id tailcfg.NodeID, now *db.Node) error {
	switch {
	case now == nil:
		return tx.DeleteNode(id)
	case !m.nodes[id]:
		n := *now
		if err := tx.CreateNode(&n); err != nil {
			return err
		}
		if n.ID != id {
			return fmt.Errorf("node %d has id %d in the database", id, n.ID)
		}
		return nil
	}
	if err := tx.PutNode(now); err != nil {
		return err
	}
	return tx.PutNodeState(id, now.State)
}

// TestServersOnOneDatabaseSayTheSame runs histories through both databases. Servers that follow step by step, in leaps, or start anew have
// the same text for a viewer at each revision.
func TestServersOnOneDatabaseSayTheSame(t *testing.T) {
	t.Parallel()
	for name, open := range map[string]func(t *testing.T) (int, db.Config){
		"sqlite": func(t *testing.T) (int, db.Config) { return 1, db.Config{Path: filepath.Join(t.TempDir(), "s.db")} },
		"postgres": func(t *testing.T) (int, db.Config) {
			return 2, db.Config{Driver: db.DriverPostgres, PostgresDSN: postgres.DSN(t)}
		},
	} {
		for seed := range uint64(3) {
			t.Run(fmt.Sprintf("%s, seed %d", name, seed), func(t *testing.T) {
				stores, c := open(t)
				history(t, reflected(t, seed+100, 12, stores, c), 60, 4, 0)
			})
		}
	}
}
