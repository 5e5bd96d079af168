package config

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
)

// derive fills in what depends on other keys.
func (l *loader) derive() {
	c := l.cfg
	if c.DataDir == "" {
		c.DataDir = "signalbox-data"
		if l.o.IsRoot() {
			c.DataDir = "/var/lib/signalbox"
		}
	}
	if !c.IsSet("server_url") || c.ServerURL == "" {
		c.ServerURL = urlOf(c.ListenAddr)
	}
	c.ServerURL = strings.TrimSuffix(c.ServerURL, "/")
	l.addresses()

	orDefault(&c.Database.SQLite.Path, filepath.Join(l.abs("data_dir", c.DataDir), "signalbox.db"))
	orDefault(&c.TLS.LetsEncryptCacheDir, filepath.Join(l.abs("data_dir", c.DataDir), "acme"))
	orDefault(&c.UnixSocket, filepath.Join(l.abs("data_dir", c.DataDir), "signalbox.sock"))
	for i := range schema {
		if schema[i].Path {
			l.makeAbs(&schema[i])
		}
	}
	if c.Policy.Mode == "" {
		c.Policy.Mode = "database"
		if c.Policy.Path != "" {
			c.Policy.Mode = "file"
		}
	}
	if !c.IsSet("dns.override_local_dns") {
		c.DNS.OverrideLocalDNS = len(c.DNS.Nameservers.Global) > 0
	}
	if c.Database.Type == "sqlite3" {
		c.Database.Type = "sqlite"
	}
	c.DNS.BaseDomain = strings.TrimSuffix(c.DNS.BaseDomain, ".")
}

// urlOf is the URL by which a server that is told no other is reached, on this machine if nowhere else. Its port is 0 where the listener's is:
// which port that becomes is known when it is bound.
func urlOf(listen string) string {
	host, port, err := net.SplitHostPort(listen)
	switch {
	case err != nil || !isPort(port) || !isEvery(host) && !PlainHTTPSafe(host):
		return "http://127.0.0.1:8080"
	case isEvery(host):
		host = "127.0.0.1"
	}
	return "http://" + net.JoinHostPort(host, port)
}

func orDefault(s *string, def string) {
	if *s == "" {
		*s = def
	}
}

// abs resolves a path against the directory of the file if the key was set
// there, else against the working directory.
func (l *loader) abs(key, path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	base := l.cwd
	if o := l.cfg.origins[key]; o.Flag == "" && o.File != "" {
		base = filepath.Dir(l.cfg.Path)
	}
	return filepath.Join(base, path)
}

func (l *loader) makeAbs(k *key) {
	switch p := k.At(l.cfg).(type) {
	case *string:
		*p = l.abs(k.Name, *p)
	case *[]string:
		for i := range *p {
			(*p)[i] = l.abs(k.Name, (*p)[i])
		}
	}
}

// addresses settles where the server listens. --url decides for all
// listeners; otherwise relay and STUN stay beside the main listener.
func (l *loader) addresses() {
	c, s := l.cfg, &l.cfg.DERP.Server
	u, err := url.Parse(c.ServerURL)
	if err != nil {
		u = &url.URL{} // validate says so
	}
	host := "127.0.0.1"
	if h, _, err := net.SplitHostPort(c.ListenAddr); err == nil {
		host = h
	}
	if l.o.URL != "" && u.Host != "" {
		host = l.bindHost(u.Hostname())
		port := u.Port()
		if port == "" {
			port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
		}
		c.ListenAddr = net.JoinHostPort(host, port)
		c.origins["listen_addr"] = Origin{Flag: "--url"}
		s.HostName = u.Hostname()
		c.origins["derp.server.host_name"] = Origin{Flag: "--url"}
	}
	orDefault(&s.HostName, u.Hostname())
	for _, a := range []struct {
		key, port string
		at        *string
	}{
		{"derp.server.listen_addr", "8443", &s.ListenAddr},
		{"derp.server.stun_listen_addr", "3478", &s.STUNListenAddr},
		{"derp.server.stun_second_listen_addr", "3479", &s.STUNSecondListenAddr},
	} {
		if !c.IsSet(a.key) {
			*a.at = net.JoinHostPort(host, a.port)
		} else if _, port, err := net.SplitHostPort(*a.at); err == nil && l.o.URL != "" {
			*a.at = net.JoinHostPort(host, port)
			c.origins[a.key] = Origin{Flag: "--url"}
		}
	}
}

// bindHost is the host to listen on for clients that come to host: itself when
// it is an address of this machine, else every address. Names are not looked
// up: that would ask another machine.
func (l *loader) bindHost(host string) string {
	if host == "localhost" {
		return "127.0.0.1"
	}
	if a, err := netip.ParseAddr(host); err == nil && l.o.IsLocal(a) {
		return host
	}
	return ""
}

func interfaceAddrs() ([]netip.Addr, error) {
	list, err := net.InterfaceAddrs()
	var addrs []netip.Addr
	for _, a := range list {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				addrs = append(addrs, ip.Unmap())
			}
		}
	}
	return addrs, err
}

// warnUnused says once for each reason which keys were set without effect. A
// key set to its default asks for nothing and is not mentioned.
func (l *loader) warnUnused() {
	defaults := Default()
	var reasons []string
	keys := map[string][]*key{}
	for i := range schema {
		k := &schema[i]
		reason := k.Inert
		if k.Later != "" {
			reason = k.Later + " is not supported yet"
		}
		if reason == "" || !l.cfg.IsSet(k.Name) || reflect.DeepEqual(k.At(l.cfg), k.At(defaults)) {
			continue
		}
		if !slices.Contains(reasons, reason) {
			reasons = append(reasons, reason)
		}
		keys[reason] = append(keys[reason], k)
	}
	for _, r := range reasons {
		var names []string
		for _, k := range keys[r] {
			names = append(names, k.Name)
		}
		l.cfg.Warnings = append(l.cfg.Warnings,
			fmt.Sprintf("%v: %s: set without effect: %s", l.cfg.origins[names[0]], strings.Join(names, ", "), r))
	}
}

// Default returns the constant defaults, without what derives from the machine
// and from other keys.
func Default() *Config {
	return newLoader(Overrides{Getwd: func() (string, error) { return "/", nil }}).cfg
}
