package config

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestProblemsNamePlaceKeyAndRemedy(t *testing.T) {
	for name, x := range map[string]struct {
		text string
		env  []string
		o    Overrides
		want []string // one per problem, in order; each a part of its text after the directory
	}{
		"unknown key": {"server_ulr: http://127.0.0.1\n", nil, Overrides{},
			[]string{"config.yaml:1:1: server_ulr: unknown key (did you mean server_url?)"}},
		"unknown key in a section": {"derp:\n  server:\n    enable: true\n", nil, Overrides{},
			[]string{"config.yaml:3:5: derp.server.enable: unknown key (did you mean derp.server.enabled?)"}},
		"key at the wrong level": {"stun_listen_addr: \":3478\"\n", nil, Overrides{},
			[]string{"config.yaml:1:1: stun_listen_addr: unknown key (did you mean derp.server.stun_listen_addr?)"}},
		"all at once": {"listen_adr: x\nderp: 3\nnode:\n  expiry: soon\n", nil, Overrides{}, []string{
			"config.yaml:1:1: listen_adr: unknown key (did you mean listen_addr?)",
			"config.yaml:2:7: derp: want a section of keys, got the number 3",
			`config.yaml:4:11: node.expiry: want a duration such as 90s, 30m, 1h30m, 180d, 1w, 1y or 0, got "soon"`}},
		"given twice": {"log:\n  level: info\n  level: debug\n", nil, Overrides{},
			[]string{"config.yaml:3:3: log.level: given twice: first on line 2"}},
		"not YAML": {"log: [\n", nil, Overrides{}, []string{"not valid YAML"}},
		"two documents": {"log:\n  level: info\n---\nlog:\n  level: debug\n", nil, Overrides{},
			[]string{"config.yaml:3:1: a second document"}},
		"boolean": {"derp:\n  server:\n    enabled: 1\n", nil, Overrides{},
			[]string{"config.yaml:3:14: derp.server.enabled: want true or false, got the number 1"}},
		"quoted boolean": {"dns:\n  magic_dns: \"true\"\n", nil, Overrides{},
			[]string{`config.yaml:2:14: dns.magic_dns: want true or false, got "true"`}},
		"number":       {"derp:\n  server:\n    region_id: many\n", nil, Overrides{}, []string{`config.yaml:3:16: derp.server.region_id: want a whole number, got "many"`}},
		"string":       {"server_url: [a]\n", nil, Overrides{}, []string{"config.yaml:1:13: server_url: want a string, got a list"}},
		"list":         {"derp:\n  urls: https://x.example\n", nil, Overrides{}, []string{`config.yaml:2:9: derp.urls: want a list, got "https://x.example"`}},
		"list element": {"trusted_proxies:\n  - 10.0.0.0/8\n  - proxy\n", nil, Overrides{}, []string{`config.yaml:3:5: trusted_proxies: want an IP address or prefix, got "proxy"`}},
		"word": {"prefixes:\n  allocation: randm\n", nil, Overrides{},
			[]string{`config.yaml:2:15: prefixes.allocation: want one of sequential, random, got "randm" (did you mean random?)`}},
		"mode":          {"unix_socket_permission: rwx\n", nil, Overrides{}, []string{`config.yaml:1:25: unix_socket_permission: want an octal file mode such as 0770, got "rwx"`}},
		"duration":      {"node:\n  expiry: 30\n", nil, Overrides{}, []string{"config.yaml:2:11: node.expiry: want a duration", "got the number 30"}[:1]},
		"prefix":        {"prefixes:\n  v4: 100.64.0.1/10\n", nil, Overrides{}, []string{"config.yaml:2:7: prefixes.v4: want a prefix such as 100.64.0.0/10, got \"100.64.0.1/10\": has bits set beyond its length: did you mean 100.64.0.0/10"}},
		"foreign range": {"prefixes:\n  v4: 10.0.0.0/8\n", nil, Overrides{}, []string{"config.yaml:2:3: prefixes.v4: 10.0.0.0/8 is not inside 100.64.0.0/10"}},
		"wide range":    {"prefixes:\n  v6: fd7a::/16\n", nil, Overrides{}, []string{"config.yaml:2:3: prefixes.v6: fd7a::/16 is not inside fd7a:115c:a1e0::/48"}},
		"no range":      {"prefixes:\n  v4: \"\"\n  v6: \"\"\n", nil, Overrides{}, []string{"config.yaml:2:3: prefixes.v4: prefixes.v4 and prefixes.v6 are both empty"}},
		"public http":   {"server_url: http://mesh.example.com\n", nil, Overrides{}, []string{"config.yaml:1:1: server_url: http:// with the host mesh.example.com is not safe"}},
		"cgnat http":    {"server_url: http://100.64.0.1\n", nil, Overrides{}, []string{"server_url: http:// with the host 100.64.0.1 is not safe"}},
		"path in URL":   {"server_url: http://127.0.0.1/x\n", nil, Overrides{}, []string{"server_url: want a scheme, a host and perhaps a port"}},
		"port 0 in URL": {"server_url: http://127.0.0.1:0\n", nil, Overrides{}, []string{"config.yaml:1:1: server_url: clients need the real port, and port 0 is none"}},
		"no scheme":     {"server_url: mesh.example.com\n", nil, Overrides{}, []string{"server_url: want http://HOST[:PORT] or https://HOST[:PORT]"}},
		"base domain":   {"server_url: https://hs.example.com\ndns:\n  base_domain: example.com\n", nil, Overrides{}, []string{"config.yaml:3:3: dns.base_domain: example.com contains hs.example.com"}},
		"override":      {"dns:\n  override_local_dns: true\n", nil, Overrides{}, []string{"config.yaml:2:3: dns.override_local_dns: needs an entry in dns.nameservers.global"}},
		"probes":        {"node:\n  routes:\n    ha:\n      probe_interval: 2s\n", nil, Overrides{}, []string{"node.routes.ha.probe_timeout: want more than 0 and not more than node.routes.ha.probe_interval (2s), got 5s"}},
		"probe pace":    {"node:\n  routes:\n    ha:\n      probe_interval: 100ms\n      probe_timeout: 100ms\n", nil, Overrides{}, []string{"config.yaml:4:7: node.routes.ha.probe_interval: want 0 or at least 1s, got 100ms"}},
		"ephemeral":     {"node:\n  ephemeral:\n    inactivity_timeout: 65s\n", nil, Overrides{}, []string{"config.yaml:3:5: node.ephemeral.inactivity_timeout: want more than 65s, got 1m5s"}},
		"half a pair":   {"server_url: https://a.example\ntls_cert_path: c.pem\n", nil, Overrides{}, []string{"config.yaml:2:1: tls_cert_path: needs tls_key_path"}},
		"two certs":     {"server_url: https://a.example\ntls_cert_path: c\ntls_key_path: k\ntls_letsencrypt_hostname: a.example\n", nil, Overrides{}, []string{"config.yaml:4:1: tls_letsencrypt_hostname: contradicts tls_cert_path"}},
		"other cert":    {"server_url: https://a.example\ntls_letsencrypt_hostname: b.example\n", nil, Overrides{}, []string{"config.yaml:2:1: tls_letsencrypt_hostname: is b.example, but clients come to a.example (server_url)"}},
		"http with TLS": {"tls_cert_path: c\ntls_key_path: k\n", nil, Overrides{}, []string{"server_url: is http, but a certificate is configured"}},
		"file mode":     {"policy:\n  mode: file\n", nil, Overrides{}, []string{"config.yaml:2:3: policy.mode: file needs policy.path"}},
		"idle file":     {"policy:\n  mode: database\n  path: p.hujson\n", nil, Overrides{}, []string{"config.yaml:3:3: policy.path: contradicts policy.mode database"}},
		"taken port":    {"metrics_listen_addr: 127.0.0.1:8080\n", nil, Overrides{}, []string{"config.yaml:1:1: metrics_listen_addr: 127.0.0.1:8080 is taken by listen_addr"}},
		"port":          {"listen_addr: 127.0.0.1:70000\n", nil, Overrides{}, []string{`config.yaml:1:1: listen_addr: port "70000"`}},
		"open metrics":  {"metrics_listen_addr: 8.8.8.8:9090\n", nil, Overrides{}, []string{"metrics_listen_addr: 8.8.8.8 is a public address"}},
		"same keys":     {"noise:\n  private_key_path: k\nderp:\n  server:\n    private_key_path: k\n", nil, Overrides{}, []string{"config.yaml:5:5: derp.server.private_key_path: is the file of noise.private_key_path"}},
		"record":        {"dns:\n  extra_records:\n    - {name: a.b, type: CNAME, value: 100.64.0.1}\n    - {name: a.b, type: A, value: fd7a::1}\n", nil, Overrides{}, []string{"config.yaml:3:7: dns.extra_records: type of a.b: want A or AAAA", "config.yaml:4:7: dns.extra_records: value of a.b: fd7a::1 does not fit type A"}},
		"record name":   {"dns:\n  extra_records: [{name: a b, type: A, value: 100.64.0.1}]\n", nil, Overrides{}, []string{`config.yaml:2:19: dns.extra_records: "a b" is not a domain name`}},
		"two records":   {"dns:\n  extra_records: [{name: a.b, type: A, value: 100.64.0.1}]\n  extra_records_path: r.json\n", nil, Overrides{}, []string{"config.yaml:3:3: dns.extra_records_path: contradicts dns.extra_records"}},
		"dial plan":     {"control_dial_plan: [{ip: 203.0.113.7, timeout: 0}, {ip: mesh.example.com}, {priority: 1},\n  {ip: 203.0.113.8, port: 1}, {ip: 203.0.113.9}, {ip: 203.0.113.9}, {ip: 0.0.0.0}, {ip: 10.0.0.1, start_delay: 55s}, {ip: 10.0.0.2, priority: high}, x]\n", nil, Overrides{}, []string{"config.yaml:1:21: control_dial_plan: timeout of 203.0.113.7: want more than 0", "config.yaml:1:57: control_dial_plan: want an IP address, got", "config.yaml:1:76: control_dial_plan: a candidate needs an ip", `config.yaml:2:21: control_dial_plan: unknown field "port"`, "config.yaml:2:50: control_dial_plan: 203.0.113.9 is given twice", "0.0.0.0 is not an address that clients can reach", "start_delay and timeout of 10.0.0.1 are 1m5s together", "control_dial_plan: want a whole number", "control_dial_plan: want a section of key: value"}},
		"one candidate": {"control_dial_plan: {ip: 203.0.113.7}\n", nil, Overrides{}, []string{"config.yaml:1:20: control_dial_plan: want a list of {ip, start_delay, timeout, priority}, got a section"}},
		"frame cache":   {"frame_cache_mib: -1\n", nil, Overrides{}, []string{"config.yaml:1:1: frame_cache_mib: want 0 to 1048576, got -1"}},
		"postgres":      {"database:\n  type: postgres\n  postgres: {host: db, name: s}\n", nil, Overrides{}, []string{"config.yaml:2:3: database.type: postgres needs database.postgres.user"}},
		"long socket":   {"unix_socket: /" + strings.Repeat("x", 107) + "\n", nil, Overrides{}, []string{"unix_socket: the path has 108 bytes, a unix socket may have 107"}},
		"removed key":   {"acl_policy_path: p\n", nil, Overrides{}, []string{"config.yaml:1:1: acl_policy_path: this key was removed: use policy.path"}},
		"removed part":  {"dns_config:\n  magic_dns: true\n  nameservers: [1.1.1.1]\n", nil, Overrides{}, []string{"config.yaml:2:3: dns_config.magic_dns: this key was removed: use dns.magic_dns", "config.yaml:3:3: dns_config.nameservers: this key was removed: use dns.nameservers.global"}},
		"removed below": {"oidc:\n  strip_email_domain: true\n", nil, Overrides{}, []string{"config.yaml:2:3: oidc.strip_email_domain: this key was removed"}},
		"variable":      {"", []string{"SIGNALBOX_NODE_EXPIRY=soon"}, Overrides{}, []string{"SIGNALBOX_NODE_EXPIRY: node.expiry: want a duration"}},
		"flag":          {"", nil, Overrides{URL: "http://203.0.113.7:8080"}, []string{"--url: server_url: http:// with the host 203.0.113.7 is not safe"}},
		"flag https":    {"", nil, Overrides{URL: "https://mesh.example.com"}, []string{"--url: server_url: https needs a certificate"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(t, x.text, x.env, x.o)
			var got Problems
			if !errors.As(err, &got) {
				t.Fatalf("no problem, want %q", x.want)
			}
			if len(got) != len(x.want) {
				t.Fatalf("got %d problems, want %d:\n%v", len(got), len(x.want), err)
			}
			for i := range got {
				if !strings.Contains(got[i].String(), x.want[i]) {
					t.Errorf("got  %s\nwant %s", got[i], x.want[i])
				}
			}
		})
	}
}

