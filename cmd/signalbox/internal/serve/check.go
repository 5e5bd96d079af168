package serve

import (
	"errors"
	"io/fs"
	"os"
	"strings"

	"github.com/signalbox-net/signalbox/cmd/signalbox/internal/config"
	"github.com/signalbox-net/signalbox/derp"
)

// Check reports, before anything is opened, what a start would refuse: values and contents of files that only the parts of the server can judge.
// Files that are not there are not its business.
func Check(cfg *config.Config, fault config.Fault) {
	noise := checkKey("noise.private_key_path", cfg.Noise.PrivateKeyPath, machinePublic, fault)
	relay := checkKey("derp.server.private_key_path", cfg.DERP.Server.PrivateKeyPath, nodePublic, fault)
	if noise != "" && noise == relay {
		fault("derp.server.private_key_path", "holds the key of noise.private_key_path; each needs its own")
	}
	if path := cfg.Secrets.KeyFile; path != "" {
		if b, err := os.ReadFile(path); err == nil {
			if _, err := sealingKey(b); err != nil {
				fault("secrets.key_file", "%s: %v", path, err)
			}
		}
	}
	checkRelays(&cfg.DERP, cfg.IsSet("derp.server.host_name"), fault)
}

// checkKey returns the private key in a file, and nothing when there is none.
func checkKey(option, path string, public func(string) (string, error), fault config.Fault) string {
	if path == "" {
		return ""
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	text := strings.TrimSpace(string(b))
	if _, err := public(text); err != nil {
		fault(option, "%s does not hold a private key (privkey: and 64 hex digits): %v", path, err)
		return ""
	}
	return text
}

func checkRelays(c *config.DERP, hostSet bool, fault config.Fault) {
	for _, u := range c.URLs {
		if err := derp.CheckMapURL(u); err != nil {
			fault("derp.urls", "%v", err)
		}
	}
	whole := true
	for _, p := range c.Paths {
		l, err := derp.NewLoader(derp.LoaderConfig{Paths: []string{p}})
		if err == nil {
			_, err = l.Load()
		}
		if err != nil {
			whole = false
			if !errors.As(err, new(*fs.PathError)) {
				fault("derp.paths", "%s", strings.TrimPrefix(err.Error(), "derp.paths: "))
			}
		}
	}
	if whole && len(c.Paths) > 1 {
		l, err := derp.NewLoader(derp.LoaderConfig{Paths: c.Paths})
		if err == nil {
			_, err = l.Load()
		}
		if err != nil {
			fault("derp.paths", "together: %s", strings.TrimPrefix(err.Error(), "derp.paths: "))
		}
	}
	s := &c.Server
	if !s.Enabled {
		return
	}
	if err := derp.CheckHostName(s.HostName); err != nil {
		if hostSet {
			fault("derp.server.host_name", "%v", err)
		} else {
			fault("server_url", "its host is also the relay's (derp.server.host_name): %v", err)
		}
	}
	for _, x := range []struct{ key, field, text string }{
		{"derp.server.region_code", "the code", s.RegionCode},
		{"derp.server.region_name", "the name", s.RegionName},
	} {
		if err := derp.CheckText(x.field, x.text); err != nil {
			fault(x.key, "%v", err)
		}
	}
}
