package main

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"tailscale.com/tailcfg"
)

// watch waits until every viewer of one node was told of one change.
type watch struct {
	endpoint netip.AddrPort // the change, when valid
	online   bool           // the change otherwise
	port     uint16         // the change, when not 0: a rule with this port in the viewer's own filter

	start time.Time
	seen  []atomic.Int64 // nanoseconds after start by client; 0 = not yet, -1 = not a viewer
	left  atomic.Int64
	done  chan struct{}
}

// newWatch makes a watch for the clients for which viewer returns true.
func newWatch(n int, viewer func(i int) bool) *watch {
	w := &watch{start: time.Now(), seen: make([]atomic.Int64, n), done: make(chan struct{})}
	left := 0
	for i := range n {
		if viewer(i) {
			left++
		} else {
			w.seen[i].Store(-1)
		}
	}
	w.left.Store(int64(left))
	if left == 0 {
		close(w.done)
	}
	return w
}

func (w *watch) node(n *tailcfg.Node) bool {
	switch {
	case w.port != 0:
		return false
	case w.endpoint.IsValid():
		return slices.Contains(n.Endpoints, w.endpoint)
	}
	return n.Online != nil && *n.Online == w.online
}

func (w *watch) change(c *tailcfg.PeerChange) bool {
	switch {
	case w.port != 0:
		return false
	case w.endpoint.IsValid():
		return slices.Contains(c.Endpoints, w.endpoint)
	}
	return c.Online != nil && *c.Online == w.online
}

func (w *watch) note(i int, at time.Time) {
	if w.seen[i].CompareAndSwap(0, max(1, int64(at.Sub(w.start)))) && w.left.Add(-1) == 0 {
		close(w.done)
	}
}

// delays returns the sorted delays of the viewers that saw the change, and how
// many did not.
func (w *watch) delays() (seen []time.Duration, missing int) {
	for i := range w.seen {
		switch d := w.seen[i].Load(); {
		case d > 0:
			seen = append(seen, time.Duration(d))
		case d == 0:
			missing++
		}
	}
	slices.Sort(seen)
	return seen, missing
}

// quantile of sorted durations; 0 when there are none.
func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	i := int(q * float64(len(sorted)))
	return sorted[min(i, len(sorted)-1)]
}
