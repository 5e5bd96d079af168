package netmap_test

import (
	"testing"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/netmap"
	"github.com/signalbox-net/signalbox/control/tailnet"
)

// crowd is a tailnet of 1,000 nodes under a policy.
func crowd(b *testing.B, policy int) *world {
	w := newWorld(b, 7, 1000)
	w.begin()
	w.setPolicy(policy)
	w.publish()
	return w
}

// BenchmarkFull is the full map of one viewer after another, all frames of others being there.
func BenchmarkFull(b *testing.B) {
	for name, policy := range map[string]int{"all": 0, "self": 2} {
		b.Run(name, func(b *testing.B) {
			w := crowd(b, policy)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for slot := 0; pb.Next(); slot = (slot + 1) % w.now.Len() {
					netmap.Full(w.now, netmap.Viewer{Slot: slot})
				}
			})
		})
	}
}

// BenchmarkBetween is what one viewer after another is told of a moved node.
func BenchmarkBetween(b *testing.B) {
	w := crowd(b, 0)
	from := w.now
	w.begin()
	n := *w.nodes[500]
	n.State.DiscoKey, n.State.HomeDERP, n.State.Endpoints = w.discoKey(), 2, []tailcfg.Endpoint{}
	w.put(n)
	w.publish()
	d := tailnet.Diff(from, w.now)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for slot := 0; pb.Next(); slot = (slot + 1) % w.now.Len() {
			netmap.Between(d, netmap.Viewer{Slot: slot})
		}
	})
}
