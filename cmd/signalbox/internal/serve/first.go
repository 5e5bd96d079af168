package serve

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/cmd/signalbox/internal/config"
	"github.com/signalbox-net/signalbox/db"
)

// system is who acts at a start.
var system = db.Actor{Kind: "system", Name: "serve"}

// database translates the configuration's part on storage.
func (s *server) database() (db.Config, error) {
	c := db.Config{Driver: db.DriverSQLite, Path: s.cfg.Database.SQLite.Path, Version: Version(), Log: s.log, OnCommit: s.times.committed}
	if s.cfg.Database.Type == "postgres" {
		c.Driver, c.PostgresDSN = db.DriverPostgres, postgresDSN(&s.cfg.Database.Postgres)
	}
	if path := s.cfg.Secrets.KeyFile; path != "" {
		b, err := os.ReadFile(path)
		if err != nil {
			return c, fmt.Errorf("secrets.key_file: %w", err)
		}
		if c.SecretsKey, err = sealingKey(b); err != nil {
			return c, fmt.Errorf("secrets.key_file: %s: %w", path, err)
		}
	}
	return c, nil
}

// postgresDSN is a connection string with every value quoted.
func postgresDSN(p *config.Postgres) string {
	var parts []string
	add := func(k, v string) {
		if v != "" {
			parts = append(parts, k+"='"+strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(v)+"'")
		}
	}
	add("host", p.Host)
	if p.Port != 0 {
		add("port", fmt.Sprint(p.Port))
	}
	add("dbname", p.Name)
	add("user", p.User)
	add("password", p.Pass)
	switch p.SSL {
	case "", "false":
		add("sslmode", "disable")
	case "true":
		add("sslmode", "require")
	default:
		add("sslmode", p.SSL)
	}
	return strings.Join(parts, " ")
}

// first makes the tailnet in an empty database: an owner, and a policy that lets a person's own devices reach each other and nothing else.
// Then, at every start, it takes the secrets and this server's row.
func (s *server) first(ctx context.Context) error {
	id, created, err := s.store.Bootstrap(ctx, "default", func(tx *db.Tx) error {
		owner := &db.User{Name: "admin", DisplayName: "Administrator", Role: "owner"}
		if err := tx.CreateUser(owner); err != nil {
			return fmt.Errorf("create the first user: %w", err)
		}
		if s.cfg.Policy.Mode != "file" {
			if _, err := tx.SetPolicy(acl.Default(), "default policy", nil); err != nil {
				return fmt.Errorf("store the default policy: %w", err)
			}
		}
		return tx.Audit("tailnet.create", "tailnet:default", nil, map[string]string{"user": owner.Name})
	})
	if err != nil {
		return fmt.Errorf("set up the tailnet: %w", err)
	}
	s.tailnet = id
	if created {
		s.log.Info("new tailnet", "user", "admin", "data", s.cfg.DataDir)
	}
	if err := s.enrol(ctx); err != nil {
		return err
	}
	return s.loadSecrets(ctx)
}

// enrol finds this server's row among those of the servers on this database, by the machine and the address that it listens on.
func (s *server) enrol(ctx context.Context) error {
	name, err := os.Hostname()
	if err != nil {
		name = "signalbox"
	}
	s.self = db.Instance{Name: name + " " + s.cfg.ListenAddr, Version: Version(), Started: s.started, Heartbeat: s.started}
	_, err = s.store.Update(ctx, s.tailnet, system, func(tx *db.Tx) error { return tx.Heartbeat(&s.self) })
	if err != nil {
		return fmt.Errorf("note this server: %w", err)
	}
	return nil
}

// keyTTL is how long the printed auth key is good for.
const keyTTL = time.Hour

// joinLine is what a start prints. An empty tailnet gets a key for its first device; later the operator makes keys himself, so that output
// which ends up in a log opens nothing for long.
func (s *server) joinLine(ctx context.Context) (string, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "Signalbox %s serves %s (data in %s)\n\n", Version(), s.cfg.ServerURL, s.cfg.DataDir)
	if s.replica.Current().Len() > 0 {
		fmt.Fprintf(&b, "Join a device:\n\n    tailscale up --login-server %s\n\nand approve it with the command that its page shows, or make a key: signalbox preauthkeys create --user admin\n", s.cfg.ServerURL)
		return b.String(), nil
	}
	secret, err := s.firstKey(ctx)
	if err != nil {
		return "", fmt.Errorf("make a key for the first device: %w", err)
	}
	fmt.Fprintf(&b, "Join the first device within an hour:\n\n    tailscale up --login-server %s --auth-key %s\n\n", s.cfg.ServerURL, secret)
	if !localOnly(s.cfg.ServerURL) {
		return b.String(), nil
	}
	b.WriteString(elsewhere(s.cfg.ServerURL, machineAddrs()))
	return b.String(), nil
}

// elsewhere says how a server that only this machine reaches is started for other devices. Plain HTTP is offered on private addresses alone;
// a machine without one is on the Internet, where only https is safe.
func elsewhere(serverURL string, private []netip.Addr) string {
	if len(private) == 0 {
		return "This address works on this machine only, which has no private one. For devices elsewhere use https: docs/install.md, \"A server on the Internet\"\n"
	}
	port := uint16(8080)
	if u, err := url.Parse(serverURL); err == nil {
		if n, err := strconv.ParseUint(cmp.Or(u.Port(), "80"), 10, 16); err == nil {
			port = uint16(n)
		}
	}
	var b strings.Builder
	b.WriteString("This address works on this machine only. For other devices start the server with an address that they reach:\n\n")
	for _, a := range private {
		fmt.Fprintf(&b, "    signalbox serve --url http://%s\n", netip.AddrPortFrom(a, port))
	}
	return b.String()
}

func (s *server) firstKey(ctx context.Context) (string, error) {
	secret, keyID, hash := db.NewKey(db.KeyAuth)
	_, err := s.ledger.Do(ctx, system, func(tx *db.Tx) error {
		owner, err := tx.UserByName("admin")
		if errors.Is(err, db.ErrNotFound) {
			users, lerr := tx.Users()
			if lerr != nil || len(users) == 0 {
				return errors.Join(err, lerr)
			}
			owner, err = users[0], nil
		}
		if err != nil {
			return err
		}
		k := &db.AuthKey{KeyID: keyID, Hash: hash, User: owner.ID, Description: "printed at the start of an empty tailnet", Preauthorized: true, Expires: tx.Now().Add(keyTTL)}
		if err := tx.CreateAuthKey(k); err != nil {
			return err
		}
		return tx.Audit("authkey.create", "authkey:"+keyID, nil, map[string]any{"user": owner.Name, "expires": k.Expires})
	})
	return secret, err
}

func localOnly(serverURL string) bool {
	u, err := url.Parse(serverURL)
	if err != nil {
		return false
	}
	h := u.Hostname()
	return h == "localhost" || strings.HasPrefix(h, "127.") || h == "::1"
}
