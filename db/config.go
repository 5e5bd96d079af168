package db

import (
	"log/slog"
	"time"
)

// The drivers.
const (
	DriverSQLite   = "sqlite"
	DriverPostgres = "postgres"
)

// Config says which database to open.
type Config struct {
	Driver      string // DriverSQLite (also when empty) or DriverPostgres
	Path        string // SQLite: the file; it is created, with its directory, when missing
	PostgresDSN string // PostgreSQL: URL or key=value connection string

	// SecretsKey seals the secrets table with AES-256-GCM; 32 bytes. Empty:
	// secrets are stored as they are.
	SecretsKey []byte

	Version string           // of this program, for the logs and instances
	Now     func() time.Time // time.Now when nil
	Log     *slog.Logger     // discards when nil

	// OnCommit is told how long each transaction took that was committed, from
	// its beginning until it was on disk, the waits for locks and the work of all
	// who shared it included. It must not block. Nil: nobody is told.
	OnCommit func(time.Duration)

	// BusyTimeout is how long a statement waits for a lock that another process
	// holds; 5 s when zero.
	BusyTimeout time.Duration

	// WriteTimeout bounds an Update, queueing included; 9 s when zero.
	WriteTimeout time.Duration

	// MaxAuthRequests bounds the logins that wait for a person, in all and from
	// one source; 10,000 and 1,024 when zero.
	MaxAuthRequests          int
	MaxAuthRequestsPerSource int

	// RetainRevisions and RetainFor bound the change log, whichever is less; a
	// follower that is further behind loads everything. 100,000 and one hour
	// when zero.
	RetainRevisions int64
	RetainFor       time.Duration
}

func (c Config) withDefaults() Config {
	if c.Driver == "" {
		c.Driver = DriverSQLite
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.BusyTimeout == 0 {
		c.BusyTimeout = 5 * time.Second
	}
	if c.WriteTimeout == 0 {
		c.WriteTimeout = 9 * time.Second
	}
	if c.MaxAuthRequests == 0 {
		c.MaxAuthRequests = 10_000
	}
	if c.MaxAuthRequestsPerSource == 0 {
		c.MaxAuthRequestsPerSource = 1_024
	}
	if c.RetainRevisions == 0 {
		c.RetainRevisions = 100_000
	}
	if c.RetainFor == 0 {
		c.RetainFor = time.Hour
	}
	return c
}
