package fault

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/integration/postgres"
	"github.com/signalbox-net/signalbox/integration/sim"
)

// nextKind is a kind of change that the present program does not know.
const nextKind = 999

// nextMigration is what a next version may do to the database while the present
// one works on it: it adds, and says that the present one may stay. What this
// one adds besides is that whatever moves a node is written as a change of the
// new kind, by all who write, so that nothing about nodes reaches a follower but
// by loading everything.
var nextMigration = fmt.Sprintf(`-- min_reader: 1
ALTER TABLE nodes ADD COLUMN berth text NOT NULL DEFAULT '';
CREATE TABLE berths (name text PRIMARY KEY, node_id bigint REFERENCES nodes (id));
CREATE FUNCTION next_kind() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.kind := %d; RETURN NEW; END $$;
CREATE TRIGGER next_kind BEFORE INSERT ON changes FOR EACH ROW WHEN (NEW.kind = 1) EXECUTE FUNCTION next_kind();
`, nextKind)

// nextBinary builds the server of the next version: the present one with one
// migration more.
func nextBinary(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/signalbox-net/signalbox").Output()
	if err != nil {
		t.Fatalf("find the module: %v", err)
	}
	migrations := filepath.Join(strings.TrimSpace(string(out)), "db/migrations")
	have, err := filepath.Glob(filepath.Join(migrations, "postgres", "*.sql"))
	if err != nil || len(have) == 0 {
		t.Fatalf("no migrations in %s: %v", migrations, err)
	}
	text := filepath.Join(dir, "next.sql")
	overlay := map[string]map[string]string{"Replace": {}}
	for _, dialect := range []string{"sqlite", "postgres"} {
		overlay["Replace"][filepath.Join(migrations, dialect, fmt.Sprintf("%04d_next.sql", len(have)+1))] = text
	}
	list, err := json.Marshal(overlay)
	if err != nil {
		t.Fatal(err)
	}
	for file, content := range map[string]string{text: nextMigration, filepath.Join(dir, "overlay.json"): string(list)} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	binary := filepath.Join(dir, "signalbox-next")
	build := exec.Command("go", "build", "-overlay", filepath.Join(dir, "overlay.json"), "-o", binary, "github.com/signalbox-net/signalbox/cmd/signalbox")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the next version: %v\n%s", err, out)
	}
	return binary
}

// query runs a statement that gives one row, past the servers.
func (x *Site) query(t *testing.T, query string, into ...any) {
	t.Helper()
	db, err := sql.Open("pgx", x.DB.DSN())
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.QueryRowContext(t.Context(), query).Scan(into...); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}

// moveTo has the machines of p come to a server, as clients do that have lost
// theirs.
func (p *party) moveTo(t *testing.T, s *Server, others ...string) {
	t.Helper()
	p.server, p.srv = s, s.Sim()
	for i, c := range p.conns {
		c.Close()
		p.conns[i], p.streams[i] = visit(t, p.srv, c.Machine(), "")
	}
	for _, l := range others {
		p.expect(t, l, shows(l))
	}
}

// mixed makes changes at each of two servers, which may be of two versions, and
// waits until the clients of both have them.
func (x *Site) mixed(t *testing.T, a, b *party, phase string) {
	t.Helper()
	for _, p := range []*party{a, b} {
		name := phase + map[*Server]string{x.A: "-a", x.B: "-b"}[p.server]
		p.alive(t, name)
		for _, q := range []*party{a, b} {
			q.expect(t, name, func(v *sim.View) bool { return v.Peer(name) != nil })
		}
		view := a.streams[0].View()
		id := view.Peer(name).ID
		p.server.Must("POST", fmt.Sprintf("/api/v1/node/%d/rename/%s-renamed", id, name), nil, nil)
		for _, q := range []*party{a, b} {
			q.expect(t, name+" renamed", func(v *sim.View) bool { return v.Peer(name+"-renamed") != nil && v.Peer(name) == nil })
		}
		text := fmt.Sprintf("// by %s\n%s", name, policyText(1))
		if err := p.server.setPolicy(t.Context(), text); err != nil {
			t.Fatal(err)
		}
		for _, q := range []*party{a, b} {
			var got policyRecord
			q.server.Must("GET", "/api/v1/policy", nil, &got)
			if got.Policy != text {
				t.Errorf("%s: %s shows the policy\n%s\nafter %s took\n%s", phase, q.server.Addr, got.Policy, p.server.Addr, text)
			}
		}
		p.server.Must("DELETE", fmt.Sprintf("/api/v1/node/%d", id), nil, nil)
		for _, q := range []*party{a, b} {
			q.expect(t, name+" deleted", func(v *sim.View) bool { return v.Peer(name+"-renamed") == nil })
		}
	}
	a.unbroken(t)
	b.unbroken(t)
	x.check(t, phase)
}

