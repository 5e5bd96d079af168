package derp

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

const (
	bootstrapTTL     = time.Minute
	bootstrapTimeout = 3 * time.Second // clients wait as long per candidate
)

// bootstrap answers /bootstrap-dns: clients whose own DNS fails ask it for the
// address of the control server. It resolves only names fixed at start.
type bootstrap struct {
	now    func() time.Time
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	fixed  map[string][]netip.Addr // published anyway, no look-up
	names  []string                // lower case, sorted, without final dot

	flight singleflight.Group // one look-up at a time

	mu      sync.Mutex // guards the following fields
	fetched time.Time
	answer  map[string][]netip.Addr // replaced, never changed
}

func newBootstrap(c Config) *bootstrap {
	b := &bootstrap{now: c.Now, lookup: c.LookupIP, fixed: map[string][]netip.Addr{}}
	if b.lookup == nil {
		b.lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	for _, h := range append([]string{c.HostName}, c.BootstrapHosts...) {
		h = bootstrapName(h)
		if _, err := netip.ParseAddr(h); err == nil || h == "" || slices.Contains(b.names, h) {
			continue
		}
		b.names = append(b.names, h)
	}
	slices.Sort(b.names)
	for _, ip := range []netip.Addr{c.IPv4, c.IPv6} {
		if h := bootstrapName(c.HostName); ip.IsValid() && slices.Contains(b.names, h) {
			b.fixed[h] = append(b.fixed[h], ip)
		}
	}
	return b
}

func bootstrapName(h string) string { return strings.ToLower(strings.TrimSuffix(h, ".")) }

// ServeHTTP answers with a JSON object from name to addresses: the name in q
// if it is ours, all of ours without q, nothing for others.
func (b *bootstrap) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		http.Error(w, "GET only", http.StatusMethodNotAllowed)
		return
	}
	out := map[string][]netip.Addr{}
	q := bootstrapName(r.URL.Query().Get("q"))
	switch {
	case q == "":
		for h, ips := range b.resolved(r.Context()) {
			out[h] = ips
		}
	case slices.Contains(b.names, q):
		if ips := b.resolved(r.Context())[q]; len(ips) > 0 {
			out[q] = ips
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Connection", "close")
	// A write error means that the asker is gone.
	_ = json.NewEncoder(w).Encode(out)
}

// resolved is the answer for all names, at most bootstrapTTL old.
func (b *bootstrap) resolved(ctx context.Context) map[string][]netip.Addr {
	now := b.now()
	b.mu.Lock()
	answer, fetched := b.answer, b.fetched
	b.mu.Unlock()
	if age := now.Sub(fetched); answer != nil && age >= 0 && age < bootstrapTTL {
		return answer
	}
	// The answer is everybody's: the first asker leaving must not spoil it.
	next, _, _ := b.flight.Do("", func() (any, error) {
		next := b.resolve(context.WithoutCancel(ctx), answer)
		b.mu.Lock()
		b.answer, b.fetched = next, now
		b.mu.Unlock()
		return next, nil
	})
	return next.(map[string][]netip.Addr)
}

// resolve looks all names up. One that does not resolve keeps its earlier
// addresses.
func (b *bootstrap) resolve(ctx context.Context, before map[string][]netip.Addr) map[string][]netip.Addr {
	ctx, cancel := context.WithTimeout(ctx, bootstrapTimeout)
	defer cancel()
	next := make(map[string][]netip.Addr, len(b.names))
	for _, h := range b.names {
		ips := b.fixed[h]
		if ips == nil {
			found, err := b.lookup(ctx, h)
			if err != nil || len(found) == 0 {
				found = before[h]
			}
			for _, ip := range found {
				ips = append(ips, ip.Unmap())
			}
		}
		if len(ips) > 0 {
			next[h] = ips
		}
	}
	return next
}
