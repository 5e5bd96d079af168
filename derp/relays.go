package derp

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	"tailscale.com/tailcfg"
)

// RelaySources knows the addresses from which the relays of a DERP map speak,
// for VerifyHandler: the addresses that the map names, what its host names
// resolve to, loopback, and Extra. Its fields must not change once it is used.
type RelaySources struct {
	// Map gives the current map; it is called at each Allow.
	Map func() *tailcfg.DERPMap
	// Extra are further networks, for relays that speak from elsewhere.
	Extra []netip.Prefix
	// LookupIP resolves host names. Nil means the system's resolver.
	LookupIP func(ctx context.Context, host string) ([]netip.Addr, error)
	// Now is the clock of the cache. Nil means time.Now.
	Now func() time.Time

	flight singleflight.Group // one look-up at a time

	mu      sync.Mutex // guards the following fields
	of      *tailcfg.DERPMap
	fetched time.Time
	known   map[netip.Addr]bool // replaced, never changed
}

// Allow reports whether a belongs to a relay. It may wait three seconds for
// the resolver, which it asks at most once a minute per map, whoever asks.
func (s *RelaySources) Allow(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	if a.IsLoopback() {
		return true
	}
	for _, p := range s.Extra {
		if p.Contains(a) {
			return true
		}
	}
	return s.addrs()[a]
}

func (s *RelaySources) addrs() map[netip.Addr]bool {
	now, m := time.Now, s.Map()
	if s.Now != nil {
		now = s.Now
	}
	at := now()
	s.mu.Lock()
	of, fetched, known := s.of, s.fetched, s.known
	s.mu.Unlock()
	if age := at.Sub(fetched); known != nil && of == m && age >= 0 && age < bootstrapTTL {
		return known
	}
	next, _, _ := s.flight.Do("", func() (any, error) {
		next := s.resolve(m)
		s.mu.Lock()
		s.of, s.fetched, s.known = m, at, next
		s.mu.Unlock()
		return next, nil
	})
	return next.(map[netip.Addr]bool)
}

// resolve collects the addresses of every relay in m. A name is looked up
// only when its node does not name both addresses itself.
func (s *RelaySources) resolve(m *tailcfg.DERPMap) map[netip.Addr]bool {
	lookup := s.LookupIP
	if lookup == nil {
		lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), bootstrapTimeout)
	defer cancel()
	known, asked := map[netip.Addr]bool{}, map[string]bool{}
	if m == nil {
		return known
	}
	for _, r := range m.Regions {
		for _, n := range r.Nodes {
			if n.STUNOnly {
				continue
			}
			for _, text := range []string{n.IPv4, n.IPv6, n.HostName} {
				if ip, err := netip.ParseAddr(text); err == nil {
					known[ip.Unmap()] = true
				}
			}
			_, err := netip.ParseAddr(n.HostName)
			if err == nil || (n.IPv4 != "" && n.IPv6 != "") || asked[n.HostName] {
				continue
			}
			asked[n.HostName] = true
			found, err := lookup(ctx, n.HostName)
			if err != nil {
				continue // a relay that cannot be found cannot be believed either
			}
			for _, ip := range found {
				known[ip.Unmap()] = true
			}
		}
	}
	return known
}
