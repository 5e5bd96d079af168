package register_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/signalbox-net/signalbox/control"
	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/db"
)

func TestFullTailnetTakesNoFurtherDevice(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: func(c *control.Config) { c.MaxNodes = 2 }})
	k := g.keyOf(reusable)
	a := g.NewClient("a").Join(k)
	g.NewClient("b").Join(k)
	once := g.keyOf(nil)
	c := g.NewClient("c")
	g.refused(g.register(c, once, nil), "as many devices as it may have")
	// Who is there already stays, and may have a new key; a place that was given up is free.
	a.Rekey()
	a.Join(k)
	g.DeleteNode(a.ID())
	c.Join(once)
}

// The last addresses of a pool are kept. Of the 30 of a /27 the last but one is more than 95 %.
func TestNearlyFullPoolTakesNoFurtherDevice(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: func(c *control.Config) { c.Pools = db.Pools{IPv4: netip.MustParsePrefix("100.64.0.0/27")} }})
	k := g.keyOf(reusable)
	for i := range 29 {
		g.NewClient(fmt.Sprintf("n%d", i)).Join(k)
	}
	g.refused(g.register(g.NewClient("last"), k, nil), "no free addresses left")
	if n := g.Replica.Current().Len(); n != 29 {
		t.Errorf("%d nodes, want 29", n)
	}
}
