package control_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

func TestAlarmsNameWhatGrowsTooFar(t *testing.T) {
	// 200 nodes of ann's, 10 of ben's and 40 with a tag.
	batch := &db.Batch{Full: true, To: 1, Nodes: map[tailcfg.NodeID]*db.Node{}, Users: map[tailcfg.UserID]*db.User{1: {ID: 1, Name: "ann"}, 2: {ID: 2, Name: "ben"}}}
	for i := range 250 {
		n := &db.Node{
			ID: tailcfg.NodeID(i + 1), NodeKey: key.NewNode().Public(), GivenName: fmt.Sprintf("h%d", i), IPv4: netip.AddrFrom4([4]byte{100, 64, 1, byte(i)}), User: 1,
		}
		switch {
		case i >= 210:
			n.User, n.Tags = 0, []string{"tag:a"}
		case i >= 200:
			n.User = 2
		}
		batch.Nodes[n.ID] = n
	}
	snap, err := tailnet.Build(nil, batch)
	if err != nil {
		t.Fatal(err)
	}
	v6 := netip.MustParsePrefix("fd7a:115c:a1e0::/48")
	for pool, want := range map[string]string{
		"100.64.0.0/10": "user ann has 200", "100.64.0.0/23": "user ann has 200", "100.64.0.0/24": "98 % of the address pool 100.64.0.0/24|user ann has 200",
	} {
		got := control.Alarms(snap, db.Pools{IPv4: netip.MustParsePrefix(pool), IPv6: v6})
		parts := strings.Split(want, "|")
		if len(got) != len(parts) {
			t.Errorf("pool %s: alarms %q, want %d", pool, got, len(parts))
		}
		for _, part := range parts {
			found := false
			for _, text := range got {
				found = found || strings.Contains(text, part)
			}
			if !found {
				t.Errorf("pool %s: no alarm says %q in %q", pool, part, got)
			}
		}
	}
}
