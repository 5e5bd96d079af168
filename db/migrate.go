package db

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

//go:embed migrations
var migrationFiles embed.FS

// A migration is one file NNNN_name.sql. Released files never change. Its
// first line, "-- min_reader: N", is the oldest program that can still work
// with the schema it leaves behind, by the number of that program's newest
// migration; so one version can run beside the next.
type migration struct {
	number    int
	minReader int
	name      string
	sql       string
}

func migrations(dialect string) ([]migration, error) {
	dir := path.Join("migrations", dialect)
	entries, err := fs.ReadDir(migrationFiles, dir)
	if err != nil {
		return nil, err
	}
	var out []migration
	for _, e := range entries {
		text, err := fs.ReadFile(migrationFiles, path.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		m := migration{name: e.Name(), sql: string(text)}
		number, _, _ := strings.Cut(e.Name(), "_")
		if m.number, err = strconv.Atoi(number); err != nil {
			return nil, fmt.Errorf("migration %s: %w", e.Name(), err)
		}
		first, _, _ := strings.Cut(m.sql, "\n")
		reader, ok := strings.CutPrefix(first, "-- min_reader: ")
		if m.minReader, err = strconv.Atoi(reader); err != nil || !ok {
			return nil, fmt.Errorf("migration %s: first line must be \"-- min_reader: N\"", e.Name())
		}
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b migration) int { return a.number - b.number })
	for i, m := range out {
		if m.number != i+1 {
			return nil, fmt.Errorf("migration %s: expected number %d", m.name, i+1)
		}
	}
	return out, nil
}

// migrateLock is the advisory lock that servers starting on one PostgreSQL
// database take turns by.
const migrateLock = 0x5349474e414c

const createSchema = `
CREATE TABLE IF NOT EXISTS "schema" (version bigint NOT NULL, min_reader bigint NOT NULL);
CREATE TABLE IF NOT EXISTS migrations (name text NOT NULL PRIMARY KEY, applied bigint NOT NULL);
CREATE TABLE IF NOT EXISTS schema_programs (version bigint NOT NULL PRIMARY KEY, program text NOT NULL);
`

// tooOld is the refusal of a program that is older than the database admits. It
// names the version that brought the schema which is needed at least.
func tooOld(ctx context.Context, c *sql.Conn, version, minReader, own int) error {
	needs := "a newer version"
	var program string
	// The name is a help only: without it the refusal is the same.
	err := c.QueryRowContext(ctx, fmt.Sprintf("SELECT program FROM schema_programs WHERE version = %d", minReader)).Scan(&program)
	if err == nil && program != "" {
		needs = "version " + program + " or newer"
	}
	return fmt.Errorf("the database has schema %d, which needs a program with schema %d or newer; this one has %d: start %s, or restore a backup from before the upgrade",
		version, minReader, own, needs)
}

// migrate applies the migrations that the database lacks, each in its own
// transaction. A database that a newer program has migrated is left alone if
// that schema still admits this program.
func (s *Store) migrate(ctx context.Context) error {
	dialect := "sqlite"
	if s.pg {
		dialect = "postgres"
	}
	all, err := migrations(dialect)
	if err != nil {
		return err
	}
	for {
		again, err := s.migrateOne(ctx, all)
		if err != nil || !again {
			return err
		}
	}
}

func (s *Store) migrateOne(ctx context.Context, all []migration) (again bool, err error) {
	raw, err := s.write.Conn(ctx)
	if err != nil {
		return false, s.fail(ctx, err)
	}
	defer raw.Close()
	begin := "BEGIN IMMEDIATE"
	if s.pg {
		begin = fmt.Sprintf("BEGIN; SELECT pg_advisory_xact_lock(%d); SET LOCAL statement_timeout = 0", migrateLock)
	}
	if _, err := raw.ExecContext(ctx, begin); err != nil {
		return false, s.fail(ctx, fmt.Errorf("begin migration: %w", err))
	}
	committed := false
	defer func() {
		if !committed {
			raw.ExecContext(context.WithoutCancel(ctx), "ROLLBACK")
		}
	}()
	exec := func(query string, args ...any) {
		if err == nil {
			_, err = raw.ExecContext(ctx, query, args...)
		}
	}
	exec(createSchema)
	var version, minReader int
	if err == nil {
		err = raw.QueryRowContext(ctx, `SELECT coalesce(max(version), 0), coalesce(max(min_reader), 0) FROM "schema"`).Scan(&version, &minReader)
	}
	if err != nil {
		return false, s.fail(ctx, fmt.Errorf("read the schema version: %w", err))
	}
	newest := len(all)
	if newest < minReader {
		return false, tooOld(ctx, raw, version, minReader, newest)
	}
	if version >= newest {
		return false, nil
	}
	m := all[version]
	exec(m.sql)
	exec(`DELETE FROM "schema"`)
	exec(fmt.Sprintf(`INSERT INTO "schema" (version, min_reader) VALUES (%d, %d)`, m.number, m.minReader))
	exec(fmt.Sprintf(`INSERT INTO migrations (name, applied) VALUES ('%s', %d)`, m.name, micros(s.now())))
	exec(fmt.Sprintf(`INSERT INTO schema_programs (version, program) VALUES (%d, '%s')`, m.number, strings.ReplaceAll(clean(s.c.Version), "'", "''")))
	exec("COMMIT")
	if err != nil {
		return false, fmt.Errorf("migration %s: %w", m.name, s.fail(ctx, err))
	}
	committed = true
	s.log.InfoContext(ctx, "database migrated", "migration", m.name)
	return true, nil
}

// SchemaVersion is the schema that the database has, and the oldest program
// that may use it.
func (s *Store) SchemaVersion(ctx context.Context) (version, minReader int, err error) {
	row := s.read.QueryRowContext(ctx, `SELECT version, min_reader FROM "schema"`)
	if err := row.Scan(&version, &minReader); err != nil {
		return 0, 0, s.fail(ctx, err)
	}
	return version, minReader, nil
}

var errSettings = errors.New("unsafe PostgreSQL setting")
