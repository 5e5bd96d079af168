package config

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// Whatever the file holds, reading ends with a configuration or with problems
// that have a text, and a configuration prints as YAML that reads back.
func FuzzLoad(f *testing.F) {
	for _, s := range []string{"",
		"server_url: http://10.0.0.1:8080\nderp:\n  server: {enabled: on, ipv4: 10.0.0.1}\n  urls: [https://a.example]\nnode: {expiry: 1h30m}\n",
		"dns:\n  nameservers:\n    split: {a.b: [1.1.1.1]}\n  extra_records:\n  - {name: x.y, type: A, value: 100.64.0.1}\ntrusted_proxies: [10.0.0.0/8]\n",
		"a: &a {<<: *a}", "derp: &d\n  <<: *d\n", "? [a]\n: b\n", "<<: [1]\n", "log: !!binary x\n",
		"dns:\n  extra_records:\n  - 1\n  - {name: {}}\n", "node:\n  expiry: 1e400y\n", "\xff", "- a\n", "unix_socket_permission: 99999999999\n"} {
		f.Add(s)
	}
	path := filepath.Join(f.TempDir(), "config.yaml")
	f.Fuzz(func(t *testing.T, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Load(path, nil, Overrides{})
		if err != nil {
			var ps Problems
			if !errors.As(err, &ps) || len(ps) == 0 || err.Error() == "" {
				t.Fatalf("error %T %q is no list of problems", err, err)
			}
			return
		}
		if _, err := c.Dump(); err != nil {
			t.Fatalf("dump: %v", err)
		}
	})
}
