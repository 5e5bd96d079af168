package config

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// MaxSocketPath is the longest path of a unix socket in bytes: sun_path holds
// 108 with the final NUL.
const MaxSocketPath = 107

// MinEphemeralTimeout is exclusive. A client that lost its connection may take
// a minute to come back.
const MinEphemeralTimeout = 65 * time.Second

// MaxFrameCacheMiB is a terabyte: more is a mistake.
const MaxFrameCacheMiB = 1 << 20

// MaxDialCandidates bounds control_dial_plan: a client that has lost its
// server tries them all.
const MaxDialCandidates = 16

// maxDialTime is the longest that clients take to connect by a plan.
const maxDialTime = time.Minute

// MinProbeInterval keeps probes from becoming a load.
const MinProbeInterval = time.Second

var (
	cgnat = netip.MustParsePrefix("100.64.0.0/10")
	ula   = netip.MustParsePrefix("fd7a:115c:a1e0::/48")
)

// validate checks values against each other. It runs only when every key was
// read, so that one mistake is not reported twice.
func (l *loader) validate() {
	u := l.validateURL()
	l.validateListeners(u)
	l.validateTLS(u)
	l.validatePrefixes()
	l.validateDERP()
	l.validateDNS(u)
	l.validateRest()
}

func (l *loader) validateURL() *url.URL {
	c := l.cfg
	u, err := url.Parse(c.ServerURL)
	switch {
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "":
		l.fault("server_url", "want http://HOST[:PORT] or https://HOST[:PORT], got %q", c.ServerURL)
		return nil
	case u.Path != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil:
		l.fault("server_url", "want a scheme, a host and perhaps a port, nothing else; got %q", c.ServerURL)
		return nil
	}
	if p := u.Port(); p != "" && !isPort(p) {
		l.fault("server_url", "port %s is not between 1 and 65535", p)
	} else if n, _ := strconv.Atoi(p); p != "" && n == 0 && c.IsSet("server_url") {
		l.fault("server_url", "clients need the real port, and port 0 is none: it only means any free port, in listen_addr")
	}
	if u.Scheme == "http" && !PlainHTTPSafe(u.Hostname()) && !c.AllowPlainHTTP {
		l.fault("server_url", "http:// with the host %s is not safe: stock clients use plain HTTP again after a lost connection only for localhost and for loopback and private IP addresses; for any other host they try nothing but https on port 443 and stay away. Use https, a private address, or set allow_plain_http (--allow-plain-http) if you accept that", u.Hostname())
	}
	return u
}

// PlainHTTPSafe reports whether stock clients come back to an http:// control
// URL with this host after a lost connection (control/ts2021, the exemption
// from forced TLS).
func PlainHTTPSafe(host string) bool {
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && (a.IsLoopback() || a.IsPrivate())
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n <= 65535
}

func (l *loader) validateListeners(u *url.URL) {
	c, s := l.cfg, &l.cfg.DERP.Server
	type listener struct{ key, addr, network string }
	list := []listener{{"listen_addr", c.ListenAddr, "tcp"}}
	if c.MetricsListenAddr != "" {
		list = append(list, listener{"metrics_listen_addr", c.MetricsListenAddr, "tcp"})
	}
	if s.Enabled {
		if u != nil && u.Scheme == "http" {
			list = append(list, listener{"derp.server.listen_addr", s.ListenAddr, "tcp"})
		}
		list = append(list, listener{"derp.server.stun_listen_addr", s.STUNListenAddr, "udp"})
		if s.STUNSecondListenAddr != "" {
			list = append(list, listener{"derp.server.stun_second_listen_addr", s.STUNSecondListenAddr, "udp"})
		}
	}
	if c.TLS.LetsEncryptHostname != "" && c.TLS.LetsEncryptChallengeType == "HTTP-01" {
		list = append(list, listener{"tls_letsencrypt_listen", c.TLS.LetsEncryptListen, "tcp"})
	}
	for i, a := range list {
		port, ok := l.listenAddr(a.key, a.addr)
		if !ok || port == 0 {
			continue
		}
		for _, b := range list[:i] {
			if a.network == b.network && clash(a.addr, b.addr) {
				l.fault(a.key, "%s is taken by %s (%s)", a.addr, b.key, b.addr)
			}
		}
	}
	// Behind an https URL there may be a proxy on this machine.
	if h, _, err := net.SplitHostPort(l.cfg.ListenAddr); err == nil && u != nil && u.Scheme == "http" && isLoopback(h) && !isLoopback(u.Hostname()) {
		l.warn("listen_addr", "the server listens on %s only, where clients of %s cannot reach it", l.cfg.ListenAddr, l.cfg.ServerURL)
	}
	if h, p, err := net.SplitHostPort(c.ListenAddr); err == nil && u != nil && u.Scheme == "http" && len(c.TrustedProxies) == 0 {
		if want := cmp.Or(u.Port(), "80"); p != want || !c.IsSet("server_url") && !isEvery(h) && h != u.Hostname() {
			l.warn("listen_addr", "the server listens on %s, and clients come to %s (server_url): something has to forward them", c.ListenAddr, c.ServerURL)
		}
	}
	l.publicMetrics()
}

