package derp

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tailscale.com/tailcfg"
)

// run starts l and returns its maps, one after the other.
func run(t *testing.T, cfg LoaderConfig) (*Loader, <-chan *tailcfg.DERPMap) {
	t.Helper()
	changes := make(chan *tailcfg.DERPMap, 16)
	cfg.OnChange = func(m *tailcfg.DERPMap) { changes <- m }
	l, err := NewLoader(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Load(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return l, changes
}

func next(t *testing.T, changes <-chan *tailcfg.DERPMap) *tailcfg.DERPMap {
	t.Helper()
	select {
	case m := <-changes:
		return m
	case <-time.After(10 * time.Second):
		t.Fatal("no new map")
		return nil
	}
}

func writeMap(t *testing.T, path string, m *tailcfg.DERPMap) {
	t.Helper()
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestLoadReadsFilesAndEmbedded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "derp.yaml")
	if err := os.WriteFile(path, []byte(yamlMap), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := NewLoader(LoaderConfig{Embedded: region(999, "999a"), Paths: []string{path}})
	if err != nil {
		t.Fatal(err)
	}
	m, err := l.Load()
	if err != nil {
		t.Fatal(err)
	}
	if got := m.RegionIDs(); !slices.Equal(got, []int{900, 901, 999}) {
		t.Errorf("regions %v", got)
	}
	if l.Current() != m {
		t.Error("Current is another map")
	}
	for name, content := range map[string]string{
		"broken.yaml": "regions: [",
		"clash.yaml":  strings.ReplaceAll(yamlMap, "901", "999"),
	} {
		bad := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(bad, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := NewLoader(LoaderConfig{Embedded: region(999, "999a"), Paths: []string{path, bad}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Load(); err == nil || !strings.Contains(err.Error(), bad) || !strings.HasPrefix(err.Error(), "derp.paths: ") {
			t.Errorf("%s: err = %v", name, err)
		}
	}
	l, err = NewLoader(LoaderConfig{Paths: []string{path + ".missing"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Load(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: err = %v", err)
	}
}

func TestURLIsMergedWhenItAnswers(t *testing.T) {
	var answer atomic.Pointer[func(http.ResponseWriter)]
	serve := func(f func(http.ResponseWriter)) { answer.Store(&f) }
	asked := make(chan struct{}, 64)
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		(*answer.Load())(w)
		asked <- struct{}{}
	}))
	defer web.Close()
	send := func(m *tailcfg.DERPMap) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) { json.NewEncoder(w).Encode(m) }
	}

	serve(func(w http.ResponseWriter) { w.WriteHeader(http.StatusInternalServerError) })
	own := region(999, "999a")
	l, changes := run(t, LoaderConfig{Embedded: own, URLs: []string{web.URL}, Retire: -1})
	<-asked
	if got := l.Current(); !reflect.DeepEqual(got, mapOf(own)) {
		t.Fatalf("while the URL fails: %s", asJSON(t, got))
	}

	serve(send(mapOf(region(5, "5a"))))
	l.Reload()
	<-asked
	if got, want := next(t, changes), mapOf(own, region(5, "5a")); !reflect.DeepEqual(got, want) {
		t.Fatalf("got %s", asJSON(t, got))
	}

	// Whatever comes instead of a good map, the last good one stays.
	for name, bad := range map[string]func(http.ResponseWriter){
		"404":       func(w http.ResponseWriter) { w.WriteHeader(http.StatusNotFound) },
		"HTML":      func(w http.ResponseWriter) { w.Write([]byte("<html>")) },
		"no region": send(mapOf()),
		"invalid":   send(&tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{6: region(7, "7a")}}),
		"null":      func(w http.ResponseWriter) { w.Write([]byte(`{"Regions":{"6":null}}`)) },
		"for tests": func(w http.ResponseWriter) {
			m := mapOf(region(6, "6a"))
			m.Regions[6].Nodes[0].InsecureForTests = true
			send(m)(w)
		},
		"too long": func(w http.ResponseWriter) {
			w.Write([]byte(`{"Regions":` + strings.Repeat(" ", maxMapBytes)))
		},
		"redirect": func(w http.ResponseWriter) {
			w.Header().Set("Location", "http://localhost:1/")
			w.WriteHeader(http.StatusFound)
		},
	} {
		serve(bad)
		l.Reload()
		<-asked
		// The next good answer, after the bad one, must be the first change.
		want := mapOf(own, region(5, "5a", name))
		serve(send(mapOf(region(5, "5a", name))))
		l.Reload()
		<-asked
		if got := next(t, changes); !reflect.DeepEqual(got, want) {
			t.Fatalf("%s: got %s", name, asJSON(t, got))
		}
	}
}

// warnings is a log handler that hands on the messages of warnings.
type warnings chan string

func (w warnings) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }
func (w warnings) Handle(_ context.Context, r slog.Record) error {
	w <- r.Message
	return nil
}
func (w warnings) WithAttrs([]slog.Attr) slog.Handler { return w }
func (w warnings) WithGroup(string) slog.Handler      { return w }

func TestUnreachableURLDoesNotStopAStart(t *testing.T) {
	own := region(999, "999a")
	path := filepath.Join(t.TempDir(), "derp.json")
	writeMap(t, path, mapOf(region(5, "5a")))
	warned := make(warnings, 16)
	l, changes := run(t, LoaderConfig{
		Embedded: own, URLs: []string{"http://127.0.0.1:1/"}, Paths: []string{path}, Retire: -1, Log: slog.New(warned),
	})
	if got := <-warned; !strings.Contains(got, "URL") {
		t.Errorf("first warning: %s", got)
	}
	if got := l.Current(); !reflect.DeepEqual(got, mapOf(own, region(5, "5a"))) {
		t.Fatalf("first map: %s", asJSON(t, got))
	}
	// Files are still followed while the URL fails; a broken one changes nothing.
	if err := os.WriteFile(path, []byte("regions: ["), 0o600); err != nil {
		t.Fatal(err)
	}
	l.Reload()
	if got := <-warned; !strings.Contains(got, "file") {
		t.Errorf("broken file: warned of %s", got)
	}
	<-warned // the URL again
	writeMap(t, path, mapOf(region(6, "6a")))
	l.Reload()
	if got := next(t, changes); !reflect.DeepEqual(got, mapOf(own, region(6, "6a"))) {
		t.Fatalf("got %s", asJSON(t, got))
	}
}

func TestRemovedRegionRetiresFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "derp.json")
		writeMap(t, path, mapOf(region(5, "5a"), region(6, "6a")))
		changes := make(chan *tailcfg.DERPMap, 16)
		l, err := NewLoader(LoaderConfig{
			Paths: []string{path}, AutoUpdate: true, Interval: time.Hour,
			OnChange: func(m *tailcfg.DERPMap) { changes <- m },
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Load(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- l.Run(ctx) }()
		defer func() { cancel(); <-done }()
		synctest.Wait()

		writeMap(t, path, mapOf(region(6, "6a")))
		begin := time.Now()
		got := <-changes
		if d := time.Since(begin); d != time.Hour {
			t.Errorf("read again after %v, want the interval", d)
		}
		retiring := region(5, "5a")
		retiring.NoMeasureNoHome = true
		if !reflect.DeepEqual(got, mapOf(retiring, region(6, "6a"))) {
			t.Errorf("first: %s", asJSON(t, got))
		}
		begin = time.Now()
		if got := <-changes; !reflect.DeepEqual(got, mapOf(region(6, "6a"))) {
			t.Errorf("then: %s", asJSON(t, got))
		}
		if d := time.Since(begin); d != defaultRetire {
			t.Errorf("gone after %v, want %v", d, defaultRetire)
		}

		writeMap(t, path, mapOf(region(5, "5a"), region(6, "6a")))
		if got := <-changes; !reflect.DeepEqual(got, mapOf(region(5, "5a"), region(6, "6a"))) {
			t.Errorf("back again: %s", asJSON(t, got))
		}
	})
}

