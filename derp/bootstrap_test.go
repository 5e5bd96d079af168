package derp

import (
	"context"
	"encoding/json"
	"errors"
	"net/http/httptest"
	"net/netip"
	"reflect"
	"testing"
	"time"
)

func TestBootstrapAnswersOwnNamesOnly(t *testing.T) {
	now := time.Unix(1e9, 0)
	lookups := map[string]int{}
	var failing bool
	s, err := New(Config{
		HostName:       "192.0.2.1",
		BootstrapHosts: []string{"Control.Example.", "10.0.0.1"},
		Now:            func() time.Time { return now },
		LookupIP: func(_ context.Context, host string) ([]netip.Addr, error) {
			lookups[host]++
			if failing {
				return nil, errors.New("no resolver")
			}
			return []netip.Addr{netip.MustParseAddr("::ffff:192.0.2.9"), netip.MustParseAddr("2001:db8::9")}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ask := func(query string) map[string][]string {
		t.Helper()
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/bootstrap-dns"+query, nil))
		var got map[string][]string
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || w.Code != 200 {
			t.Fatalf("%s: %d %s", query, w.Code, w.Body)
		}
		return got
	}
	own := map[string][]string{"control.example": {"192.0.2.9", "2001:db8::9"}}
	for query, want := range map[string]map[string][]string{
		"":                         own,
		"?q=control.example":       own,
		"?q=CONTROL.example.":      own,
		"?q=login.tailscale.com":   {},
		"?q=10.0.0.1":              {},
		"?q=control.example.evil.": {},
	} {
		if got := ask(query); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: got %v, want %v", query, got, want)
		}
	}
	if !reflect.DeepEqual(lookups, map[string]int{"control.example": 1}) {
		t.Errorf("looked up %v, want our name once", lookups)
	}
	now = now.Add(bootstrapTTL)
	failing = true
	if got := ask(""); !reflect.DeepEqual(got, own) {
		t.Errorf("failing resolver: got %v, want the last answer", got)
	}
	if lookups["control.example"] != 2 {
		t.Errorf("%d look-ups after the cache ran out, want 2", lookups["control.example"])
	}
}