func (l *loader) listenAddr(key, addr string) (port int, ok bool) {
	_, p, err := net.SplitHostPort(addr)
	if err != nil {
		l.fault(key, "want HOST:PORT or :PORT, got %q", addr)
		return 0, false
	}
	n, err := net.LookupPort("tcp", p)
	if err != nil || p == "" {
		l.fault(key, "port %q is not between 0 and 65535", p)
		return 0, false
	}
	return n, true
}

// clash reports whether two addresses cannot both be listened on.
func clash(a, b string) bool {
	ah, ap, _ := net.SplitHostPort(a)
	bh, bp, err := net.SplitHostPort(b)
	return err == nil && ap == bp && (ah == bh || isEvery(ah) || isEvery(bh))
}

func isEvery(host string) bool {
	a, err := netip.ParseAddr(host)
	return host == "" || err == nil && a.IsUnspecified()
}

// publicMetrics refuses to show the inside of the server to the Internet:
// metrics have no password, and API keys would come in clear.
func (l *loader) publicMetrics() {
	host, _, err := net.SplitHostPort(l.cfg.MetricsListenAddr)
	if err != nil {
		return
	}
	if isEvery(host) {
		l.warn("metrics_listen_addr", "metrics are open to everybody who reaches %s; keep the port closed to the outside", l.cfg.MetricsListenAddr)
		return
	}
	a, err := netip.ParseAddr(host)
	if err == nil && !a.IsLoopback() && !a.IsPrivate() && !a.IsLinkLocalUnicast() && !cgnat.Contains(a) {
		l.fault("metrics_listen_addr", "%s is a public address, metrics have no password, and an API key for /debug/ would come in clear: use a private one", host)
	}
}

func (l *loader) warn(key, format string, args ...any) {
	w := key + ": " + fmt.Sprintf(format, args...)
	if o := l.cfg.origins[key].String(); o != "" {
		w = o + ": " + w
	}
	l.cfg.Warnings = append(l.cfg.Warnings, w)
}

func (l *loader) validateTLS(u *url.URL) {
	t := l.cfg.TLS
	files := t.CertPath != "" || t.KeyPath != ""
	switch {
	case t.CertPath != "" && t.KeyPath == "":
		l.fault("tls_cert_path", "needs tls_key_path")
	case t.KeyPath != "" && t.CertPath == "":
		l.fault("tls_key_path", "needs tls_cert_path")
	case files && t.LetsEncryptHostname != "":
		l.fault("tls_letsencrypt_hostname", "contradicts tls_cert_path: the certificate comes from one of them")
	}
	if u == nil {
		return
	}
	tls := files || t.LetsEncryptHostname != ""
	if u.Scheme == "http" && tls {
		l.fault("server_url", "is http, but a certificate is configured (tls_*): clients would not get through")
	}
	if h := t.LetsEncryptHostname; h != "" && !strings.EqualFold(h, u.Hostname()) {
		l.fault("tls_letsencrypt_hostname", "is %s, but clients come to %s (server_url)", h, u.Hostname())
	}
	if u.Scheme == "https" && !tls {
		if l.o.URL != "" {
			l.fault("server_url", "https needs a certificate: set tls_cert_path and tls_key_path, or tls_letsencrypt_hostname. Behind a proxy that has one, set server_url and listen_addr in the configuration instead")
		} else if len(l.cfg.TrustedProxies) == 0 {
			l.warn("server_url", "https without a certificate (tls_*): a proxy has to provide it. Name it in trusted_proxies, or all clients seem to come from its address")
		}
	}
}

