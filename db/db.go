package db

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"gorm.io/gorm"
)

// A Store is an open database. All methods may be called at once from many
// goroutines.
type Store struct {
	c   Config
	log *slog.Logger
	pg  bool

	gorm  *gorm.DB // carries the dialect; its connections are chosen per call
	write *sql.DB  // SQLite: one connection; PostgreSQL: a few
	read  *sql.DB  // cannot write
	lock  *fileLock

	writer writer
	health health
	wake   *broadcast
	posts  *broadcast // of mail

	suffixes suffixHints

	// defaultTailnet is what View reads; 0 until it is known.
	defaultTailnet atomic.Int64

	// onStatement, when set before first use, sees every statement.
	onStatement func(query string)

	cancel    context.CancelFunc // ends the listener
	listener  sync.WaitGroup
	closeOnce sync.Once
	closeErr  error
}

// Open opens the database, brings its schema up to date and checks that it can
// be trusted: the settings that durability rests on are read back, and SQLite
// files are checked for damage (ErrCorrupt). A second process cannot open the
// same SQLite file. On PostgreSQL, Open starts a goroutine that listens for
// other servers' commits; Close ends it.
func Open(ctx context.Context, c Config) (*Store, error) {
	c = c.withDefaults()
	if n := len(c.SecretsKey); n != 0 && n != 32 {
		return nil, &InvalidError{Field: "SecretsKey", Msg: fmt.Sprintf("must have 32 bytes, not %d", n)}
	}
	s := &Store{c: c, log: c.Log, pg: c.Driver == DriverPostgres, wake: newBroadcast(), posts: newBroadcast(), suffixes: suffixHints{}}
	s.writer.store = s
	s.health.store = s
	var err error
	switch c.Driver {
	case DriverSQLite:
		err = s.openSQLite(ctx)
	case DriverPostgres:
		err = s.openPostgres(ctx)
	default:
		return nil, &InvalidError{Field: "Driver", Msg: fmt.Sprintf("%q is neither %q nor %q", c.Driver, DriverSQLite, DriverPostgres)}
	}
	if err == nil {
		err = s.migrate(ctx)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	if s.pg {
		s.startListener()
	}
	return s, nil
}

// Close ends the listener, waits for running writes and closes the database.
// Later calls return the first one's result.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		if s.cancel != nil {
			s.cancel()
		}
		s.listener.Wait()
		s.writer.close()
		var errs []error
		// The writer goes last: closing the last SQLite connection moves the
		// log into the database file, which a read-only one cannot do. A
		// damaged file keeps its log.
		last, first := s.write, s.read
		if s.health.refuseWrites() != nil {
			last, first = first, last
		}
		for _, pool := range []*sql.DB{first, last} {
			if pool != nil {
				errs = append(errs, pool.Close())
			}
		}
		if s.lock != nil {
			errs = append(errs, s.lock.Close())
		}
		s.closeErr = errors.Join(errs...)
	})
	return s.closeErr
}

// View runs fn on one consistent state of the database: what commits meanwhile
// is not seen. The Reader is scoped to the default tailnet (the first that
// Bootstrap made); Reader.In gives another. It is only valid until fn returns.
// fn's error is returned as it is.
func (s *Store) View(ctx context.Context, fn func(*Reader) error) error {
	return s.view(ctx, TailnetID(s.defaultTailnet.Load()), func(r *Reader) error {
		if r.tailnet == 0 {
			var id TailnetID
			if err := r.one(&id, "SELECT coalesce(min(id), 0) FROM tailnets"); err != nil {
				return err
			}
			s.defaultTailnet.CompareAndSwap(0, int64(id))
			r.tailnet = id
		}
		return fn(r)
	})
}

func (s *Store) view(ctx context.Context, tailnet TailnetID, fn func(*Reader) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, s.c.WriteTimeout, errTooSlow)
	defer cancel()
	opts := &sql.TxOptions{ReadOnly: true}
	if s.pg {
		opts.Isolation = sql.LevelRepeatableRead
	}
	tx, err := s.read.BeginTx(ctx, opts)
	for try := 0; err != nil && try < maxReaders && staleConnection(ctx, err); try++ {
		// An idle connection that the server has ended meanwhile: nothing was
		// read yet, so another one will do.
		tx, err = s.read.BeginTx(ctx, opts)
	}
	if err != nil {
		return s.fail(ctx, fmt.Errorf("begin read: %w", err))
	}
	defer tx.Rollback()
	c := &conn{ConnPool: tx, store: s, ctx: ctx}
	return fn(&Reader{g: s.session(ctx, c), conn: c, tailnet: tailnet})
}

// Shared reports whether other servers may write to this database too.
func (s *Store) Shared() bool { return s.pg }

// session is gorm on one connection.
func (s *Store) session(ctx context.Context, pool gorm.ConnPool) *gorm.DB {
	g := s.gorm.Session(&gorm.Session{NewDB: true, Context: ctx})
	g.Statement.ConnPool = pool
	return g
}

// now is the clock of all rows: times are stored in microseconds.
func (s *Store) now() time.Time { return s.c.Now().UTC().Truncate(time.Microsecond) }
