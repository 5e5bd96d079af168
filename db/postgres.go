package db

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"gorm.io/driver/postgres"
	"gorm.io/gorm"
)

const (
	// channel is the NOTIFY channel of commits.
	channel = "signalbox"
	// mailChannel is that of mail between servers.
	mailChannel = "signalbox_mail"
	// pollEvery bounds how long a lost notification delays a follower.
	pollEvery = time.Second
	// statementTimeout bounds one statement on the server's side.
	statementTimeout = "5s"
	// idleTimeout bounds how long a server that is paused or cut off in the
	// middle of a transaction keeps the others waiting for its locks.
	idleTimeout = "5s"
	// quietFor is how long the listener waits before it looks whether its
	// connection still carries anything.
	quietFor = 20 * time.Second
)

func (s *Store) openPostgres(ctx context.Context) error {
	config, err := s.postgresConfig()
	if err != nil {
		return err
	}
	s.write = stdlib.OpenDB(*config)
	s.write.SetMaxOpenConns(2)
	s.write.SetMaxIdleConns(2)
	reader := config.Copy()
	reader.RuntimeParams["default_transaction_read_only"] = "on"
	s.read = stdlib.OpenDB(*reader)
	s.read.SetMaxOpenConns(maxReaders)
	s.read.SetMaxIdleConns(maxReaders)
	if err := s.checkPostgres(ctx); err != nil {
		return err
	}
	s.gorm, err = gorm.Open(postgres.New(postgres.Config{Conn: s.write}), gormConfig(s.log))
	return err
}

// postgresConfig is the connection string with what we insist on: commits that
// are on disk when acknowledged, bounded statements, UTC, and the primary of a
// replicated cluster.
func (s *Store) postgresConfig() (*pgx.ConnConfig, error) {
	config, err := pgx.ParseConfig(s.c.PostgresDSN)
	if err != nil {
		// The error may quote the connection string, password included.
		return nil, &InvalidError{Field: "PostgresDSN", Msg: "cannot be parsed"}
	}
	for name, value := range map[string]string{
		"synchronous_commit":                  "on",
		"statement_timeout":                   statementTimeout,
		"idle_in_transaction_session_timeout": idleTimeout,
		"timezone":                            "UTC",
		"application_name":                    "signalbox",
	} {
		config.RuntimeParams[name] = value
	}
	if config.ConnectTimeout == 0 || config.ConnectTimeout > 4*time.Second {
		config.ConnectTimeout = 4 * time.Second
	}
	config.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsPrimary
	return config, nil
}

// checkPostgres refuses servers whose commits may be lost in a crash.
func (s *Store) checkPostgres(ctx context.Context) error {
	for _, pool := range []*sql.DB{s.write, s.read} {
		for name, bad := range map[string]string{"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"} {
			var got string
			if err := pool.QueryRowContext(ctx, "SELECT current_setting('"+name+"')").Scan(&got); err != nil {
				return fmt.Errorf("open PostgreSQL: %w", s.fail(ctx, err))
			}
			if got == bad {
				return fmt.Errorf("%w: %s is %s, so acknowledged writes could be lost", errSettings, name, got)
			}
		}
	}
	var encoding string
	if err := s.write.QueryRowContext(ctx, "SELECT current_setting('server_encoding')").Scan(&encoding); err != nil {
		return fmt.Errorf("open PostgreSQL: %w", s.fail(ctx, err))
	}
	if encoding != "UTF8" {
		return fmt.Errorf("%w: the database's encoding is %s, must be UTF8", errSettings, encoding)
	}
	return nil
}

// startListener wakes followers for commits of all servers.
func (s *Store) startListener() {
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.listener.Go(func() { s.listen(ctx) })
	s.listener.Go(func() { s.pollRevisions(ctx) })
}

// listen holds its own connection: a pooled one could be handed to another
// user between notifications.
func (s *Store) listen(ctx context.Context) {
	wait := newBackoff(50*time.Millisecond, 2*time.Second)
	for ctx.Err() == nil {
		err := s.listenOnce(ctx, wait.reset)
		if ctx.Err() != nil {
			return
		}
		s.log.WarnContext(ctx, "database listener interrupted", "err", err)
		// What was committed while nobody listened was not announced here.
		s.wake.signal()
		s.posts.signal()
		wait.sleep(ctx)
	}
}

func (s *Store) listenOnce(ctx context.Context, connected func()) error {
	config, err := s.postgresConfig()
	if err != nil {
		return err
	}
	c, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		c.Close(ctx)
	}()
	for _, name := range []string{channel, mailChannel} {
		if _, err := c.Exec(ctx, "LISTEN "+name); err != nil {
			return err
		}
	}
	connected()
	s.wake.signal()
	s.posts.signal()
	for {
		name, err := notified(ctx, c)
		if err != nil {
			return err
		}
		if name == mailChannel {
			s.posts.signal()
		} else {
			s.wake.signal()
		}
	}
}

// notified waits for a notification and returns its channel. A quiet connection
// is asked for an answer now and then: one that is dead gives no sign of it.
func notified(ctx context.Context, c *pgx.Conn) (channel string, err error) {
	for {
		wait, cancel := context.WithTimeout(ctx, quietFor)
		n, err := c.WaitForNotification(wait)
		cancel()
		if err == nil {
			return n.Channel, nil
		}
		if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			return "", err
		}
		ask, cancel := context.WithTimeout(ctx, 5*time.Second)
		err = c.Ping(ask)
		cancel()
		if err != nil {
			return "", err
		}
	}
}

// pollRevisions finds commits and mail whose notification was lost.
func (s *Store) pollRevisions(ctx context.Context) {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	var last, lastMail int64
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		var sum, mail int64
		qctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := s.read.QueryRowContext(qctx, "SELECT coalesce(sum(revision), 0)::bigint, (SELECT coalesce(max(id), 0) FROM mail) FROM tailnets").Scan(&sum, &mail)
		cancel()
		if err == nil && sum != last {
			last = sum
			s.wake.signal()
		}
		if err == nil && mail != lastMail {
			lastMail = mail
			s.posts.signal()
		}
	}
}

// A backoff doubles its waits up to a limit.
type backoff struct{ first, max, next time.Duration }

func newBackoff(first, max time.Duration) *backoff { return &backoff{first, max, first} }

func (b *backoff) reset() { b.next = b.first }

func (b *backoff) sleep(ctx context.Context) {
	t := time.NewTimer(b.next)
	defer t.Stop()
	b.next = min(2*b.next, b.max)
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
