package db

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"gorm.io/gorm"
)

// A Reader reads one consistent state of the database, scoped to one tailnet.
// It is valid until the function that it was given to returns, and belongs to
// that function's goroutine. What it returns is the caller's. A row that does
// not exist, also one of another tailnet, is ErrNotFound.
type Reader struct {
	g       *gorm.DB
	conn    *conn
	tailnet TailnetID
}

// Tailnet is the tailnet that r reads.
func (r *Reader) Tailnet() TailnetID { return r.tailnet }

// In reads another tailnet in the same state of the database.
func (r *Reader) In(tailnet TailnetID) *Reader {
	return &Reader{g: r.g, conn: r.conn, tailnet: tailnet}
}

// Revision is the tailnet's newest revision.
func (r *Reader) Revision() (Revision, error) {
	var rev Revision
	err := r.one(&rev, "SELECT revision FROM tailnets WHERE id = ?", r.tailnet)
	return rev, err
}

func (r *Reader) err(err error) error { return r.conn.err(err) }

// exec runs a statement and returns how many rows it changed.
func (r *Reader) exec(query string, args ...any) (int64, error) {
	g := r.g.Exec(query, args...)
	return g.RowsAffected, r.err(g.Error)
}

// scan reads the one row of a query. More rows are ignored.
func (r *Reader) scan(query string, args []any, dest ...any) error {
	found := false
	err := r.rows(query, args, func(rows *sql.Rows) error {
		if found {
			return nil
		}
		found = true
		return rows.Scan(dest...)
	})
	if err == nil && !found {
		err = ErrNotFound
	}
	return err
}

// one reads a single value.
func (r *Reader) one(dest any, query string, args ...any) error {
	return r.scan(query, args, dest)
}

func (r *Reader) rows(query string, args []any, each func(*sql.Rows) error) error {
	rows, err := r.g.Raw(query, args...).Rows()
	if err != nil {
		return r.err(err)
	}
	defer rows.Close()
	for rows.Next() {
		if err := each(rows); err != nil {
			return r.err(err)
		}
	}
	return r.err(rows.Err())
}

// strings reads a query's only column.
func (r *Reader) strings(query string, args ...any) (map[string]bool, error) {
	out := map[string]bool{}
	err := r.rows(query, args, func(rows *sql.Rows) error {
		var s string
		err := rows.Scan(&s)
		out[s] = true
		return err
	})
	return out, err
}

// find reads rows of one table by gorm and converts them.
func find[Row, Record any](r *Reader, q *gorm.DB, convert func(*Row) (Record, error)) ([]Record, error) {
	var rows []Row
	if err := r.err(q.Find(&rows).Error); err != nil {
		return nil, err
	}
	out := make([]Record, len(rows))
	for i := range rows {
		var err error
		if out[i], err = convert(&rows[i]); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func findOne[Row, Record any](r *Reader, q *gorm.DB, convert func(*Row) (Record, error)) (Record, error) {
	found, err := find(r, q.Limit(1), convert)
	if err == nil && len(found) == 0 {
		err = ErrNotFound
	}
	if err != nil {
		var none Record
		return none, err
	}
	return found[0], nil
}

// mine is a query of rows of this tailnet.
func (r *Reader) mine() *gorm.DB { return r.g.Where("tailnet_id = ?", r.tailnet) }

// micros is how times are stored: microseconds since 1970, 0 for the zero time.
func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

func fromMicros(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.UnixMicro(n).UTC()
}

// clean makes a text that both databases store: PostgreSQL refuses NUL and
// invalid UTF-8, and a client's text must not make a write fail.
func clean(s string) string {
	if strings.IndexByte(s, 0) >= 0 {
		s = strings.ReplaceAll(s, "\x00", "")
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// keyText is a key's text form, "" for the zero key.
func keyText(k interface {
	IsZero() bool
	MarshalText() ([]byte, error)
}) string {
	if k.IsZero() {
		return ""
	}
	text, err := k.MarshalText()
	if err != nil {
		panic(err) // no key type of tailscale's returns an error
	}
	return string(text)
}

func parseKey(s string, k interface{ UnmarshalText([]byte) error }) error {
	if s == "" {
		return nil
	}
	return k.UnmarshalText([]byte(s))
}

// list is a JSON array; nil and empty are the same.
func list[T any](l []T) string {
	if len(l) == 0 {
		return "[]"
	}
	text, err := json.Marshal(l)
	if err != nil {
		panic(err) // only called with types that always marshal
	}
	return string(text)
}

func parseList[T any](s string) ([]T, error) {
	if s == "[]" || s == "" {
		return nil, nil
	}
	var l []T
	err := json.Unmarshal([]byte(s), &l)
	return l, err
}

// sortedTags is a sorted copy without repetitions.
func sortedTags(tags []string) []string {
	out := make([]string, len(tags))
	for i, t := range tags {
		out[i] = clean(t)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// damaged is a row that cannot be read back: its content is not what this
// package wrote.
func (r *Reader) damaged(what string, id int64, err error) error {
	return r.err(&storageFault{cause: fmt.Errorf("%s %d: %w", what, id, err), corrupt: true})
}
