package config

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"
)

func load(t *testing.T, text string, env []string, o Overrides) (*Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if o.IsRoot == nil {
		o.IsRoot = func() bool { return false }
	}
	if o.IsLocal == nil {
		o.IsLocal = func(a netip.Addr) bool { return a.IsLoopback() || a == netip.MustParseAddr("10.1.2.3") }
	}
	if o.Getwd == nil {
		o.Getwd = func() (string, error) { return "/cwd", nil }
	}
	return Load(path, env, o)
}

func TestNoFileGivesAWorkingServer(t *testing.T) {
	c, err := Load("", nil, Overrides{IsRoot: func() bool { return false }, Getwd: func() (string, error) { return "/cwd", nil }})
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct{ what, got, want string }{
		{"data_dir", c.DataDir, "/cwd/signalbox-data"},
		{"server_url", c.ServerURL, "http://127.0.0.1:8080"},
		{"listen_addr", c.ListenAddr, "127.0.0.1:8080"},
		{"derp.server.listen_addr", c.DERP.Server.ListenAddr, "127.0.0.1:8443"},
		{"derp.server.stun_listen_addr", c.DERP.Server.STUNListenAddr, "127.0.0.1:3478"},
		{"derp.server.stun_second_listen_addr", c.DERP.Server.STUNSecondListenAddr, "127.0.0.1:3479"},
		{"derp.server.host_name", c.DERP.Server.HostName, "127.0.0.1"},
		{"policy.mode", c.Policy.Mode, "database"},
		{"dns.base_domain", c.DNS.BaseDomain, "mesh.internal"},
		{"unix_socket", c.UnixSocket, "/cwd/signalbox-data/signalbox.sock"},
		{"database.sqlite.path", c.Database.SQLite.Path, "/cwd/signalbox-data/signalbox.db"},
		{"node.expiry", FormatDuration(c.Node.Expiry), "180d"},
		{"node.ephemeral.inactivity_timeout", FormatDuration(c.Node.Ephemeral.InactivityTimeout), "30m"},
	} {
		if x.got != x.want {
			t.Errorf("%s = %q, want %q", x.what, x.got, x.want)
		}
	}
	if len(c.Warnings) != 0 {
		t.Errorf("warnings without a file: %q", c.Warnings)
	}
}
