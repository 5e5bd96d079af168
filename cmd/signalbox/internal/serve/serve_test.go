package serve

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/cmd/signalbox/internal/config"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// load reads a configuration whose sockets take free ports.
func load(t *testing.T, yaml string) *config.Config {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "config.yaml")
	if !strings.Contains(yaml, "derp:") {
		yaml += "\nderp:\n  server:\n    listen_addr: 127.0.0.1:0\n    stun_listen_addr: 127.0.0.1:0\n    stun_second_listen_addr: 127.0.0.1:0\n"
	}
	write(t, path, "listen_addr: 127.0.0.1:0\nmetrics_listen_addr: \"\"\ndata_dir: "+filepath.Join(dir, "data")+"\n"+yaml)
	cfg, err := config.Load(path, nil, config.Overrides{})
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func write(t *testing.T, path, text string) {
	t.Helper()
	// Renamed into place, as editors and tools do, so that no reader sees half.
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// opened is a server with its database, picture and followers, without sockets.
func opened(t *testing.T, cfg *config.Config) *server {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s := newServer(cfg, io.Discard)
	if err := s.open(ctx); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.replica, err = tailnet.NewReplica(ctx, tailnet.ReplicaConfig{Store: s.store, Tailnet: s.tailnet}); err != nil {
		t.Fatal(err)
	}
	s.ledger = tailnet.NewLedger(tailnet.LedgerConfig{Store: s.store, Tailnet: s.tailnet, Replica: s.replica, Instance: s.self.ID})
	s.files = s.followers()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.replica.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		s.store.Close()
	})
	return s
}