func TestEnvironmentOverridesFile(t *testing.T) {
	c, err := load(t, "log:\n  level: warn\n  format: json\nderp:\n  urls: [https://a.example]\n", []string{
		"HEADSCALE_LOG_LEVEL=error", "SIGNALBOX_LOG_LEVEL=debug", "HEADSCALE_NODE_EXPIRY=1w",
		"SIGNALBOX_DERP_URLS=https://b.example, https://c.example", "SIGNALBOX_TRUSTED_PROXIES=10.0.0.1 10.1.0.0/16",
		"SIGNALBOX_DNS_NAMESERVERS_SPLIT={corp.example: [10.0.0.53]}", "SIGNALBOX_DERP_SERVER_ENABLED=false",
		"SIGNALBOX_DATABASE_POSTGRES_PASS=true", "SIGNALBOX_SERVICE_HOST=10.0.0.1", "SIGNALBOX_PORT_8080_TCP=tcp://10.0.0.1:8080",
		"SIGNALBOX_CONFIG=/x", "SIGNALBOX_LOG_LEVL=info", "PATH=/bin"}, Overrides{})
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct{ what, got, want any }{
		{"log.level", c.Log.Level, "debug"},
		{"log.format", c.Log.Format, "json"},
		{"node.expiry", c.Node.Expiry, 7 * 24 * time.Hour},
		{"derp.urls", c.DERP.URLs, []string{"https://b.example", "https://c.example"}},
		{"trusted_proxies", c.TrustedProxies, []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32"), netip.MustParsePrefix("10.1.0.0/16")}},
		{"dns.nameservers.split", c.DNS.Nameservers.Split, map[string][]string{"corp.example": {"10.0.0.53"}}},
		{"derp.server.enabled", c.DERP.Server.Enabled, false},
		{"database.postgres.pass", c.Database.Postgres.Pass, "true"},
		{"origin", c.Origin("log.level"), Origin{Env: "SIGNALBOX_LOG_LEVEL"}},
		{"warnings", c.Warnings, []string{"the environment variable SIGNALBOX_LOG_LEVL belongs to no key and is ignored (did you mean SIGNALBOX_LOG_LEVEL?)"}},
	} {
		if !reflect.DeepEqual(x.got, x.want) {
			t.Errorf("%s = %v, want %v", x.what, x.got, x.want)
		}
	}
}

func TestURLSetsEveryListener(t *testing.T) {
	for name, x := range map[string]struct {
		url, text                          string
		plain                              bool
		listen, derp, stun, second, relays string
	}{
		"none":            {"", "", false, "127.0.0.1:8080", "127.0.0.1:8443", "127.0.0.1:3478", "127.0.0.1:3479", "127.0.0.1"},
		"own address":     {"http://10.1.2.3:8080", "", false, "10.1.2.3:8080", "10.1.2.3:8443", "10.1.2.3:3478", "10.1.2.3:3479", "10.1.2.3"},
		"foreign address": {"http://10.9.9.9:8080", "", false, ":8080", ":8443", ":3478", ":3479", "10.9.9.9"},
		"name":            {"http://mesh.example.com:81", "", true, ":81", ":8443", ":3478", ":3479", "mesh.example.com"},
		"no port":         {"http://10.1.2.3/", "", false, "10.1.2.3:80", "10.1.2.3:8443", "10.1.2.3:3478", "10.1.2.3:3479", "10.1.2.3"},
		"https": {"https://mesh.example.com", "tls_cert_path: /c\ntls_key_path: /k\n", false,
			":443", ":8443", ":3478", ":3479", "mesh.example.com"},
		"IPv6":      {"http://[::1]:8080", "", false, "[::1]:8080", "[::1]:8443", "[::1]:3478", "[::1]:3479", "::1"},
		"localhost": {"http://localhost:8080", "", false, "127.0.0.1:8080", "127.0.0.1:8443", "127.0.0.1:3478", "127.0.0.1:3479", "localhost"},
		"ports of the file stay": {"http://10.1.2.3:8080", "listen_addr: 127.0.0.1:1\nderp:\n  server:\n    listen_addr: 127.0.0.1:0\n    stun_listen_addr: \":5000\"\n    stun_second_listen_addr: \"\"\n", false,
			"10.1.2.3:8080", "10.1.2.3:0", "10.1.2.3:5000", "", "10.1.2.3"},
		"relay beside the main listener": {"", "listen_addr: 10.1.2.3:80\nserver_url: http://10.1.2.3\n", false, "10.1.2.3:80", "10.1.2.3:8443", "10.1.2.3:3478", "10.1.2.3:3479", "10.1.2.3"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := load(t, x.text, nil, Overrides{URL: x.url, AllowPlainHTTP: x.plain})
			if err != nil {
				t.Fatal(err)
			}
			s := c.DERP.Server
			got := []string{c.ListenAddr, s.ListenAddr, s.STUNListenAddr, s.STUNSecondListenAddr, s.HostName}
			want := []string{x.listen, x.derp, x.stun, x.second, x.relays}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %q\nwant %q", got, want)
			}
			if x.url != "" && c.ServerURL != strings.TrimSuffix(x.url, "/") {
				t.Errorf("server_url = %q", c.ServerURL)
			}
		})
	}
}

