package db

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"net"
	"strings"

	gosqlite "github.com/glebarez/go-sqlite"
	"github.com/jackc/pgx/v5/pgconn"
	"gorm.io/gorm"
	sqlite3 "modernc.org/sqlite/lib"
)

// A storageFault is an error of the storage, not of the statement. It is an
// ErrUnavailable, or an ErrCorrupt.
type storageFault struct {
	cause   error
	corrupt bool
	retry   bool // PostgreSQL says that the same transaction may succeed now
}

func (f *storageFault) Error() string {
	if f.corrupt {
		return ErrCorrupt.Error() + ": " + f.cause.Error()
	}
	return ErrUnavailable.Error() + ": " + f.cause.Error()
}

func (f *storageFault) Unwrap() []error {
	if f.corrupt {
		return []error{ErrCorrupt, f.cause}
	}
	return []error{ErrUnavailable, f.cause}
}

// fail turns an error of a driver into what callers branch on. ctx is the one
// that the statement ran under: its end is the caller's wish, not a fault.
func (s *Store) fail(ctx context.Context, err error) error {
	if _, ok := errors.AsType[*storageFault](err); ok {
		return err
	}
	if errors.Is(err, sql.ErrNoRows) || errors.Is(err, gorm.ErrRecordNotFound) {
		return ErrNotFound
	}
	if ctx.Err() != nil && !errors.Is(context.Cause(ctx), errTooSlow) {
		return context.Cause(ctx)
	}
	var f *storageFault
	if e, ok := errors.AsType[*gosqlite.Error](err); ok {
		f, err = sqliteError(e)
	} else if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		f, err = postgresError(e)
	} else if connectionLost(err) || ctx.Err() != nil {
		f = &storageFault{cause: err, retry: ctx.Err() == nil}
	}
	if f == nil {
		return err
	}
	s.health.note(f)
	return f
}

func connectionLost(err error) bool {
	if _, ok := errors.AsType[net.Error](err); ok {
		return true
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return true
	}
	return errors.Is(err, driver.ErrBadConn) || errors.Is(err, sql.ErrConnDone) || errors.Is(err, sql.ErrTxDone) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), "conn closed")
}

// staleConnection is the failure of a connection that was made before, as
// opposed to one that cannot be made.
func staleConnection(ctx context.Context, err error) bool {
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok || ctx.Err() != nil {
		return false
	}
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return strings.HasPrefix(e.Code, "57P")
	}
	return connectionLost(err)
}

func sqliteError(e *gosqlite.Error) (*storageFault, error) {
	switch e.Code() {
	case sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
		// "constraint failed: UNIQUE constraint failed: nodes.tailnet_id, nodes.ipv4 (2067)"
		_, columns, _ := strings.Cut(e.Error(), "UNIQUE constraint failed: ")
		columns, _, _ = strings.Cut(columns, " (")
		return nil, &ExistsError{Field: fieldOf(columns[strings.LastIndex(columns, ".")+1:])}
	case sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
		return nil, errReference
	}
	switch e.Code() & 0xff {
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return &storageFault{cause: e, corrupt: true}, nil
	case sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED,
		sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PROTOCOL,
		sqlite3.SQLITE_PERM, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_NOLFS:
		return &storageFault{cause: e}, nil
	}
	return nil, e
}

// errReference is a row that points at one that its tailnet does not have. The
// only such column that callers set is a row's user.
var errReference = &InvalidError{Field: "User", Msg: "does not exist"}

func postgresError(e *pgconn.PgError) (*storageFault, error) {
	switch e.Code {
	case "23505":
		name := strings.TrimPrefix(e.ConstraintName, e.TableName+"_")
		name = strings.TrimSuffix(strings.TrimPrefix(name, "tailnet_id_"), "_key")
		return nil, &ExistsError{Field: fieldOf(name)}
	case "23503":
		return nil, errReference
	case "40001", "40P01", "57P01", "57P02", "57P03":
		return &storageFault{cause: e, retry: true}, nil
	case "25P03", "25P04", "57014", "55P03", "25006":
		return &storageFault{cause: e}, nil
	case "XX001", "XX002":
		return &storageFault{cause: e, corrupt: true}, nil
	}
	switch e.Code[:2] {
	case "08", "53", "57", "58", "XX", "F0":
		return &storageFault{cause: e}, nil
	}
	return nil, e
}

// fieldOf names the record's field of a column with a unique constraint.
func fieldOf(column string) string {
	switch column {
	case "node_key":
		return "NodeKey"
	case "stable_id":
		return "StableID"
	case "given_name":
		return "GivenName"
	case "ipv4":
		return "IPv4"
	case "ipv6":
		return "IPv6"
	case "name_key", "name":
		return "Name"
	case "provider_id", "provider_provider_id":
		return "ProviderID"
	case "key_id":
		return "KeyID"
	case "hash":
		return "Hash"
	}
	return ""
}
