package db_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/db/dbtest"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

var pools = db.Pools{IPv4: netip.MustParsePrefix("100.64.0.0/10"), IPv6: netip.MustParsePrefix("fd7a:115c:a1e0::/48")}

func TestMigrationsMatch(t *testing.T) {
	sqlite, err := db.Migrations("sqlite")
	if err != nil {
		t.Fatal(err)
	}
	pg, err := db.Migrations("postgres")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(sqlite, pg) {
		t.Errorf("the dialects have different migrations: %v and %v", sqlite, pg)
	}
}

// A program starts on a newer schema if that admits it, and not otherwise.
func TestMinReader(t *testing.T) {
	path := sqliteFile(t)
	closedFile(t, path, 1)
	set := func(query string) {
		t.Helper()
		s := newSite(t, path, db.Config{})
		if err := errors.Join(s.ExecOnWriter(query), s.Close()); err != nil {
			t.Fatal(err)
		}
	}
	set(`UPDATE "schema" SET version = 99`)
	s := newSite(t, path, db.Config{})
	if version, minReader, err := s.SchemaVersion(t.Context()); version != 99 || minReader != 1 || err != nil {
		t.Errorf("schema %d, min_reader %d, %v; want 99 untouched", version, minReader, err)
	}
	if n := s.nodes(t); n != 1 {
		t.Errorf("%d nodes, want 1", n)
	}
	s.Close()
	set(`UPDATE "schema" SET min_reader = 98`)
	if s, err := db.Open(t.Context(), db.Config{Path: path}); err == nil {
		s.Close()
		t.Error("a schema that needs a newer program was opened")
	} else if !strings.Contains(err.Error(), "needs a program with schema 98") {
		t.Error(err)
	}
}