// TestRollingUpgrade replaces two servers by the next version, one after the
// other, while clients are at both.
func TestRollingUpgrade(t *testing.T) {
	swift(t)
	t.Parallel()
	present := Binary(t)
	x := StartSite(t, postgres.Start(t))
	next := nextBinary(t)
	var was, version, minReader int
	x.query(t, `SELECT version FROM "schema"`, &was)
	a, b := x.meet(t)

	// The next version comes beside the present one, whose clients see nobody go.
	end := neverOffline(t, a.streams[0], "guest-0-1", "guest-1-0", "guest-1-1")
	if code := x.B.Stop(); code != 0 {
		t.Errorf("server B ends with code %d", code)
	}
	b.moveTo(t, x.A, "guest-0-0", "guest-0-1")
	x.B.binary = next
	x.B.Start()
	x.query(t, `SELECT version, min_reader FROM "schema"`, &version, &minReader)
	if version != was+1 || minReader != 1 {
		t.Fatalf("the schema is %d with min_reader %d, want %d and 1: the next version is not the next", version, minReader, was+1)
	}
	b.moveTo(t, x.B, "guest-0-0", "guest-0-1")
	x.mixed(t, a, b, "beside")
	end()
	var unknown int
	x.query(t, fmt.Sprintf("SELECT count(*) FROM changes WHERE kind = %d", nextKind), &unknown)
	if unknown == 0 {
		t.Error("no change was of the kind that the present version does not know")
	}

	// The present one still starts on the newer schema, and then is replaced, too.
	for phase, binary := range []string{present, next} {
		end := neverOffline(t, b.streams[0], "guest-0-0", "guest-0-1", "guest-1-1")
		if code := x.A.Stop(); code != 0 {
			t.Errorf("server A ends with code %d", code)
		}
		a.moveTo(t, x.B, "guest-1-0", "guest-1-1")
		x.A.binary = binary
		x.A.Start()
		a.moveTo(t, x.A, "guest-1-0", "guest-1-1")
		x.mixed(t, a, b, []string{"again", "after"}[phase])
		end()
	}

	// The version after takes away what the first one needs. That one says so and leaves everything alone; the one between starts.
	x.exec(t, fmt.Sprintf(`UPDATE "schema" SET version = %d, min_reader = %d`, was+2, was+1))
	x.A.Stop()
	x.A.binary = present
	if x.A.Launch() {
		t.Fatal("a server starts on a schema that is too new for it")
	}
	last := x.A.Log.Tail(3)
	if code := x.A.ExitCode(); code != 1 || !containsAll(last, fmt.Sprintf("needs a program with schema %d or newer; this one has %d", was+1, was), "start version ") {
		t.Errorf("exit code %d; the server says:\n%s", code, last)
	}
	x.A.binary = next
	x.A.Start()
	a.moveTo(t, x.A, "guest-1-0", "guest-1-1")
	x.mixed(t, a, b, "finally")
}

// exec runs a statement past the servers.
func (x *Site) exec(t *testing.T, query string) {
	t.Helper()
	db, err := sql.Open("pgx", x.DB.DSN())
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := db.ExecContext(ctx, query); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}
