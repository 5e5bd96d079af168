package db

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/glebarez/sqlite"
	"gorm.io/gorm"
)

// maxReaders bounds the connections that only read.
const maxReaders = 8

func (s *Store) openSQLite(ctx context.Context) error {
	path, err := filepath.Abs(s.c.Path)
	if err != nil || s.c.Path == "" {
		return &InvalidError{Field: "Path", Msg: "no database file given"}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return fmt.Errorf("make the database directory: %w", err)
	}
	if err := checkFileSystem(filepath.Dir(path)); err != nil {
		return err
	}
	if s.lock, err = lockFile(path + ".lock"); err != nil {
		return err
	}
	if err := ownFile(path); err != nil {
		return err
	}
	// The driver applies pragmas from the DSN to each new connection. It knows
	// no other spelling: mattn's "_journal_mode=WAL" is ignored without a word.
	// _time_format must never be set: with it, the driver ignores _txlock.
	busy := strconv.FormatInt(s.c.BusyTimeout.Milliseconds(), 10)
	dsn := (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath()}).String() +
		"?_txlock=immediate&_pragma=busy_timeout(" + busy + ")&_pragma=journal_mode(WAL)" +
		"&_pragma=synchronous(FULL)&_pragma=foreign_keys(1)&_pragma=fullfsync(1)&_pragma=checkpoint_fullfsync(1)"
	want := map[string]string{
		"busy_timeout": busy, "journal_mode": "wal", "synchronous": "2", "foreign_keys": "1", "fullfsync": "1",
	}
	if err := s.checkBeforeOpen(ctx, strings.Replace(dsn, "?", "?mode=ro&", 1)); err != nil {
		return fmt.Errorf("check %s: %w", path, err)
	}
	if s.write, err = sql.Open(sqlite.DriverName, dsn); err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	s.write.SetMaxOpenConns(1)
	if err := s.checkSQLite(ctx, s.write, path, want); err != nil {
		return err
	}
	if s.read, err = sql.Open(sqlite.DriverName, strings.Replace(dsn, "_txlock=immediate&", "", 1)+"&_pragma=query_only(1)"); err != nil {
		return fmt.Errorf("open %s for reading: %w", path, err)
	}
	s.read.SetMaxOpenConns(maxReaders)
	s.read.SetMaxIdleConns(maxReaders)
	want["query_only"] = "1"
	if err := s.checkSQLite(ctx, s.read, path, want); err != nil {
		return err
	}
	s.gorm, err = gorm.Open(&sqlite.Dialector{Conn: s.write}, gormConfig(s.log))
	return err
}

// checkSQLite reads the pragmas back: a misspelt one is ignored without an
// error, and then a commit would not be on the disk when it is acknowledged.
func (s *Store) checkSQLite(ctx context.Context, pool *sql.DB, path string, want map[string]string) error {
	for name, value := range want {
		var got string
		if err := pool.QueryRowContext(ctx, "PRAGMA "+name).Scan(&got); err != nil {
			return fmt.Errorf("open %s: %w", path, s.fail(ctx, err))
		}
		if got != value {
			return fmt.Errorf("open %s: PRAGMA %s is %s, must be %s", path, name, got, value)
		}
	}
	return nil
}

// checkBeforeOpen looks for damage through a connection that cannot write. One
// that can would, when it is closed as the last, move the log into the damaged
// file and remove it, and with the log the only good copy of what it holds.
func (s *Store) checkBeforeOpen(ctx context.Context, dsn string) error {
	for _, writes := range []string{"_txlock=immediate&", "_pragma=journal_mode(WAL)&", "_pragma=synchronous(FULL)&"} {
		dsn = strings.Replace(dsn, writes, "", 1)
	}
	pool, err := sql.Open(sqlite.DriverName, dsn)
	if err != nil {
		return err
	}
	defer pool.Close()
	return s.quickCheck(ctx, pool)
}

// quickCheck is ErrCorrupt when SQLite finds the file damaged.
func (s *Store) quickCheck(ctx context.Context, pool *sql.DB) error {
	rows, err := pool.QueryContext(ctx, "PRAGMA quick_check(3)")
	if err != nil {
		return s.fail(ctx, err)
	}
	defer rows.Close()
	var found []string
	for rows.Next() {
		var line string
		if err := rows.Scan(&line); err != nil {
			return s.fail(ctx, err)
		}
		if line != "ok" {
			found = append(found, strings.TrimSpace(line))
		}
	}
	if err := rows.Err(); err != nil {
		return s.fail(ctx, err)
	}
	if len(found) == 0 {
		return nil
	}
	f := &storageFault{cause: errors.New(strings.Join(found, "; ")), corrupt: true}
	s.health.note(f)
	return f
}

// ownFile makes the database file private. SQLite gives its log and index
// files the same mode.
func ownFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open the database: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("open the database: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		if err := f.Chmod(0o600); err != nil {
			return fmt.Errorf("make the database private: %w", err)
		}
	}
	return nil
}