// TestNewerServerBeside has a newer program make a change of a kind that this
// one does not know. What it is about cannot be told, so all is loaded, and a
// transaction that depends on facts takes it for a change of each of them.
func TestNewerServerBeside(t *testing.T) {
	for name, open := range map[string]func(*testing.T) *site{
		"sqlite":   func(t *testing.T) *site { return newSite(t, sqliteFile(t), db.Config{}) },
		"postgres": func(t *testing.T) *site { return newPostgresSite(t, postgres.DSN(t), db.Config{}) },
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			if err := s.register("known"); err != nil {
				t.Fatal(err)
			}
			before, err := s.Load(t.Context(), s.tailnet)
			if err != nil {
				t.Fatal(err)
			}
			for _, query := range []string{
				"ALTER TABLE nodes ADD COLUMN of_the_next_version text NOT NULL DEFAULT 'x'",
				"UPDATE nodes SET given_name = 'renamed'",
				"UPDATE tailnets SET revision = revision + 1",
				"INSERT INTO changes (tailnet_id, revision, seq, kind, entity, at) SELECT id, revision, 1, 999, 7, 0 FROM tailnets",
			} {
				if err := s.ExecOnWriter(query); err != nil {
					t.Fatal(err)
				}
			}
			b, err := s.Follow(t.Context(), s.tailnet, before.To)
			if err != nil {
				t.Fatal(err)
			}
			if !b.Full || b.To != before.To+1 || len(b.Nodes) != 1 || len(b.Users) != len(before.Users) {
				t.Errorf("followed full=%v to %d with %d nodes, %d users", b.Full, b.To, len(b.Nodes), len(b.Users))
			}
			for id, n := range b.Nodes {
				if n.GivenName != "renamed" {
					t.Errorf("node %d is %q", id, n.GivenName)
				}
			}
			moved := func(after db.Revision, want bool) {
				t.Helper()
				_, err := s.Update(t.Context(), s.tailnet, admin, func(tx *db.Tx) error {
					got, err := tx.MovedSince(after, db.KindPolicy)
					if err == nil && got != want {
						t.Errorf("the policy moved since %d: %v, want %v", after, got, want)
					}
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			moved(before.To, true)
			moved(b.To, false)
			if err := s.register("after"); err != nil {
				t.Errorf("a write on the newer schema: %v", err)
			}
			moved(b.To, false) // only nodes moved
			b, err = s.Follow(t.Context(), s.tailnet, b.To)
			if err != nil || b.Full || len(b.Nodes) != 1 {
				t.Errorf("followed %+v, %v; want the new node alone", b, err)
			}
		})
	}
}

// A program that is too old for a PostgreSQL database is told which version it
// needs, and starts on the schema of one that admits it.
func TestPostgresMinReader(t *testing.T) {
	dsn := postgres.DSN(t)
	s := newPostgresSite(t, dsn, db.Config{Version: "9.8.7"})
	for _, query := range []string{
		`UPDATE "schema" SET version = 99`,
		`INSERT INTO schema_programs (version, program) VALUES (98, '9.9.0')`,
	} {
		if err := s.ExecOnWriter(query); err != nil {
			t.Fatal(err)
		}
	}
	again := newPostgresSite(t, dsn, db.Config{})
	if err := again.register("on-the-newer-schema"); err != nil {
		t.Error(err)
	}
	if version, minReader, err := again.SchemaVersion(t.Context()); version != 99 || minReader != 1 || err != nil {
		t.Errorf("schema %d, min_reader %d, %v; want 99 untouched", version, minReader, err)
	}
	if err := s.ExecOnWriter(`UPDATE "schema" SET min_reader = 98`); err != nil {
		t.Fatal(err)
	}
	tooOld, err := db.Open(t.Context(), db.Config{Driver: db.DriverPostgres, PostgresDSN: dsn})
	if err == nil {
		tooOld.Close()
		t.Fatal("a schema that needs a newer program was opened")
	}
	for _, want := range []string{"needs a program with schema 98", "start version 9.9.0 or newer"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	// One that ran before goes on: a contracting change comes a version after the last program that needs the old shape.
	if err := again.register("still-there"); err != nil {
		t.Error(err)
	}
}

// Released migrations never change: databases have run them as they were.
func TestReleasedMigrationsAreAsTheyWere(t *testing.T) {
	for dialect, want := range map[string][]string{
		"sqlite":   {"fb79e2f7e45394d9e3c249cccd1e19b7c30fca53fd3a65ed223e7e0a2ae81a3e"},
		"postgres": {"014b611a085b76f49ddf24f2a77d7b02f30d94e49157a33f858529b845a88aa1"},
	} {
		texts, err := db.MigrationSQL(dialect)
		if err != nil {
			t.Fatal(err)
		}
		for i, sum := range want {
			if got := fmt.Sprintf("%x", sha256.Sum256([]byte(texts[i]))); got != sum {
				t.Errorf("%s: migration %d has the hash %s, want %s", dialect, i+1, got, sum)
			}
		}
	}
}

// While servers are upgraded one by one, a program of schema 2 works on schema 3: nothing that it knows may look different.
func TestThirdSchemaOnlyAdds(t *testing.T) {
	path := sqliteFile(t)
	texts, err := db.MigrationSQL("sqlite")
	if err != nil {
		t.Fatal(err)
	}
	old := raw(t, path)
	for _, query := range []string{
		`CREATE TABLE "schema" (version bigint NOT NULL, min_reader bigint NOT NULL)`,
		`CREATE TABLE migrations (name text NOT NULL PRIMARY KEY, applied bigint NOT NULL)`,
		texts[0], texts[1], `INSERT INTO "schema" VALUES (2, 1)`,
		`INSERT INTO tailnets (name, created) VALUES ('default', 1)`,
		`INSERT INTO users VALUES (1, 1, 'anna', 'anna', '', '', '', '', NULL, '', 1)`,
	} {
		if _, err := old.Exec(query); err != nil {
			t.Fatalf("%v: %.80s", err, query)
		}
	}
	tables := func() map[string]string {
		rows, err := old.Query("SELECT name, coalesce(sql, '') FROM sqlite_schema")
		if err != nil {
			t.Fatal(err)
		}
		defer rows.Close()
		out := map[string]string{}
		for rows.Next() {
			var name, sql string
			if err := rows.Scan(&name, &sql); err != nil {
				t.Fatal(err)
			}
			out[name] = sql
		}
		return out
	}
	before := tables()
	old.Close()
	s := newSite(t, path, db.Config{})
	if s.user.Name != "anna" {
		t.Errorf("the user is %+v", s.user)
	}
	if version, minReader, err := s.SchemaVersion(t.Context()); version != len(texts) || minReader != 1 || err != nil {
		t.Errorf("schema %d, min_reader %d, %v; want %d and 1", version, minReader, err, len(texts))
	}
	if err := s.register("new"); err != nil {
		t.Error(err)
	}
	s.Close()
	old = raw(t, path)
	after := tables()
	for name, sql := range before {
		if after[name] != sql {
			t.Errorf("%s became %q, was %q", name, after[name], sql)
		}
	}
}

func TestSealedSecrets(t *testing.T) {
	path := sqliteFile(t)
	seal := db.Config{SecretsKey: []byte("0123456789abcdef0123456789abcdef")}
	s := newSite(t, path, seal)
	put := func(name, value string) string {
		t.Helper()
		var stored []byte
		_, err := s.Update(t.Context(), s.tailnet, admin, func(tx *db.Tx) (err error) {
			stored, err = tx.PutSecretIfAbsent(name, []byte(value))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return string(stored)
	}
	if got := put("noise", "privkey:1"); got != "privkey:1" {
		t.Errorf("stored %q", got)
	}
	put("mesh", "mesh-key")
	read := func() (value string, err error) {
		err = s.View(t.Context(), func(r *db.Reader) error {
			v, err := r.Secret("noise")
			value = string(v)
			return err
		})
		return value, err
	}
	if got, err := read(); got != "privkey:1" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
	var inClear int
	if err := raw(t, path).QueryRow("SELECT count(*) FROM secrets WHERE instr(value, 'privkey') > 0 OR NOT sealed").Scan(&inClear); err != nil || inClear != 0 {
		t.Errorf("%d secrets are in clear, %v", inClear, err)
	}
	for what, wrong := range map[string]db.Config{
		"without the key": {}, "under another key": {SecretsKey: make([]byte, 32)},
	} {
		s.Close()
		s = newSite(t, path, wrong)
		if got, err := read(); err == nil {
			t.Errorf("%s: read %q", what, got)
		}
	}
	// A row's name is sealed with it: exchanged rows do not open.
	s.Close()
	s = newSite(t, path, seal)
	if err := s.ExecOnWriter("UPDATE secrets SET value = (SELECT value FROM secrets WHERE name = 'mesh') WHERE name = 'noise'"); err != nil {
		t.Fatal(err)
	}
	if got, err := read(); err == nil {
		t.Errorf("another secret's value opened as %q", got)
	}
	if _, err := db.Open(t.Context(), db.Config{Path: sqliteFile(t), SecretsKey: []byte("short")}); err == nil {
		t.Error("a short secrets key was accepted")
	}
}

func TestParseKeyRefusesWhatIsNotAKey(t *testing.T) {
	secret, keyID, _ := db.NewKey(db.KeyAuth)
	if strings.Count(secret, "-") != 3 || !strings.HasPrefix(secret, "tskey-auth-"+keyID+"-") || len(keyID) != 16 {
		t.Errorf("key %q with id %q", secret, keyID)
	}
	flip := func(i int) string {
		b := []byte(secret)
		if b[i] == 'x' {
			b[i] = 'y'
		} else {
			b[i] = 'x'
		}
		return string(b)
	}
	bad := []string{"", "tskey", "tskey-auth-", secret[:len(secret)-1], secret + "0", strings.Replace(secret, "auth", "client", 1),
		strings.Replace(secret, "tskey-auth-k", "tskey-auth-x", 1), secret + "--TL", strings.Repeat("tskey-auth-", 1000)}
	for i := range secret {
		bad = append(bad, flip(i))
	}
	for _, s := range bad {
		if _, _, _, err := db.ParseKey(s); err != db.ErrKeyShape {
			t.Errorf("ParseKey(%q): %v, want ErrKeyShape", s, err)
		}
	}
}

// Operations on the paths that every client takes must not grow statements
// with the tailnet or with later edits.
func TestStatementsPerOperation(t *testing.T) {
	store := openSQLite(t, db.Config{Path: sqliteFile(t)})
	defer store.Close()
	var mu sync.Mutex
	var seen []string
	store.OnStatement(func(q string) { mu.Lock(); defer mu.Unlock(); seen = append(seen, q) })
	s := &site{Store: store, user: &db.User{Name: "anna"}}
	var err error
	s.tailnet, _, err = store.Bootstrap(t.Context(), "default", func(tx *db.Tx) error { return tx.CreateUser(s.user) })
	if err != nil {
		t.Fatal(err)
	}
	_, keyID, hash := db.NewKey(db.KeyAuth)
	node, next := dbtest.NewNode(s.user), dbtest.NewNode(s.user)
	update := func(fn func(*db.Tx) error) func() error {
		return func() error { _, err := store.Update(t.Context(), s.tailnet, admin, fn); return err }
	}
	for _, op := range []struct {
		what string
		want int // COMMIT goes past gorm and is not counted
		do   func() error
	}{
		// begin, lock, the user's live keys, insert | change row, revision
		{"create an auth key", 6, update(func(tx *db.Tx) error {
			return tx.CreateAuthKey(&db.AuthKey{KeyID: keyID, Hash: hash, User: s.user.ID})
		})},
		// begin, lock | key with its use, count, use | newest, candidates | name | node, state | audit, changes, revision
		{"register a node by key", 13, update(func(tx *db.Tx) error {
			if _, err := tx.RedeemAuthKey(keyID, hash, node.MachineKey); err != nil {
				return err
			}
			if err := dbtest.Register(tx, node, pools, "laptop"); err != nil {
				return err
			}
			return tx.Audit("node.create", "laptop", nil, nil)
		})},
		// begin, lock | name | node, state | changes, revision: addresses are known
		{"register the next node", 7, update(func(tx *db.Tx) error { return dbtest.Register(tx, next, pools, "phone") })},
		// begin, lock | existing ids, upsert | changes, revision
		{"report a node's state", 6, update(func(tx *db.Tx) error {
			return tx.PutNodeStates(map[tailcfg.NodeID]db.NodeState{node.ID: {DiscoKey: key.NewDisco().Public()}})
		})},
		// revision, changes, nodes, auth keys are not loaded
		{"follow", 3, func() error { _, err := store.Follow(t.Context(), s.tailnet, 1); return err }},
		{"follow when nothing moved", 1, func() error { _, err := store.Follow(t.Context(), s.tailnet, 5); return err }},
		{"load", 6, func() error { _, err := store.Load(t.Context(), s.tailnet); return err }},
	} {
		seen = nil
		if err := op.do(); err != nil {
			t.Fatalf("%s: %v", op.what, err)
		}
		if len(seen) != op.want {
			t.Errorf("%s took %d statements, want %d:\n%s", op.what, len(seen), op.want, strings.Join(seen, "\n"))
		}
	}
}

func TestStoreAfterClose(t *testing.T) {
	s := newSite(t, sqliteFile(t), db.Config{})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	if err := s.register("late"); !errors.Is(err, db.ErrUnavailable) {
		t.Errorf("a write after Close: %v, want ErrUnavailable", err)
	}
	if err := s.View(t.Context(), func(*db.Reader) error { return nil }); err == nil {
		t.Error("a read after Close worked")
	}
}
