// Package config reads the configuration of Signalbox.
//
// It owns the names, meanings and defaults of all keys: one table (schema.go)
// drives the YAML parser, the environment variables, the hints for mistyped
// keys and config-example.yaml. The names are Headscale's where Headscale has
// the key, so that its file works here. Reading reports every problem at once,
// each with file, line and column.
//
// The package reads the configuration file and looks at the key files that it
// names. It never opens a socket, never writes, and knows no other package of
// Signalbox: the serve command translates a Config into theirs.
//
// A flow:
//
//	cfg, err := config.Load(path, os.Environ(), config.Overrides{URL: url})
//	// err is a Problems: all of them, sorted by position
//	for _, w := range cfg.Warnings { log.Warn(w) }
//	if err := cfg.CheckFiles(false, nil); err != nil { … }
//
// Precedence, highest first: Overrides (command line), SIGNALBOX_A_B, then
// HEADSCALE_A_B variables, the file, the defaults. Relative paths of the file
// are relative to the file's directory, others to the working directory; every
// path in a Config is absolute.
package config

import (
	"log/slog"
	"net/netip"
	"os"
	"time"
)

// Config is a complete, checked configuration. What depends on other keys
// (paths under DataDir, listen addresses that follow --url, policy.mode) is
// filled in. It is read only after Load.
type Config struct {
	Path     string   // the file it was read from, absolute; empty without one
	Warnings []string // for the operator, each to be said once

	DataDir        string
	ServerURL      string // scheme, host and perhaps port, which is 0 only if it follows ListenAddr's; no slash at the end
	AllowPlainHTTP bool

	ListenAddr        string
	MetricsListenAddr string // empty: no metrics and debug listener
	TrustedProxies    []netip.Prefix
	ControlDialPlan   []DialCandidate
	FrameCacheMiB     int // bound of the encoded parts of maps that are kept

	Noise    Noise
	Prefixes Prefixes
	DERP     DERP

	DisableCheckUpdates bool

	Node        Node
	PreauthKeys PreauthKeys
	Database    Database

	ACMEURL   string
	ACMEEmail string
	TLS       TLS

	Log    Log
	Policy Policy
	DNS    DNS

	UnixSocket           string
	UnixSocketPermission os.FileMode

	Secrets Secrets
	CLI     CLI

	OIDC       OIDC
	LogTail    LogTail
	Taildrop   Taildrop
	AutoUpdate AutoUpdate
	Tuning     Tuning

	GRPCListenAddr    string // accepted, unused: there is no gRPC
	GRPCAllowInsecure bool

	origins map[string]Origin
}

// A DialCandidate is an element of control_dial_plan
// (tailcfg.ControlIPCandidate).
type DialCandidate struct {
	IP         netip.Addr
	StartDelay time.Duration // after the client begins to connect
	Timeout    time.Duration // from StartDelay on; positive
	Priority   int           // the higher the better
}

// Noise has the keys noise.*.
type Noise struct {
	PrivateKeyPath string // seeds an empty database; empty: the key is generated there
}

// Prefixes has the keys prefixes.*: where node addresses come from.
type Prefixes struct {
	V4, V6     netip.Prefix // either may be the zero Prefix, not both
	Allocation string       // "sequential" or "random"
}

// DERP has the keys derp.*.
type DERP struct {
	Server            DERPServer
	URLs              []string
	Paths             []string
	AutoUpdateEnabled bool
	UpdateFrequency   time.Duration
	Verify            DERPVerify
}

// DERPVerify has the keys derp.verify.*: relays that ask who is a member.
type DERPVerify struct {
	Allow []netip.Prefix // they may ask from here too, not only from the addresses of the DERP map
}

// DERPServer has the keys derp.server.*: the embedded relay and STUN.
type DERPServer struct {
	Enabled                            bool
	RegionID                           int
	RegionCode                         string
	RegionName                         string
	HostName                           string // name or IP literal that clients use
	VerifyClients                      bool
	ListenAddr                         string // TLS listener, used only while ServerURL is http
	STUNListenAddr                     string
	STUNSecondListenAddr               string // empty: no second STUN port
	PrivateKeyPath                     string
	AutomaticallyAddEmbeddedDERPRegion bool
	IPv4, IPv6                         netip.Addr // published; may be invalid
}

// Node has the keys node.*.
type Node struct {
	Expiry    time.Duration // of people's nodes; 0 is never. Tagged nodes never expire
	Ephemeral Ephemeral
	Routes    Routes
}

// Ephemeral has the keys node.ephemeral.*.
type Ephemeral struct {
	InactivityTimeout time.Duration
}

// Routes has the keys node.routes.*.
type Routes struct {
	HA RoutesHA
}

// RoutesHA has the keys node.routes.ha.*.
type RoutesHA struct {
	ProbeInterval, ProbeTimeout time.Duration
}

// PreauthKeys has the keys preauth_keys.*.
type PreauthKeys struct {
	RevokedRetention time.Duration
}

// Database has the keys database.*.
type Database struct {
	Type     string // "sqlite" or "postgres"
	Debug    bool
	Gorm     Gorm
	SQLite   SQLite
	Postgres Postgres
}