// assembled is a server with all its parts and its sockets bound, not yet running.
func assembled(t *testing.T, cfg *config.Config, edit ...func(*server)) *server {
	t.Helper()
	s := newServer(cfg, io.Discard)
	for _, f := range edit {
		f(s)
	}
	c, err := s.database()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	c.BusyTimeout = 100 * time.Millisecond
	if s.store, err = db.Open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
	if err := s.first(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.build(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

// running is a server at work until the end of the test.
func running(t *testing.T, cfg *config.Config, edit ...func(*server)) *server {
	t.Helper()
	s := assembled(t, cfg, edit...)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return s
}

// follow runs the follower of a file; reading returns once it has looked at what is there now.
func follow(t *testing.T, f *follower) (look func()) {
	t.Helper()
	looked := make(chan struct{}, 1)
	take := f.take
	f.take = func(ctx context.Context, text []byte) error {
		err := take(ctx, text)
		select {
		case looked <- struct{}{}:
		default:
		}
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = f.run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return func() {
		t.Helper()
		f.kick()
		select {
		case <-looked:
		case <-time.After(20 * time.Second):
			t.Fatal("the file was not looked at")
		}
	}
}

func TestPolicyFileNeverReplacesAGoodPolicyByABadOne(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.hujson")
	first := "{\"acls\": []} // first\n"
	write(t, path, first)
	s := opened(t, load(t, "policy:\n  path: "+path+"\n"))
	f := s.files[0]
	look := follow(t, f)
	look()
	live := func(want string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		for {
			told, next := s.replica.News()
			if v := told.Policy().Version; v != nil && string(v.Text) == want {
				return
			}
			select {
			case <-next:
			case <-ctx.Done():
				t.Fatalf("live policy %+v, want %q; fault %v, replica %v", s.replica.Current().Policy().Version, want, f.fault(), s.replica.Fault())
			}
		}
	}
	live(first)
	for _, bad := range []struct{ text, want string }{
		{"", "is empty"},
		{"  \n", "is empty"},
		{`{"acls": [`, ""},
		{"{\"acls\": [],\n\"tests\": [{\"src\": \"x@\", \"accept\": [\"100.64.0.1:22\"]}]}", "test"},
		{strings.Repeat("[", 100_000), ""},
	} {
		write(t, path, bad.text)
		look()
		waitFault(t, f, func(err error) bool { return err != nil && strings.Contains(err.Error(), bad.want) })
		if v := s.replica.Current().Policy().Version; string(v.Text) != first {
			t.Fatalf("%.40q became live", bad.text)
		}
	}
	second := `{"acls": [], "groups": {}}`
	write(t, path, second)
	look()
	live(second)
	waitFault(t, f, func(err error) bool { return err == nil })
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	f.kick()
	waitFault(t, f, func(err error) bool { return err != nil })
	live(second)
}

// A policy file that names what is not there yet is taken once it is, without another write of the file.
func TestRefusedPolicyFileIsTriedAgainWhenTheTailnetMoves(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.hujson")
	write(t, path, "{\n\t\"acls\": [{\"action\": \"accept\", \"src\": [\"user:*@corp.example\"], \"dst\": [\"*:*\"]}],\n"+
		"\t\"tests\": [{\"src\": \"zed@corp.example\", \"deny\": [\"100.64.0.1:22\"]}],\n}")
	s := opened(t, load(t, "policy:\n  path: "+path+"\n"))
	f := s.files[0]
	look := follow(t, f)
	look()
	waitFault(t, f, func(err error) bool {
		return err != nil && strings.HasPrefix(err.Error(), path+":2:40: corp.example is not associated") && strings.HasSuffix(err.Error(), "(and 1 more)")
	})
	put := func(fn func(*db.Tx) error) {
		t.Helper()
		if _, err := s.ledger.Do(context.Background(), db.Actor{Kind: "system"}, fn); err != nil {
			t.Fatal(err)
		}
	}
	put(func(tx *db.Tx) error {
		return tx.CreateUser(&db.User{Tailnet: tx.Tailnet(), Name: "yan", Email: "yan@corp.example", Created: tx.Now()})
	})
	waitFault(t, f, func(err error) bool {
		return err != nil && strings.HasPrefix(err.Error(), path+":3:20: a test of the policy fails: src \"zed@corp.example\": no such user")
	})
	put(func(tx *db.Tx) error {
		return tx.CreateUser(&db.User{Tailnet: tx.Tailnet(), Name: "zed", Email: "zed@corp.example", Created: tx.Now()})
	})
	waitFault(t, f, func(err error) bool {
		return err != nil && strings.HasPrefix(err.Error(), path+":3:49: a test of the policy fails: expected zed@corp.example not to reach")
	})
}

// A policy file without rules allows everything. It is taken, and said in the log and in the metrics.
func TestPolicyFileThatAllowsEverythingIsTold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.hujson")
	write(t, path, "{}")
	s := built(t, "policy:\n  path: "+path+"\n")
	var log bytes.Buffer
	s.log = newLog(s.cfg.Log, &log)
	allowsAll := func() string {
		r := prometheus.NewRegistry()
		s.healthMetrics(registry{r})
		w := httptest.NewRecorder()
		promhttp.HandlerFor(r, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		_, rest, _ := strings.Cut(w.Body.String(), "\nsignalbox_policy_allows_all ")
		value, _, _ := strings.Cut(rest, "\n")
		return value
	}
	if got := allowsAll(); got != "0" {
		t.Errorf("signalbox_policy_allows_all = %q under the default policy", got)
	}
	if err := s.takePolicy(t.Context(), []byte("{}")); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "every device reaches every device") {
		t.Errorf("the log does not say that the file allows everything: %s", log.String())
	}
	for told, next := s.replica.News(); told.Policy().Parsed == nil || !told.Policy().Parsed.AllowsAll(); told, next = s.replica.News() {
		select {
		case <-next:
		case <-time.After(20 * time.Second):
			t.Fatal("the file did not become the policy")
		}
	}
	if got := allowsAll(); got != "1" {
		t.Errorf("signalbox_policy_allows_all = %q, want 1", got)
	}
}

// waitFault waits until the follower reports what is wanted; it reports after it has taken.
func waitFault(t *testing.T, f *follower, want func(error) bool) {
	t.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	for {
		f.mu.Lock()
		err, moved := f.err, f.moved
		f.mu.Unlock()
		if want(err) {
			return
		}
		select {
		case <-moved:
		case <-deadline.C:
			t.Fatalf("fault = %v", err)
		}
	}
}

func TestExtraRecordsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "records.json")
	write(t, path, `[{"name": "Grafana.mesh.internal.", "type": "A", "value": "100.64.0.9"}]`)
	s := opened(t, load(t, "dns:\n  extra_records_path: "+path+"\n"))
	f := s.files[0]
	look := follow(t, f)
	look()
	waitFault(t, f, func(err error) bool { return err == nil })
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for {
		told, next := s.replica.News()
		if r := told.Settings().Records; len(r) == 1 && r[0].Name == "grafana.mesh.internal" && r[0].Value == "100.64.0.9" {
			break
		}
		select {
		case <-next:
		case <-ctx.Done():
			t.Fatalf("records = %+v", s.replica.Current().Settings().Records)
		}
	}
	for _, bad := range []struct{ text, want string }{
		{`{`, "extra records"},
		{`[{"name": "x", "type": "A", "value": "::1"}]`, "does not fit"},
		{`[{"name": "x", "type": "CNAME", "value": "100.64.0.1"}]`, "CNAME"},
		{`[{"name": "x", "value": "nowhere"}]`, "not an IP address"},
		{`[{"name": ".", "type": "A", "value": "100.64.0.1"}]`, "name is empty"},
	} {
		write(t, path, bad.text)
		look()
		waitFault(t, f, func(err error) bool { return err != nil && strings.Contains(err.Error(), bad.want) })
		if r := s.replica.Current().Settings().Records; len(r) != 1 {
			t.Fatalf("%s was taken: %+v", bad.text, r)
		}
	}
}

func TestNoiseKeyFileSeedsAnEmptyDatabaseAndNothingElse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "noise.key")
	seed := key.NewMachine()
	write(t, path, marshalKey(seed)+"\n")
	cfg := load(t, "noise:\n  private_key_path: "+path+"\n")
	start := func() (*server, error) {
		s := newServer(cfg, io.Discard)
		return s, s.open(context.Background())
	}
	s, err := start()
	if err != nil {
		t.Fatal(err)
	}
	if !s.secrets.noise.Equal(seed) {
		t.Error("the key in the file was not taken")
	}
	s.store.Close()

	other := key.NewMachine()
	write(t, path, marshalKey(other))
	if _, err = start(); err == nil || !strings.Contains(err.Error(), seed.Public().String()) || !strings.Contains(err.Error(), other.Public().String()) {
		t.Errorf("another key in the file: err = %v, want a refusal that names both public keys", err)
	}
	write(t, path, "not a key")
	if _, err = start(); err == nil || !strings.Contains(err.Error(), "noise.private_key_path") {
		t.Errorf("no key in the file: err = %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if s, err = start(); err != nil {
		t.Fatalf("a missing file: %v", err)
	}
	if !s.secrets.noise.Equal(seed) {
		t.Error("the database's key is not used")
	}
	s.store.Close()
}

