package config

import (
	"crypto/tls"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// DefaultPath is read when no other file is named and it exists.
const DefaultPath = "/etc/signalbox/config.yaml"

// Find returns the configuration file to read: the one named, else that of
// SIGNALBOX_CONFIG or HEADSCALE_CONFIG, else DefaultPath if there is such a
// file, else "" for none.
func Find(named string, env []string) string {
	if named != "" {
		return named
	}
	for _, name := range []string{"SIGNALBOX_CONFIG=", "HEADSCALE_CONFIG="} {
		i := slices.IndexFunc(env, func(kv string) bool { return strings.HasPrefix(kv, name) && len(kv) > len(name) })
		if i >= 0 {
			return env[i][len(name):]
		}
	}
	if _, err := os.Stat(DefaultPath); err == nil {
		return DefaultPath
	}
	return ""
}

// Fault reports a problem of a key.
type Fault func(key, format string, args ...any)

// CheckFiles looks at the files that the configuration names: those that are
// needed have to be there, and secrets must not be readable by everybody. With
// followed it insists on the files as well that a server waits for while it
// runs: policy and DNS records. What the values and the files mean to the parts
// of the server is for contents to judge, which may be nil. The error is a
// Problems.
func (c *Config) CheckFiles(followed bool, contents func(Fault)) error {
	l := &loader{cfg: c}
	for _, f := range []struct {
		key, path        string
		needed, isSecret bool
	}{
		{"noise.private_key_path", c.Noise.PrivateKeyPath, false, true},
		{"derp.server.private_key_path", c.DERP.Server.PrivateKeyPath, false, true},
		{"tls_cert_path", c.TLS.CertPath, true, false},
		{"tls_key_path", c.TLS.KeyPath, true, true},
		{"secrets.key_file", c.Secrets.KeyFile, true, true},
		{"policy.path", c.Policy.Path, followed, false},
		{"dns.extra_records_path", c.DNS.ExtraRecordsPath, followed, false},
	} {
		l.checkFile(f.key, f.path, f.needed, f.isSecret)
	}
	for _, p := range c.DERP.Paths {
		l.checkFile("derp.paths", p, true, false)
	}
	if len(l.problems) == 0 && c.TLS.CertPath != "" {
		if _, err := tls.LoadX509KeyPair(c.TLS.CertPath, c.TLS.KeyPath); err != nil {
			l.fault("tls_cert_path", "%v", strings.TrimPrefix(err.Error(), "tls: "))
		}
	}
	if contents != nil {
		contents(l.fault)
	}
	return l.problems.err()
}

func (l *loader) checkFile(key, path string, needed, isSecret bool) {
	if path == "" {
		return
	}
	fi, err := os.Stat(path)
	if err == nil && fi.IsDir() {
		l.fault(key, "%s is a directory", path)
		return
	}
	if err == nil {
		var f *os.File
		if f, err = os.Open(path); err == nil {
			f.Close()
		}
	}
	var pe *fs.PathError
	switch {
	case errors.Is(err, fs.ErrNotExist) && !needed:
	case errors.As(err, &pe):
		l.fault(key, "%s: %v", path, pe.Err)
	case err != nil:
		l.fault(key, "%s: %v", path, err)
	case isSecret && fi.Mode().Perm()&0o007 != 0:
		l.fault(key, "%s holds a secret and is open to everybody (mode %04o): chmod o= %s", path, fi.Mode().Perm(), filepath.Base(path))
	}
}