func (l *loader) validatePrefixes() {
	p := l.cfg.Prefixes
	if !p.V4.IsValid() && !p.V6.IsValid() {
		l.fault("prefixes.v4", "prefixes.v4 and prefixes.v6 are both empty: nodes need an address")
	}
	for _, x := range []struct {
		key        string
		got, whole netip.Prefix
		longest    int
	}{{"prefixes.v4", p.V4, cgnat, 30}, {"prefixes.v6", p.V6, ula, 126}} {
		if !x.got.IsValid() {
			continue
		}
		if !x.whole.Contains(x.got.Addr()) || x.got.Bits() < x.whole.Bits() {
			l.fault(x.key, "%v is not inside %v, the only range that clients treat as theirs", x.got, x.whole)
		} else if x.got.Bits() > x.longest {
			l.fault(x.key, "%v has no room for nodes", x.got)
		}
	}
}

func (l *loader) validateDERP() {
	d := l.cfg.DERP
	for _, s := range d.URLs {
		if u, err := url.Parse(s); err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
			l.fault("derp.urls", "want a URL, got %q", s)
		}
	}
	if len(d.URLs) > 0 && d.AutoUpdateEnabled && d.UpdateFrequency < time.Minute {
		l.fault("derp.update_frequency", "want at least 1m, got %s", FormatDuration(d.UpdateFrequency))
	}
	s := d.Server
	if !s.Enabled {
		if len(d.URLs) == 0 && len(d.Paths) == 0 {
			l.warn("derp.server.enabled", "without a relay (derp.urls and derp.paths are empty too) nodes that find no direct path cannot talk at all")
		}
		return
	}
	if s.RegionID < 900 || s.RegionID > 1<<15 {
		l.fault("derp.server.region_id", "want a number from 900 to 32768, got %d: those below are Tailscale's own", s.RegionID)
	}
	if s.RegionCode == "" {
		l.fault("derp.server.region_code", "must not be empty")
	}
	if s.IPv4.IsValid() && !s.IPv4.Is4() {
		l.fault("derp.server.ipv4", "%v is not an IPv4 address", s.IPv4)
	}
	if s.IPv6.IsValid() && (!s.IPv6.Is6() || s.IPv6.Is4In6() || s.IPv6.Zone() != "") {
		l.fault("derp.server.ipv6", "%v is not an IPv6 address", s.IPv6)
	}
	if s.PrivateKeyPath != "" && s.PrivateKeyPath == l.cfg.Noise.PrivateKeyPath {
		l.fault("derp.server.private_key_path", "is the file of noise.private_key_path: the keys have to differ")
	}
	if h, _, err := net.SplitHostPort(s.STUNListenAddr); err == nil && isLoopback(h) && !isLoopback(s.HostName) {
		l.warn("derp.server.stun_listen_addr", "STUN listens on %s only, where clients of %s cannot reach it", s.STUNListenAddr, s.HostName)
	}
}

func isLoopback(host string) bool {
	a, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && a.IsLoopback()
}

func (l *loader) validateDNS(u *url.URL) {
	d := l.cfg.DNS
	switch {
	case d.BaseDomain == "" && d.MagicDNS:
		l.fault("dns.base_domain", "must not be empty while dns.magic_dns is on")
	case d.BaseDomain != "" && !isDomain(d.BaseDomain):
		l.fault("dns.base_domain", "%q is not a domain name", d.BaseDomain)
	case d.BaseDomain != "" && u != nil && within(u.Hostname(), d.BaseDomain):
		l.fault("dns.base_domain", "%s contains %s, the host of server_url: clients answer names below it from the mesh and would not find the server any more", d.BaseDomain, u.Hostname())
	}
	if d.OverrideLocalDNS && len(d.Nameservers.Global) == 0 {
		l.fault("dns.override_local_dns", "needs an entry in dns.nameservers.global: clients would have no resolver left")
	}
	for _, s := range d.Nameservers.Global {
		l.nameserver("dns.nameservers.global", s)
	}
	for domain, list := range d.Nameservers.Split {
		if !isDomain(strings.TrimSuffix(domain, ".")) {
			l.fault("dns.nameservers.split", "%q is not a domain name", domain)
		}
		for _, s := range list {
			l.nameserver("dns.nameservers.split", s)
		}
	}
	for _, s := range d.SearchDomains {
		if !isDomain(strings.TrimSuffix(s, ".")) {
			l.fault("dns.search_domains", "%q is not a domain name", s)
		}
	}
	if len(d.ExtraRecords) > 0 && d.ExtraRecordsPath != "" {
		l.fault("dns.extra_records_path", "contradicts dns.extra_records: the records come from one of them")
	}
}

