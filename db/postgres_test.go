package db_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/db/dbtest"
)

func newPostgresSite(t *testing.T, dsn string, c db.Config) *site {
	t.Helper()
	c.Driver, c.PostgresDSN = db.DriverPostgres, dsn
	store, err := db.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	s := &site{Store: store}
	s.tailnet, _, err = s.Bootstrap(t.Context(), "default", func(tx *db.Tx) error { return tx.CreateUser(&db.User{Name: "anna"}) })
	if err == nil {
		err = s.View(t.Context(), func(r *db.Reader) (err error) { s.user, err = r.UserByName("anna"); return err })
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func connect(t *testing.T, dsn string) *pgx.Conn {
	t.Helper()
	c, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(context.Background()) })
	return c
}

// Two servers write at once: revisions are gap-free over both, each sees the
// other's commits, and a race for a single-use key has one winner.
func TestPostgresTwoServers(t *testing.T) {
	dsn := postgres.DSN(t)
	sites := []*site{newPostgresSite(t, dsn, db.Config{}), newPostgresSite(t, dsn, db.Config{})}
	first, err := sites[1].Load(t.Context(), sites[1].tailnet)
	if err != nil {
		t.Fatal(err)
	}
	const each = 20
	var wg sync.WaitGroup
	for i, s := range sites {
		for j := range each {
			wg.Go(func() {
				if err := s.register(fmt.Sprintf("n%d-%d", i, j)); err != nil {
					t.Error(err)
				}
			})
		}
	}
	at := first.To
	for at < first.To+2*each {
		select {
		case <-sites[1].Wake():
		case <-time.After(10 * time.Second):
			t.Fatalf("no wake-up at revision %d", at)
		}
		b, err := sites[1].Follow(t.Context(), sites[1].tailnet, at)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range b.Changes {
			if c.Revision != at+1 {
				t.Fatalf("revision %d follows %d", c.Revision, at)
			}
			at = c.Revision
		}
	}
	wg.Wait()

	_, keyID, hash := db.NewKey(db.KeyAuth)
	_, err = sites[0].Update(t.Context(), sites[0].tailnet, admin, func(tx *db.Tx) error {
		return tx.CreateAuthKey(&db.AuthKey{KeyID: keyID, Hash: hash})
	})
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	won := 0
	for i := range 50 {
		wg.Go(func() {
			s := sites[i%2]
			_, err := s.Update(t.Context(), s.tailnet, admin, func(tx *db.Tx) error {
				_, err := tx.RedeemAuthKey(keyID, hash, dbtest.NewNode(s.user).MachineKey)
				return err
			})
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			} else if !errors.Is(err, db.ErrKeyUsed) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won != 1 {
		t.Errorf("%d of 50 won a single-use key on two servers", won)
	}
}

// However much one server has to write, another one that waits for the tailnet's lock has its turn after a part of it.
func TestPostgresServersShareTheLock(t *testing.T) {
	dsn := postgres.DSN(t)
	busy, other := newPostgresSite(t, dsn, db.Config{}), newPostgresSite(t, dsn, db.Config{})
	const many = 40
	var written atomic.Int64
	gate, begun := make(chan struct{}), make(chan struct{})
	began := sync.OnceFunc(func() { close(begun) })
	var writers sync.WaitGroup
	write := func(fn func()) {
		writers.Go(func() {
			_, err := busy.Update(t.Context(), busy.tailnet, admin, func(tx *db.Tx) error {
				fn()
				_, err := tx.PutSetting("s", fmt.Append(nil, written.Add(1)))
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	write(func() { <-gate }) // the others gather behind it
	for range many {
		write(func() { began(); <-time.After(50 * time.Millisecond) })
	}
	for busy.Pending() < many {
		runtime.Gosched()
	}
	close(gate)
	<-begun
	if err := other.register("n"); err != nil {
		t.Error(err)
	}
	if n := written.Load(); n > many/2 {
		t.Errorf("the other server's write waited for %d of %d", n, many)
	}
	writers.Wait()
}

// What one server knows to be free may have been given out by the other.
func TestPostgresServersGiveNoAddressTwice(t *testing.T) {
	dsn := postgres.DSN(t)
	sites := []*site{newPostgresSite(t, dsn, db.Config{}), newPostgresSite(t, dsn, db.Config{})}
	for i := range 8 { // in turns, so that each knows free addresses from its last turn
		if err := sites[i%2].register(fmt.Sprintf("n%d", i)); err != nil {
			t.Fatal(err)
		}
	}
}

// Mail that one server posts wakes the other one.
func TestPostgresMailWakesTheOtherServer(t *testing.T) {
	dsn := postgres.DSN(t)
	a, b := newPostgresSite(t, dsn, db.Config{}), newPostgresSite(t, dsn, db.Config{})
	box, cancel := b.Mailbox()
	defer cancel()
	post := func(call string) {
		t.Helper()
		_, err := a.Update(t.Context(), a.tailnet, admin, func(tx *db.Tx) error { return tx.PostMail(&db.Mail{From: 1, To: 2, Call: call}) })
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, call := range []string{"first", "second"} {
		post(call)
		var got []*db.Mail
		// The signal of the listener's own beginning may come first.
		for len(got) == 0 {
			select {
			case <-box:
			case <-time.After(10 * time.Second):
				t.Fatalf("the %s mail woke nobody", call)
			}
			_, err := b.Update(t.Context(), b.tailnet, admin, func(tx *db.Tx) (err error) { got, err = tx.TakeMail(2); return err })
			if err != nil {
				t.Fatal(err)
			}
		}
		if got[0].Call != call {
			t.Errorf("took %+v, want the %s", got[0], call)
		}
	}
}

// A server that ends a connection in the middle of a transaction costs a retry,
// not an error.
func TestPostgresRetriesLostConnection(t *testing.T) {
	dsn := postgres.DSN(t)
	s := newPostgresSite(t, dsn, db.Config{})
	killer := connect(t, dsn)
	runs := 0
	rev, err := s.Update(t.Context(), s.tailnet, admin, func(tx *db.Tx) error {
		if runs++; runs == 1 {
			if _, err := killer.Exec(t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "+
				"WHERE datname = current_database() AND pid <> pg_backend_pid()"); err != nil {
				t.Fatal(err)
			}
		}
		return dbtest.Register(tx, dbtest.NewNode(s.user), pools, "again")
	})
	if err != nil || runs != 2 {
		t.Errorf("after %d runs: %v", runs, err)
	}
	if n := s.nodes(t); n != 1 {
		t.Errorf("%d nodes, want 1", n)
	}
	if b, err := s.Follow(t.Context(), s.tailnet, rev-1); err != nil || len(b.Changes) != 1 {
		t.Errorf("followed %+v, %v", b, err)
	}
	// The listener was cut off too: it comes back by itself.
	for len(s.Wake()) > 0 {
		<-s.Wake()
	}
	other := newPostgresSite(t, dsn, db.Config{})
	if err := other.register("elsewhere"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Wake():
	case <-time.After(10 * time.Second):
		t.Error("no wake-up after the listener's connection was ended")
	}
}

// A lock that somebody else holds bounds a write's wait, and nothing is kept.
func TestPostgresLockedByAnother(t *testing.T) {
	dsn := postgres.DSN(t)
	s := newPostgresSite(t, dsn, db.Config{WriteTimeout: 2 * time.Second})
	other := connect(t, dsn)
	if _, err := other.Exec(t.Context(), "BEGIN; SELECT * FROM tailnets FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := s.register("locked"); !errors.Is(err, db.ErrUnavailable) {
		t.Errorf("under another's lock: %v, want ErrUnavailable", err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("a write waited %v", took)
	}
	if n := s.nodes(t); n != 0 {
		t.Errorf("reads see %d nodes", n)
	}
	if _, err := other.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	if err := s.register("after"); err != nil {
		t.Errorf("after the lock is gone: %v", err)
	}
	if n := s.nodes(t); n != 1 {
		t.Errorf("%d nodes, want 1: a refused write was kept", n)
	}
}

func TestPostgresUnsafeServerIsRefused(t *testing.T) {
	for _, setting := range []string{"fsync", "full_page_writes"} {
		var own dbtest.Postgres
		dsn := own.DSN(t)
		t.Cleanup(own.Stop)
		if err := own.Exec("ALTER SYSTEM SET " + setting + " = off"); err != nil {
			t.Fatal(err)
		}
		if err := own.Ctl("restart", "-m", "fast"); err != nil {
			t.Fatal(err)
		}
		s, err := db.Open(t.Context(), db.Config{Driver: db.DriverPostgres, PostgresDSN: dsn})
		if err == nil {
			s.Close()
			t.Errorf("%s=off was accepted", setting)
		} else if !strings.Contains(err.Error(), setting) {
			t.Error(err)
		}
	}
	// synchronous_commit is ours to set, for each connection.
	dsn := postgres.DSN(t)
	name := connect(t, dsn).Config().Database
	if err := postgres.Exec("ALTER DATABASE " + name + " SET synchronous_commit = off"); err != nil {
		t.Fatal(err)
	}
	s := newPostgresSite(t, dsn, db.Config{})
	if err := s.register("n"); err != nil {
		t.Error(err)
	}
}

// The server crashes and comes back while nodes register: what was
// acknowledged is there, and writes go on without a new Open.
func TestPostgresImmediateRestart(t *testing.T) {
	var own dbtest.Postgres
	dsn := own.DSN(t)
	t.Cleanup(own.Stop)
	s := newPostgresSite(t, dsn, db.Config{})
	var mu sync.Mutex
	acknowledged := map[string]bool{}
	registered := make(chan struct{}, 1)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				name := fmt.Sprintf("n%d-%d", w, i)
				err := s.register(name)
				if err != nil && !errors.Is(err, db.ErrUnavailable) {
					t.Errorf("%s: %v, want ErrUnavailable", name, err)
				}
				if err != nil {
					continue
				}
				mu.Lock()
				acknowledged[name] = true
				mu.Unlock()
				select {
				case registered <- struct{}{}:
				default:
				}
			}
		})
	}
	<-registered
	for range 3 {
		if err := own.Ctl("restart", "-m", "immediate"); err != nil {
			t.Fatal(err)
		}
		// One that was on the way may still be announced: two are not.
		for range 2 {
			select {
			case <-registered:
			case <-time.After(10 * time.Second):
				t.Fatal("no registration succeeded within 10 s after the server was back")
			}
		}
	}
	close(stop)
	wg.Wait()
	b, err := s.Load(t.Context(), s.tailnet)
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for _, n := range b.Nodes {
		there[n.GivenName] = true
	}
	for name := range acknowledged {
		if !there[name] {
			t.Errorf("%s was acknowledged and is gone", name)
		}
	}
	if int(b.To) != len(b.Nodes)+1 {
		t.Errorf("revision %d with %d nodes and a user: there is a gap", b.To, len(b.Nodes))
	}
	err = s.View(t.Context(), func(r *db.Reader) error {
		n, err := r.VerifyAudit()
		if int(n) != len(b.Nodes) {
			t.Errorf("%d audit events for %d nodes", n, len(b.Nodes))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