func TestServerURLFollowsListenAddr(t *testing.T) {
	for _, x := range []struct {
		text, want, warning string
	}{
		{"", "http://127.0.0.1:8080", ""},
		{"listen_addr: 127.0.0.1:9000\n", "http://127.0.0.1:9000", ""},
		{"listen_addr: 127.0.0.1:0\n", "http://127.0.0.1:0", ""},
		{"listen_addr: localhost:9000\n", "http://localhost:9000", ""},
		{"listen_addr: 10.1.2.3:9000\n", "http://10.1.2.3:9000", ""},
		{"listen_addr: \"[fd00::1]:9000\"\n", "http://[fd00::1]:9000", ""},
		{"listen_addr: :9000\n", "http://127.0.0.1:9000", ""},
		{"listen_addr: 0.0.0.0:9000\n", "http://127.0.0.1:9000", ""},
		{"listen_addr: 203.0.113.7:8080\n", "http://127.0.0.1:8080", "config.yaml:1:1: listen_addr: the server listens on 203.0.113.7:8080, and clients come to http://127.0.0.1:8080"},
		{"listen_addr: 127.0.0.1:9000\nserver_url: http://127.0.0.1:8080\n", "http://127.0.0.1:8080", "config.yaml:1:1: listen_addr: the server listens on 127.0.0.1:9000, and clients come to http://127.0.0.1:8080"},
		{"listen_addr: 10.1.2.3:80\nserver_url: http://10.1.2.3\n", "http://10.1.2.3", ""},
		{"listen_addr: 127.0.0.1:9000\nserver_url: http://127.0.0.1\ntrusted_proxies: [127.0.0.1]\n", "http://127.0.0.1", ""},
	} {
		c, err := load(t, x.text, nil, Overrides{})
		if err != nil {
			t.Errorf("%q: %v", x.text, err)
			continue
		}
		if c.ServerURL != x.want {
			t.Errorf("%q: server_url = %s, want %s", x.text, c.ServerURL, x.want)
		}
		if got := strings.Join(c.Warnings, "\n"); (got == "") != (x.warning == "") || !strings.Contains(got, x.warning) {
			t.Errorf("%q: warnings %q, want %q", x.text, got, x.warning)
		}
		text, err := c.Dump()
		if err != nil {
			t.Fatal(err)
		}
		if back, err := load(t, string(text), nil, Overrides{}); err != nil || back.ServerURL != x.want {
			t.Errorf("%q: the dump reads back as %s, %v", x.text, back.ServerURL, err)
		}
	}
}