func (l *loader) nameserver(key, s string) {
	if _, err := netip.ParseAddr(s); err == nil {
		return
	}
	if _, err := netip.ParseAddrPort(s); err == nil {
		return
	}
	if u, err := url.Parse(s); err == nil && (u.Scheme == "https" || u.Scheme == "tls") && u.Host != "" {
		return
	}
	l.fault(key, "want an IP address or an https:// URL, got %q", s)
}

func isDomain(s string) bool {
	if len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, r := range label {
			if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_' {
				return false
			}
		}
	}
	return true
}

// within reports whether host is domain or a name below it.
func within(host, domain string) bool {
	host, domain = strings.ToLower(host), strings.ToLower(domain)
	return host == domain || strings.HasSuffix(host, "."+domain)
}

func (l *loader) validateRest() {
	c := l.cfg
	if m := c.FrameCacheMiB; m < 0 || m > MaxFrameCacheMiB {
		l.fault("frame_cache_mib", "want 0 to %d, got %d", MaxFrameCacheMiB, m)
	}
	if t := c.Node.Ephemeral.InactivityTimeout; t <= MinEphemeralTimeout {
		l.fault("node.ephemeral.inactivity_timeout", "want more than 65s, got %s: a client that loses its connection may take a minute to come back", FormatDuration(t))
	}
	if ha := c.Node.Routes.HA; ha.ProbeInterval != 0 {
		if ha.ProbeInterval < MinProbeInterval {
			l.fault("node.routes.ha.probe_interval", "want 0 or at least %s, got %s", FormatDuration(MinProbeInterval), FormatDuration(ha.ProbeInterval))
		}
		if ha.ProbeTimeout <= 0 || ha.ProbeTimeout > ha.ProbeInterval {
			l.fault("node.routes.ha.probe_timeout", "want more than 0 and not more than node.routes.ha.probe_interval (%s), got %s", FormatDuration(ha.ProbeInterval), FormatDuration(ha.ProbeTimeout))
		}
	}
	switch {
	case c.Policy.Mode == "file" && c.Policy.Path == "":
		l.fault("policy.mode", "file needs policy.path; without one use database")
	case c.Policy.Mode == "database" && c.Policy.Path != "":
		l.fault("policy.path", "contradicts policy.mode database: the file would never be read")
	}
	for _, d := range c.Policy.Domains {
		if !isDomain(d) {
			l.fault("policy.domains", "%q is not a domain name", d)
		}
	}
	if n := len(c.UnixSocket); n > MaxSocketPath {
		l.fault("unix_socket", "the path has %d bytes, a unix socket may have %d: %s. Set a shorter unix_socket or data_dir", n, MaxSocketPath, c.UnixSocket)
	}
	if c.CLI.Timeout <= 0 {
		l.fault("cli.timeout", "must not be 0")
	}
	if c.OIDC.ClientSecret != "" && c.OIDC.ClientSecretPath != "" {
		l.fault("oidc.client_secret_path", "contradicts oidc.client_secret: the secret comes from one of them")
	}
	if c.Database.Type == "postgres" {
		l.validatePostgres()
	} else if c.Database.Postgres.Host != "" && c.IsSet("database.type") {
		l.warn("database.postgres.host", "database.type is %s: the section postgres is not used", c.Database.Type)
	}
}

func (l *loader) validatePostgres() {
	p := l.cfg.Database.Postgres
	for _, x := range []struct{ key, value string }{{"host", p.Host}, {"name", p.Name}, {"user", p.User}} {
		if x.value == "" {
			l.fault("database.type", "postgres needs database.postgres.%s", x.key)
		}
	}
	if p.Port < 1 || p.Port > 65535 {
		l.fault("database.postgres.port", "want 1 to 65535, got %d", p.Port)
	}
}
