package serve

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/control/tailnet"
)

// A relay that the map knows by name only is one all the same, and so is what derp.verify.allow names.
func TestVerifyAnswersRelaysOfTheMap(t *testing.T) {
	path := filepath.Join(t.TempDir(), "map.yaml")
	write(t, path, "regions:\n  900:\n    regionid: 900\n    regioncode: home\n    nodes:\n      - name: 900a\n        regionid: 900\n        hostname: relay.example\n")
	cfg := load(t, "derp:\n  server:\n    enabled: false\n  paths: ["+path+"]\n  verify:\n    allow: [198.51.100.0/24, \"2001:db8::7\"]\n")
	ctx := context.Background()
	s := &server{cfg: cfg, log: newLog(cfg.Log, io.Discard), started: time.Now()}
	s.lookupIP = func(_ context.Context, host string) ([]netip.Addr, error) {
		if host != "relay.example" {
			return nil, errors.New("no such host")
		}
		return []netip.Addr{netip.MustParseAddr("192.0.2.5")}, nil
	}
	if err := s.open(ctx); err != nil {
		t.Fatal(err)
	}
	defer s.store.Close()
	if err := s.buildRelay(); err != nil {
		t.Fatal(err)
	}
	if err := s.storeSettings(ctx); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.replica, err = tailnet.NewReplica(ctx, tailnet.ReplicaConfig{Store: s.store, Tailnet: s.tailnet}); err != nil {
		t.Fatal(err)
	}
	h := s.verify()
	for from, want := range map[string]int{
		"127.0.0.1:1": http.StatusOK, "192.0.2.5:1": http.StatusOK, "198.51.100.9:1": http.StatusOK, "[2001:db8::7]:1": http.StatusOK,
		"192.0.2.6:1": http.StatusForbidden, "[2001:db8::8]:1": http.StatusForbidden,
	} {
		r := httptest.NewRequest(http.MethodPost, "/verify", strings.NewReader("{}"))
		r.RemoteAddr = from
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("from %s: status %d, want %d", from, w.Code, want)
		}
	}
}

// The URL of a map must not lead to a node, which could answer for it.
func TestMapURLDoesNotLeadIntoTheTailnet(t *testing.T) {
	cfg := load(t, "derp:\n  server:\n    enabled: false\n  urls: [\"https://100.64.0.5:1/map\"]\n")
	log := newLogBook()
	s := &server{cfg: cfg, log: newLog(cfg.Log, log), started: time.Now()}
	if err := s.buildRelay(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.regions.Load(); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.regions.Run(ctx) }()
	log.wait(t, "100.64.0.5: the name leads to an address that is not allowed")
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