func TestPathsAreRelativeToTheirSource(t *testing.T) {
	c, err := load(t, "data_dir: d\npolicy:\n  path: p.hujson\nderp:\n  paths: [a.yaml, /b.yaml]\nnoise:\n  private_key_path: \"\"\n",
		[]string{"SIGNALBOX_DNS_EXTRA_RECORDS_PATH=r.json"}, Overrides{})
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(c.Path)
	for _, x := range []struct{ what, got, want any }{
		{"data_dir", c.DataDir, dir + "/d"},
		{"database.sqlite.path", c.Database.SQLite.Path, dir + "/d/signalbox.db"},
		{"unix_socket", c.UnixSocket, dir + "/d/signalbox.sock"},
		{"policy.path", c.Policy.Path, dir + "/p.hujson"},
		{"policy.mode", c.Policy.Mode, "file"},
		{"derp.paths", c.DERP.Paths, []string{dir + "/a.yaml", "/b.yaml"}},
		{"dns.extra_records_path", c.DNS.ExtraRecordsPath, "/cwd/r.json"},
		{"noise.private_key_path", c.Noise.PrivateKeyPath, ""},
	} {
		if !reflect.DeepEqual(x.got, x.want) {
			t.Errorf("%s = %v, want %v", x.what, x.got, x.want)
		}
	}
	c, err = load(t, "data_dir: d\n", nil, Overrides{DataDir: "e"})
	if err != nil || c.DataDir != "/cwd/e" || c.UnixSocket != "/cwd/e/signalbox.sock" {
		t.Errorf("--data-dir: data_dir = %s, unix_socket = %s, %v", c.DataDir, c.UnixSocket, err)
	}
}