func TestRelayKeyFileSeedsAnEmptyDatabase(t *testing.T) {
	path := filepath.Join(t.TempDir(), "relay.key")
	seed := key.NewNode()
	write(t, path, marshalKey(seed)+"\n")
	cfg := load(t, "derp:\n  server:\n    private_key_path: "+path+"\n")
	start := func() (*server, error) {
		s := newServer(cfg, io.Discard)
		return s, s.open(context.Background())
	}
	s, err := start()
	if err != nil {
		t.Fatal(err)
	}
	if !s.secrets.derp.Equal(seed) {
		t.Error("the key in the file was not taken")
	}
	if err := s.store.Close(); err != nil {
		t.Fatal(err)
	}
	other := key.NewNode()
	write(t, path, marshalKey(other))
	_, err = start()
	if err == nil || !strings.Contains(err.Error(), "derp.server.private_key_path") || !strings.Contains(err.Error(), seed.Public().String()) || !strings.Contains(err.Error(), other.Public().String()) {
		t.Errorf("another key in the file: err = %v, want a refusal that names both public keys", err)
	}
}

func TestStartSaysHowOtherDevicesReachIt(t *testing.T) {
	lan := []netip.Addr{netip.MustParseAddr("192.168.1.10"), netip.MustParseAddr("fd00::1")}
	got := elsewhere("http://127.0.0.1:9000", lan)
	for _, want := range []string{"    signalbox serve --url http://192.168.1.10:9000\n", "    signalbox serve --url http://[fd00::1]:9000\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("got %q, want %q in it", got, want)
		}
	}
	if got := elsewhere("http://127.0.0.1:8080", nil); !strings.Contains(got, "https") || strings.Contains(got, "serve --url") {
		t.Errorf("on the Internet: %q", got)
	}
}

func TestRelayCertificateComesBackWithItsHost(t *testing.T) {
	s := opened(t, load(t, ""))
	pair := func(host string) string {
		t.Helper()
		c, _, err := s.certificate(context.Background(), host)
		if err != nil {
			t.Fatal(err)
		}
		return string(c)
	}
	home, away := pair("10.0.0.1"), pair("10.0.0.2")
	if home == away {
		t.Error("two hosts have one certificate")
	}
	if pair("10.0.0.1") != home {
		t.Error("a host came back with another certificate, which no client's pin fits")
	}
}

