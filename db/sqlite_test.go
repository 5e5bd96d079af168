package db_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	_ "github.com/glebarez/go-sqlite"
	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/db/dbtest"
)

var admin = db.Actor{Kind: "cli", Name: "root"}

// A site is a SQLite database with a tailnet and a user.
type site struct {
	*db.Store
	path    string
	tailnet db.TailnetID
	user    *db.User
}

func newSite(t *testing.T, path string, c db.Config) *site {
	t.Helper()
	c.Path = path
	s := &site{path: path, Store: openSQLite(t, c)}
	t.Cleanup(func() { s.Close() })
	var err error
	s.tailnet, _, err = s.Bootstrap(t.Context(), "default", func(tx *db.Tx) error { return tx.CreateUser(&db.User{Name: "anna"}) })
	if err == nil {
		err = s.View(t.Context(), func(r *db.Reader) (err error) { s.user, err = r.UserByName("anna"); return err })
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// register adds a node and returns the Update's error.
func (s *site) register(name string) error {
	_, err := s.Update(context.Background(), s.tailnet, admin, func(tx *db.Tx) error {
		n := dbtest.NewNode(s.user)
		n.Hostname = strings.Repeat("x", 4000)
		if err := dbtest.Register(tx, n, pools, name); err != nil {
			return err
		}
		return tx.Audit("node.create", name, nil, nil)
	})
	return err
}

func (s *site) nodes(t *testing.T) int {
	t.Helper()
	n := 0
	err := s.View(t.Context(), func(r *db.Reader) error {
		nodes, err := r.Nodes()
		n = len(nodes)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func sqliteFile(t *testing.T) string { return filepath.Join(t.TempDir(), "signalbox.db") }

// raw is a connection past the Store, as another program would have.
func raw(t *testing.T, path string) *sql.DB {
	t.Helper()
	c, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	c.SetMaxOpenConns(1)
	t.Cleanup(func() { c.Close() })
	return c
}

func TestSQLiteFileIsPrivate(t *testing.T) {
	path := sqliteFile(t)
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s := newSite(t, path, db.Config{})
	if err := s.register("n"); err != nil {
		t.Fatal(err)
	}
	for _, suffix := range []string{"", "-wal", "-shm", ".lock"} {
		st, err := os.Stat(path + suffix)
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v; want 0600", filepath.Base(path+suffix), st.Mode(), err)
		}
	}
}

func TestSQLitePragmasAreReadBack(t *testing.T) {
	s := newSite(t, sqliteFile(t), db.Config{})
	for name, want := range map[string]string{"synchronous": "2", "journal_mode": "wal", "foreign_keys": "1", "busy_timeout": "5000"} {
		if err := s.CheckPragma(t.Context(), name, want); err != nil {
			t.Error(err)
		}
		if err := s.CheckPragma(t.Context(), name, "other"); err == nil {
			t.Errorf("a different %s was accepted", name)
		}
	}
	if err := s.ExecOnReader("DELETE FROM users"); err == nil {
		t.Error("a reading connection wrote")
	}
}

func TestSQLiteLockedByAnother(t *testing.T) {
	s := newSite(t, sqliteFile(t), db.Config{BusyTimeout: 200 * time.Millisecond})
	if err := s.register("before"); err != nil {
		t.Fatal(err)
	}
	other := raw(t, s.path)
	if _, err := other.Exec("BEGIN IMMEDIATE"); err != nil {
		t.Fatal(err)
	}
	// All who wait get the verdict together, not one after the other.
	const writers = 30
	start := time.Now()
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			if err := s.register(fmt.Sprintf("locked%d", i)); !errors.Is(err, db.ErrUnavailable) {
				t.Errorf("under another's lock: %v, want ErrUnavailable", err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("%d writers waited %v in all", writers, took)
	}
	if err := s.Healthy(t.Context()); !errors.Is(err, db.ErrUnavailable) || errors.Is(err, db.ErrCorrupt) {
		t.Errorf("health under another's lock: %v", err)
	}
	if err := s.Fault(); !errors.Is(err, db.ErrUnavailable) || errors.Is(err, db.ErrCorrupt) {
		t.Errorf("the last fault under another's lock: %v", err)
	}
	if n := s.nodes(t); n != 1 {
		t.Errorf("reads see %d nodes, want the 1 from before", n)
	}
	if _, err := other.Exec("ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	if err := s.Healthy(t.Context()); err != nil {
		t.Errorf("after the lock is gone: %v", err)
	}
	if err := s.register("after"); err != nil {
		t.Errorf("after the lock is gone: %v", err)
	}
	if err := s.Fault(); err != nil {
		t.Errorf("the last fault after the lock is gone: %v", err)
	}
	if n := s.nodes(t); n != 2 {
		t.Errorf("%d nodes, want 2: refused writes were kept", n)
	}
}

// closedFile makes a database of some pages and returns its content.
func closedFile(t *testing.T, path string, nodes int) []byte {
	t.Helper()
	s := newSite(t, path, db.Config{})
	for i := range nodes {
		if err := s.register(fmt.Sprintf("n%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func TestSQLiteDamageIsRefusedAtStart(t *testing.T) {
	path := sqliteFile(t)
	good := closedFile(t, path, 40)
	for what, damage := range map[string]func([]byte) []byte{
		"header":         func(b []byte) []byte { copy(b, "not a database!!"); return b },
		"schema page":    func(b []byte) []byte { copy(b[100:], bytes.Repeat([]byte{0xff}, 200)); return b },
		"truncated":      func(b []byte) []byte { return b[:len(b)/2/4096*4096] },
		"pages of nodes": func(b []byte) []byte { clear(b[len(b)/2:]); return b },
	} {
		if err := os.WriteFile(path, damage(bytes.Clone(good)), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := db.Open(t.Context(), db.Config{Path: path})
		if err == nil {
			s.Close()
		}
		if !errors.Is(err, db.ErrCorrupt) {
			t.Errorf("%s: %v, want ErrCorrupt", what, err)
		}
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if n := newSite(t, path, db.Config{}).nodes(t); n != 40 {
		t.Errorf("the undamaged copy has %d nodes, want 40", n)
	}
}

// A crash may leave any part of the last transaction in the log. What was
// acknowledged before it is served, what was not is not.
func TestSQLiteTornLog(t *testing.T) {
	path := sqliteFile(t)
	s := newSite(t, path, db.Config{})
	for i := range 5 {
		if err := s.register(fmt.Sprintf("n%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	before, err := os.Stat(path + "-wal")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.register("torn"); err != nil {
		t.Fatal(err)
	}
	database, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.ReadFile(path + "-wal")
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		log  []byte
		want int
	}{
		"whole":      {log, 6},
		"cut short":  {log[:len(log)-100], 5},
		"at a frame": {log[:before.Size()], 5},
		"garbled":    {append(log[:len(log)-50:len(log)-50], bytes.Repeat([]byte{0xaa}, 50)...), 5},
	} {
		copied := sqliteFile(t)
		if err := errors.Join(os.WriteFile(copied, database, 0o600), os.WriteFile(copied+"-wal", c.log, 0o600)); err != nil {
			t.Fatal(err)
		}
		site := newSite(t, copied, db.Config{})
		if n := site.nodes(t); n != c.want {
			t.Errorf("%s: %d nodes, want %d", what, n, c.want)
		}
		if err := site.register("after"); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestSQLiteDamageAtRunTime(t *testing.T) {
	path := sqliteFile(t)
	good := closedFile(t, path, 200)
	s := newSite(t, path, db.Config{})
	bad := bytes.Clone(good)
	clear(bad[8*4096:])
	write := func(content []byte) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteAt(content, 0)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	write(bad)
	var err error
	for i := 0; i < 50 && err == nil; i++ {
		err = s.View(t.Context(), func(r *db.Reader) error { _, err := r.Nodes(); return err })
	}
	if !errors.Is(err, db.ErrCorrupt) || !errors.Is(err, db.ErrUnavailable) {
		t.Fatalf("reading damaged pages: %v, want ErrCorrupt", err)
	}
	if err := s.register("refused"); !errors.Is(err, db.ErrCorrupt) {
		t.Errorf("a write to a damaged database: %v, want ErrCorrupt", err)
	}
	if err := s.Healthy(t.Context()); !errors.Is(err, db.ErrCorrupt) {
		t.Errorf("health of a damaged database: %v, want ErrCorrupt", err)
	}
	if err := s.Fault(); !errors.Is(err, db.ErrCorrupt) {
		t.Errorf("the fault of a damaged database: %v, want ErrCorrupt", err)
	}
	write(good)
	if err := s.Healthy(t.Context()); err != nil {
		t.Errorf("after the file was restored: %v", err)
	}
	if err := s.register("after"); err != nil {
		t.Errorf("after the file was restored: %v", err)
	}
	if n := s.nodes(t); n != 201 {
		t.Errorf("%d nodes, want 201", n)
	}
}

func TestAuditTampering(t *testing.T) {
	path := sqliteFile(t)
	closedFile(t, path, 5)
	for tampering, where := range map[string]int64{
		"UPDATE audit_events SET target = 'x' WHERE number = 2":                      2,
		"DELETE FROM audit_events WHERE number = 3":                                  3,
		"DELETE FROM audit_events WHERE number = 5":                                  5,
		"UPDATE audit_events SET after = '{}' WHERE number = 5":                      5,
		"UPDATE audit_events SET number = 9 WHERE number = 1":                        1,
		"UPDATE audit_events SET time = time + 1, actor_name = 'b' WHERE number = 4": 4,
	} {
		copied := sqliteFile(t)
		content, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(copied, content, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		s := newSite(t, copied, db.Config{})
		if err := s.ExecOnWriter(tampering); err != nil {
			t.Fatal(err)
		}
		err = s.View(t.Context(), func(r *db.Reader) error { _, err := r.VerifyAudit(); return err })
		if bad, ok := errors.AsType[*db.AuditError](err); !ok || bad.Number != where {
			t.Errorf("%s: got %v, want an AuditError at %d", tampering, err, where)
		}
	}
}