func TestKeysWithoutEffectAreWarnedAboutOnce(t *testing.T) {
	c, err := load(t, "oidc:\n  issuer: https://id.example\n  client_id: a\nlogtail:\n  enabled: false\ntuning:\n  batcher_workers: 3\n", nil, Overrides{})
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Warnings) != 2 || !strings.Contains(c.Warnings[0], "config.yaml:2:3: oidc.issuer, oidc.client_id: set without effect: login by OpenID Connect is not supported yet") ||
		!strings.Contains(c.Warnings[1], "config.yaml:7:3: tuning.batcher_workers: set without effect") {
		t.Errorf("warnings:\n%s", strings.Join(c.Warnings, "\n"))
	}
}

func TestOverrideLocalDNSFollowsNameservers(t *testing.T) {
	c, err := load(t, "dns:\n  nameservers:\n    global: [1.1.1.1, https://dns.example/q]\n", nil, Overrides{})
	if err != nil || !c.DNS.OverrideLocalDNS {
		t.Errorf("override_local_dns = %v, %v", c.DNS.OverrideLocalDNS, err)
	}
}

func TestAnchorsAndMergeKeysWork(t *testing.T) {
	c, err := load(t, "dns: &d\n  base_domain: a.example\n  nameservers:\n    global: &g [9.9.9.9]\n    split: {b.example: *g}\n", nil, Overrides{})
	if err != nil || !reflect.DeepEqual(c.DNS.Nameservers.Split, map[string][]string{"b.example": {"9.9.9.9"}}) {
		t.Errorf("split = %v, %v", c.DNS.Nameservers.Split, err)
	}
}