func TestMapURLsRefused(t *testing.T) {
	for _, u := range []string{"http://relay.example/derp.json", "ftp://relay.example/", "relay.example", "", "https://", "file:///etc/passwd", "https://[::1"} {
		if _, err := NewLoader(LoaderConfig{URLs: []string{u}}); err == nil {
			t.Errorf("%q was accepted", u)
		}
	}
	for _, u := range []string{"https://relay.example/derp.json", "http://127.0.0.1:8/", "http://localhost/", "http://[::1]:8/"} {
		if _, err := NewLoader(LoaderConfig{URLs: []string{u}}); err != nil {
			t.Errorf("%q: %v", u, err)
		}
	}
}

func TestNameMustNotLeadInside(t *testing.T) {
	f := &fetcher{refuse: func(a netip.Addr) bool { return netip.MustParsePrefix("100.64.0.0/10").Contains(a) }}
	for addr, want := range map[string]bool{
		"198.51.100.1": true, "10.0.0.1": true, "fd00::1": true, "2001:db8::1": true,
		"127.0.0.1": false, "::1": false, "0.0.0.0": false, "::": false, "169.254.169.254": false,
		"fe80::1": false, "fd00:ec2::254": false, "224.0.0.1": false, "ff02::1": false, "100.100.100.100": false,
	} {
		if got := f.allowed(netip.MustParseAddr(addr), false); got != want {
			t.Errorf("%s: allowed %v, want %v", addr, got, want)
		}
	}
	if !f.allowed(netip.MustParseAddr("127.0.0.1"), true) {
		t.Error("loopback named in the configuration refused")
	}
	// The check happens on the address that is dialled.
	web := httptest.NewServer(http.NotFoundHandler())
	defer web.Close()
	g := &fetcher{refuse: func(netip.Addr) bool { return true }}
	if _, err := g.get(t.Context(), web.URL); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("loopback: err = %v, want the server's 404", err)
	}
	if _, err := g.get(t.Context(), "https://192.0.2.1/"); !errors.Is(err, errRefusedAddress) {
		t.Errorf("refused address: err = %v", err)
	}
}