// Gorm has the keys database.gorm.*, accepted for Headscale's sake.
type Gorm struct {
	PrepareStmt, ParameterizedQueries, SkipErrRecordNotFound bool
	SlowThreshold                                            int // milliseconds
}

// SQLite has the keys database.sqlite.*.
type SQLite struct {
	Path              string
	WriteAheadLog     bool
	WALAutocheckpoint int
}

// Postgres has the keys database.postgres.*.
type Postgres struct {
	Host                string // name, address, or directory of the unix socket
	Port                int
	Name, User, Pass    string
	SSL                 string // "false", "true" or an sslmode of libpq
	MaxOpenConns        int
	MaxIdleConns        int
	ConnMaxIdleTimeSecs int
}

// TLS has the keys tls_*: certificate files, or ACME.
type TLS struct {
	CertPath, KeyPath string

	LetsEncryptHostname      string
	LetsEncryptCacheDir      string
	LetsEncryptChallengeType string // "HTTP-01" or "TLS-ALPN-01"
	LetsEncryptListen        string // where HTTP-01 challenges are answered
}

// Log has the keys log.*.
type Log struct {
	Level  string // trace, debug, info, warn, error
	Format string // text or json
}

// Slog returns the level for log/slog. Trace is one step below debug.
func (l Log) Slog() slog.Level {
	switch l.Level {
	case "trace":
		return slog.LevelDebug - 4
	case "debug":
		return slog.LevelDebug
	case "warn", "warning":
		return slog.LevelWarn
	case "error", "fatal", "panic", "disabled":
		return slog.LevelError
	}
	return slog.LevelInfo
}

// Policy has the keys policy.*.
type Policy struct {
	Mode    string // "file" or "database"
	Path    string
	Domains []string // domains of user:*@domain; empty: those of the users' e-mails and the base domain
}

// DNS has the keys dns.*.
type DNS struct {
	MagicDNS         bool
	BaseDomain       string
	OverrideLocalDNS bool
	Nameservers      Nameservers
	SearchDomains    []string
	ExtraRecords     []DNSRecord
	ExtraRecordsPath string
}

// Nameservers has the keys dns.nameservers.*. Each is an IP address or the URL
// of a DNS-over-HTTPS resolver.
type Nameservers struct {
	Global []string
	Split  map[string][]string // by domain
}

// DNSRecord is an element of dns.extra_records (tailcfg.DNSRecord).
type DNSRecord struct {
	Name  string
	Type  string // "A" or "AAAA"
	Value string // IP address
}

// Secrets has the keys secrets.*.
type Secrets struct {
	KeyFile string
}

// CLI has the keys cli.*: how the command line reaches a server.
type CLI struct {
	Address  string
	APIKey   string
	Timeout  time.Duration
	Insecure bool
}

// OIDC has the keys oidc.*.
type OIDC struct {
	OnlyStartIfOIDCIsAvailable bool
	Issuer                     string
	ClientID                   string
	ClientSecret               string
	ClientSecretPath           string
	Scope                      []string
	EmailVerifiedRequired      bool
	UseExpiryFromToken         bool
	ExtraParams                map[string]string
	AllowedDomains             []string
	AllowedUsers               []string
	AllowedGroups              []string
	PKCE                       PKCE
}

// PKCE has the keys oidc.pkce.*.
type PKCE struct {
	Enabled bool
	Method  string // "S256" or "plain"
}

// LogTail has the keys logtail.*.
type LogTail struct{ Enabled bool }

// Taildrop has the keys taildrop.*.
type Taildrop struct{ Enabled bool }

// AutoUpdate has the keys auto_update.*.
type AutoUpdate struct{ Enabled bool }

// Tuning has the keys tuning.*. They tune parts of Headscale that have no
// counterpart here; they are read so that a file that has them is not refused.
type Tuning struct {
	NotifierSendTimeout            time.Duration
	BatchChangeDelay               time.Duration
	NodeMapSessionBufferedChanSize int
	BatcherWorkers                 int
	RegisterCacheExpiration        time.Duration
	RegisterCacheMaxEntries        int
	NodeStoreBatchSize             int
	NodeStoreBatchTimeout          time.Duration
}

// Origin says where a value came from. The zero value is the default.
type Origin struct {
	File      string
	Line, Col int
	Env       string // name of the variable
	Flag      string // "--url"
}

// IsSet reports whether the key was given by a flag, a variable or the file.
func (c *Config) IsSet(key string) bool { return c.origins[key] != Origin{} }

// Origin returns where the key's value came from.
func (c *Config) Origin(key string) Origin { return c.origins[key] }

// Overrides are the values of the command line and the facts of the machine
// that defaults depend on.
type Overrides struct {
	DataDir        string // --data-dir
	URL            string // --url: sets server_url, all listen addresses and the relay's host name
	AllowPlainHTTP bool   // --allow-plain-http

	IsRoot  func() bool            // nil: the effective user of the process
	IsLocal func(netip.Addr) bool  // whether the address is one of this machine; nil: ask the system
	Getwd   func() (string, error) // nil: os.Getwd
}