func TestClientsIgnoreProblemsOfTheServer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	for text, bad := range map[string]bool{
		"unix_socket: /run/x.sock\nserver_url: nonsense\nunknown: 1\n": false,
		"unix_socket: [1]\n":  true,
		"cli: {timeout: x}\n": true,
		"a: [\n":              true,
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadClient(path, nil, Overrides{}); (err != nil) != bad {
			t.Errorf("%q: error %v, want one: %v", text, err, bad)
		}
	}
}

func TestDurations(t *testing.T) {
	day := 24 * time.Hour
	for s, want := range map[string]time.Duration{
		"0": 0, "180d": 180 * day, "1w": 7 * day, "30m": 30 * time.Minute, "1h30m": 90 * time.Minute, "1y": 365 * day,
		"1.5h": 90 * time.Minute, "800ms": 800 * time.Millisecond, "1d12h": 36 * time.Hour, "292y": 292 * 365 * day,
	} {
		got, err := ParseDuration(s)
		if err != nil || got != want {
			t.Errorf("ParseDuration(%q) = %v, %v, want %v", s, got, err, want)
		}
		if back, err := ParseDuration(FormatDuration(want)); err != nil || back != want {
			t.Errorf("FormatDuration(%v) = %q reads back as %v, %v", want, FormatDuration(want), back, err)
		}
	}
	for _, s := range []string{"", "x", "-1h", "10", "1h 30m", "h", "1..2h", "999999y", "1e9h", "٣h"} {
		if d, err := ParseDuration(s); err == nil {
			t.Errorf("ParseDuration(%q) = %v, want an error", s, d)
		}
	}
}

