package derp

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"tailscale.com/tailcfg"
)

func TestRelaySourcesFollowTheMap(t *testing.T) {
	now := time.Unix(1e9, 0)
	lookups := 0
	m := mapOf(region(5, "5a", "5b"), region(6, "6a"), region(7, "7a"), region(8, "8a"))
	m.Regions[6].Nodes[0].IPv4, m.Regions[6].Nodes[0].IPv6 = "192.0.2.6", "none"
	m.Regions[7].Nodes[0].HostName = "missing.example"
	m.Regions[8].Nodes[0].HostName = "2001:db8::8"
	s := &RelaySources{
		Map:   func() *tailcfg.DERPMap { return m },
		Extra: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")},
		LookupIP: func(_ context.Context, host string) ([]netip.Addr, error) {
			lookups++
			if host != "relay.example" {
				return nil, errors.New("no such host")
			}
			return []netip.Addr{netip.MustParseAddr("::ffff:192.0.2.5")}, nil
		},
		Now: func() time.Time { return now },
	}
	for addr, want := range map[string]bool{
		"127.0.0.1": true, "::1": true, "192.0.2.5": true, "::ffff:192.0.2.6": true, "2001:db8::8": true,
		"198.51.100.9": true, "192.0.2.7": false, "2001:db8::9": false,
	} {
		if got := s.Allow(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %v, want %v", addr, got, want)
		}
	}
	if s.Allow(netip.Addr{}) {
		t.Error("no address: allowed")
	}
	if lookups != 2 {
		t.Errorf("%d look-ups, want one for each of two names", lookups)
	}
	m = mapOf(region(8, "8a"))
	m.Regions[8].Nodes[0].HostName = "192.0.2.8"
	if s.Allow(netip.MustParseAddr("192.0.2.5")) || !s.Allow(netip.MustParseAddr("192.0.2.8")) {
		t.Error("a new map has no effect")
	}
}