// A full disk or another's lock must not look well to Prometheus while /health says 503.
func TestHealthyMetricFallsWithTheDatabase(t *testing.T) {
	cfg := load(t, "")
	s := assembled(t, cfg)
	healthy := func() string {
		t.Helper()
		rec := httptest.NewRecorder()
		s.debugHandler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
		for line := range strings.Lines(rec.Body.String()) {
			if v, ok := strings.CutPrefix(line, "signalbox_healthy "); ok {
				return strings.TrimSpace(v)
			}
		}
		t.Fatalf("no signalbox_healthy in:\n%s", rec.Body)
		return ""
	}
	if got := healthy(); got != "1" {
		t.Fatalf("signalbox_healthy = %s at the start, want 1", got)
	}
	other, err := sql.Open("sqlite", cfg.Database.SQLite.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	other.SetMaxOpenConns(1)
	if _, err := other.Exec("BEGIN IMMEDIATE"); err != nil {
		t.Fatal(err)
	}
	// A write that was refused ends the time for which the last commit vouches.
	if _, err := s.ledger.Do(t.Context(), system, func(tx *db.Tx) error { return putSetting(tx, "test", 1) }); !errors.Is(err, db.ErrUnavailable) {
		t.Fatalf("a write under another's lock: %v", err)
	}
	if got := healthy(); got != "0" {
		t.Errorf("signalbox_healthy = %s while the database takes no writes, want 0", got)
	}
	if _, err := other.Exec("ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	if err := s.store.Healthy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := healthy(); got != "1" {
		t.Errorf("signalbox_healthy = %s after the lock is gone, want 1", got)
	}
}

// A manager that reloads a unit which is still starting must not kill it.
func TestHangupDuringTheStartIsKept(t *testing.T) {
	cfg := load(t, "")
	cfg.Warnings = []string{"the first line of the log"}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var hung, reloaded bool
	log := writerFunc(func(b []byte) (int, error) {
		if !hung {
			hung = true
			if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
				t.Error(err)
			}
		}
		if strings.Contains(string(b), "msg=reloading") {
			reloaded = true
			cancel()
		}
		return len(b), nil
	})
	giveUp := time.AfterFunc(30*time.Second, cancel)
	defer giveUp.Stop()
	if err := Run(ctx, cfg, io.Discard, log); err != nil {
		t.Fatal(err)
	}
	if !reloaded {
		t.Error("the hangup of the start was forgotten")
	}
}

// writerFunc is a writer of log lines, which slog writes one at a time.
type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// What a start, a file or a URL changes for the whole tailnet has its audit row, and only when it changes something.
func TestChangedSettingsAreAudited(t *testing.T) {
	cfg := load(t, "dns:\n  search_domains: [a.example]\n")
	acts := func(s *server) map[string]*db.AuditEvent {
		t.Helper()
		out := map[string]*db.AuditEvent{}
		err := s.store.View(t.Context(), func(r *db.Reader) error {
			events, err := r.In(s.tailnet).AuditEvents(0, 1000)
			for _, e := range events {
				if e.Action == "setting.set" {
					out[e.Target] = e
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	s := assembled(t, cfg)
	first := acts(s)
	for _, name := range []string{tailnet.SettingDNS, tailnet.SettingOptions, tailnet.SettingDERPMap, tailnet.SettingExtraRecords} {
		if e := first["setting:"+name]; e == nil || e.Before != nil || e.After == nil || e.Actor.Name != "serve" {
			t.Errorf("%s: audit row %+v", name, e)
		}
	}
	if err := s.storeSettings(t.Context()); err != nil {
		t.Fatal(err)
	}
	if again := acts(s); !reflect.DeepEqual(again, first) {
		t.Errorf("a start that changes nothing: %v, before %v", again, first)
	}
	changed := *cfg
	changed.DNS.SearchDomains = []string{"b.example"}
	s.cfg = &changed
	if err := s.storeSettings(t.Context()); err != nil {
		t.Fatal(err)
	}
	e := acts(s)["setting:"+tailnet.SettingDNS]
	if !strings.Contains(string(e.Before), "a.example") || !strings.Contains(string(e.After), "b.example") {
		t.Errorf("audit row %s -> %s", e.Before, e.After)
	}
	records := make([]tailcfg.DNSRecord, 0, 2000)
	for i := range 2000 {
		records = append(records, tailcfg.DNSRecord{Name: fmt.Sprintf("n%d.example", i), Value: "100.64.0.1"})
	}
	text, err := json.Marshal(records)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.takeRecords(t.Context(), text); err != nil {
		t.Fatal(err)
	}
	if e := acts(s)["setting:"+tailnet.SettingExtraRecords]; e.Actor.Name != "extra records file" || len(e.After) > 1000 || !strings.Contains(string(e.After), "sha256") {
		t.Errorf("2,000 records: audit row by %s, %.200s", e.Actor.Name, e.After)
	}
	s.putDERPMap(&tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{}})
	if e := acts(s)["setting:"+tailnet.SettingDERPMap]; e.Number == first["setting:"+tailnet.SettingDERPMap].Number {
		t.Error("a new relay map has no audit row")
	}
}