func TestDumpReadsBackWithoutSecrets(t *testing.T) {
	c, err := load(t, "node:\n  expiry: \"0\"\ntrusted_proxies: [10.0.0.1]\ncontrol_dial_plan: [{ip: 203.0.113.7}, {ip: \"fd7a::8\", start_delay: 300ms, timeout: 5s, priority: 2}]\ndns:\n  extra_records: [{name: a.b, type: A, value: 100.64.0.9}]\ndatabase:\n  postgres: {pass: hunter2}\n", nil, Overrides{})
	if err != nil {
		t.Fatal(err)
	}
	text, err := c.Dump()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "hunter2") {
		t.Error("the dump shows the password")
	}
	back, err := load(t, string(text), nil, Overrides{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range schema {
		k := &schema[i]
		g, w := reflect.ValueOf(k.At(back)).Elem(), reflect.ValueOf(k.At(c)).Elem()
		if k.Secret || (g.Kind() == reflect.Slice || g.Kind() == reflect.Map) && g.Len() == 0 && w.Len() == 0 {
			continue
		}
		if !reflect.DeepEqual(g.Interface(), w.Interface()) {
			t.Errorf("%s reads back as %v, was %v", k.Name, g, w)
		}
	}
}

func TestSecretFilesHaveToBePrivate(t *testing.T) {
	dir := t.TempDir()
	key := filepath.Join(dir, "noise.key")
	if err := os.WriteFile(key, []byte("privkey:00"), 0o644); err != nil {
		t.Fatal(err)
	}
	c, err := load(t, "noise:\n  private_key_path: "+key+"\nderp:\n  server:\n    private_key_path: "+dir+"/absent\n  paths: ["+dir+"/regions.yaml]\n", nil, Overrides{})
	if err != nil {
		t.Fatal(err)
	}
	err = c.CheckFiles(true, nil)
	var got Problems
	if !errors.As(err, &got) || len(got) != 2 {
		t.Fatalf("CheckFiles = %v, want two problems", err)
	}
	if !strings.Contains(got[0].String(), "config.yaml:2:3: noise.private_key_path") || !strings.Contains(got[0].Msg, "open to everybody (mode 0644)") {
		t.Errorf("got %s", got[0])
	}
	if !strings.Contains(got[1].String(), "derp.paths: "+dir+"/regions.yaml: no such file") {
		t.Errorf("got %s", got[1])
	}
	err = c.CheckFiles(false, func(fault Fault) { fault("noise.private_key_path", "is %s", "odd") })
	if !errors.As(err, &got) || len(got) != 3 || !strings.Contains(err.Error(), "config.yaml:2:3: noise.private_key_path: is odd") {
		t.Errorf("CheckFiles = %v, want the two and what a look at the contents found", err)
	}
}
