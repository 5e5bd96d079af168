package dbtest

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/db"
)

func testAddressesUpward(t *testing.T, f *fixture) {
	for i := 1; i <= 3; i++ {
		n := f.node("n")
		want4, want6 := fmt.Sprintf("100.64.0.%d", i), fmt.Sprintf("fd7a:115c:a1e0::%d", i)
		if n.IPv4.String() != want4 || n.IPv6.String() != want6 {
			t.Errorf("node %d got %v and %v, want %s and %s", i, n.IPv4, n.IPv6, want4, want6)
		}
	}
	f.update(func(tx *db.Tx) error {
		v4, v6, err := tx.AllocateAddrs(db.Pools{IPv6: pools.IPv6})
		if v4.IsValid() || !v6.IsValid() {
			t.Errorf("with an IPv6 pool only: %v, %v", v4, v6)
		}
		for addr, want := range map[string]bool{"100.64.0.1": false, "100.64.0.9": true, "fd7a:115c:a1e0::2": false} {
			if free, err := tx.AddrFree(netip.MustParseAddr(addr)); err != nil || free != want {
				t.Errorf("AddrFree(%s) = %v, %v", addr, free, err)
			}
		}
		return err
	})
}

func testAddressesReserved(t *testing.T, f *fixture) {
	for _, c := range []struct{ at, want string }{
		{"100.99.255.254", "100.99.255.255"}, {"100.99.255.255", "100.100.1.0"}, {"100.100.99.255", "100.100.101.0"},
		{"100.115.91.255", "100.115.94.0"}, {"100.127.255.254", "100.64.0.1"}, // the last one is the broadcast address
	} {
		f.update(func(tx *db.Tx) error {
			n := NewNode(f.user)
			n.IPv4, n.GivenName = netip.MustParseAddr(c.at), "edge"
			if err := tx.CreateNode(n); err != nil {
				return err
			}
			got, _, err := tx.AllocateAddrs(db.Pools{IPv4: pools.IPv4})
			if got.String() != c.want {
				t.Errorf("after %s came %v, want %s", c.at, got, c.want)
			}
			if err == nil {
				err = tx.DeleteNode(n.ID)
			}
			return err
		})
	}
	f.update(func(tx *db.Tx) error {
		n := NewNode(f.user)
		n.IPv6, n.GivenName = netip.MustParseAddr("fd7a:115c:a1e0::52"), "edge6"
		if err := tx.CreateNode(n); err != nil {
			return err
		}
		_, got, err := tx.AllocateAddrs(db.Pools{IPv6: pools.IPv6})
		if got.String() != "fd7a:115c:a1e0::54" {
			t.Errorf("after ::52 came %v, want ::54", got)
		}
		return err
	})
}

// What was found free beside an address is given out later, unless somebody has
// taken it meanwhile.
func testAddressesKnownFree(t *testing.T, f *fixture) {
	at := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{100, 64, 0, byte(n)}) }
	first := f.node("first")
	f.update(func(tx *db.Tx) error {
		first.IPv4 = at(2) // by an administrator
		return tx.PutNode(first)
	})
	if n := f.node("second"); n.IPv4 != at(3) {
		t.Errorf("after the next address was taken came %v, want %v", n.IPv4, at(3))
	}
	failure := errors.New("no")
	err := f.try(func(tx *db.Tx) error {
		if err := Register(tx, NewNode(f.user), pools, "never"); err != nil {
			return err
		}
		return failure
	})
	if err != failure {
		t.Fatal(err)
	}
	if n := f.node("third"); n.IPv4 != at(4) {
		t.Errorf("after a registration that was undone came %v, want %v", n.IPv4, at(4))
	}
	f.update(func(tx *db.Tx) error { // several in one transaction, beside one that has its own
		for i, want := range []int{5, 6, 9, 10} {
			n := NewNode(f.user)
			if i == 2 {
				n.IPv4, n.GivenName = at(want), "chosen"
				if err := tx.CreateNode(n); err != nil {
					return err
				}
			} else if err := Register(tx, n, pools, "several"); err != nil {
				return err
			}
			if n.IPv4 != at(want) {
				t.Errorf("node %d got %v, want %v", i, n.IPv4, at(want))
			}
		}
		return nil
	})
	other := db.Pools{IPv4: netip.MustParsePrefix("100.99.0.0/16")}
	n := NewNode(f.user)
	f.update(func(tx *db.Tx) error { return Register(tx, n, other, "other") })
	if !other.IPv4.Contains(n.IPv4) {
		t.Errorf("got %v of the pool %v", n.IPv4, other.IPv4)
	}
}

func testAddressHeld(t *testing.T, f *fixture) {
	small := db.Pools{IPv4: netip.MustParsePrefix("100.64.0.0/28")} // 14 addresses
	var nodes []*db.Node
	create := func(name string) *db.Node {
		n := NewNode(f.user)
		f.update(func(tx *db.Tx) error { return Register(tx, n, small, name) })
		return n
	}
	for i := range 3 {
		nodes = append(nodes, create(fmt.Sprintf("n%d", i)))
	}
	freed := nodes[2].IPv4
	f.update(func(tx *db.Tx) error { return tx.DeleteNode(nodes[2].ID) })
	if n := create("next"); n.IPv4 == freed {
		t.Errorf("%v was given out again at once", freed)
	}

	// An administrator may choose it.
	f.update(func(tx *db.Tx) error {
		n := NewNode(f.user)
		n.IPv4, n.GivenName = freed, "chosen"
		if err := tx.CreateNode(n); err != nil {
			return err
		}
		return tx.DeleteNode(n.ID)
	})

	// A changed address is held too; after a day both come up again.
	moved := *nodes[1]
	moved.IPv4 = netip.MustParseAddr("100.64.0.14")
	f.update(func(tx *db.Tx) error { return tx.PutNode(&moved) })
	seen := map[netip.Addr]bool{}
	f.clock.Advance(24 * time.Hour)
	for i := range 11 {
		seen[create(fmt.Sprintf("late%d", i)).IPv4] = true
	}
	if !seen[freed] || !seen[nodes[1].IPv4] {
		t.Errorf("after a day %v and %v did not come up among %v", freed, nodes[1].IPv4, seen)
	}
}

func testAddressPoolExhausted(t *testing.T, f *fixture) {
	small := db.Pools{IPv4: netip.MustParsePrefix("100.64.0.0/29")} // 6 addresses
	seen := map[netip.Addr]bool{}
	var last *db.Node
	for range 6 {
		last = NewNode(f.user)
		f.update(func(tx *db.Tx) error { return Register(tx, last, small, "n") })
		if seen[last.IPv4] || !small.IPv4.Contains(last.IPv4) {
			t.Fatalf("got %v after %v", last.IPv4, seen)
		}
		seen[last.IPv4] = true
	}
	n := NewNode(f.user)
	if err := f.try(func(tx *db.Tx) error { return Register(tx, n, small, "n") }); !errors.Is(err, db.ErrPoolExhausted) {
		t.Errorf("a seventh node in a pool of six: %v", err)
	}
	// A held address is better than none.
	f.update(func(tx *db.Tx) error { return tx.DeleteNode(last.ID) })
	f.update(func(tx *db.Tx) error { return Register(tx, n, small, "n") })
	if n.IPv4 != last.IPv4 {
		t.Errorf("got %v, want the only free one, %v", n.IPv4, last.IPv4)
	}
}

func testAddressesRandom(t *testing.T, f *fixture) {
	small := db.Pools{IPv4: netip.MustParsePrefix("100.64.0.0/28"), IPv6: pools.IPv6, Random: true}
	seen := map[netip.Addr]bool{}
	upward := true
	var before netip.Addr
	for range 14 {
		n := NewNode(f.user)
		f.update(func(tx *db.Tx) error { return Register(tx, n, small, "n") })
		if seen[n.IPv4] || !small.IPv4.Contains(n.IPv4) || seen[n.IPv6] || !small.IPv6.Contains(n.IPv6) {
			t.Fatalf("got %v and %v after %v", n.IPv4, n.IPv6, seen)
		}
		seen[n.IPv4], seen[n.IPv6] = true, true
		upward = upward && (!before.IsValid() || before.Less(n.IPv6))
		before = n.IPv6
	}
	if upward {
		t.Error("14 random addresses came in ascending order")
	}
	if err := f.try(func(tx *db.Tx) error { return Register(tx, NewNode(f.user), small, "n") }); !errors.Is(err, db.ErrPoolExhausted) {
		t.Errorf("a 15th node in a pool of 14: %v", err)
	}
}

func testNameSuffixes(t *testing.T, f *fixture) {
	for _, want := range []string{"laptop", "laptop-1", "laptop-2", "laptop-3", "laptop-4", "laptop-5", "laptop-6", "laptop-7"} {
		if n := f.node("laptop"); n.GivenName != want {
			t.Fatalf("got %q, want %q", n.GivenName, want)
		}
	}
	long := strings.Repeat("x", 63)
	for _, want := range []string{long, long[:61] + "-1", long[:61] + "-2"} {
		if n := f.node(long); n.GivenName != want {
			t.Errorf("got %q, want %q", n.GivenName, want)
		}
	}
	// Names that were not found by FreeName: it must search for the end.
	f.update(func(tx *db.Tx) error {
		for i := range 60 {
			n := NewNode(f.user)
			n.IPv4 = netip.AddrFrom4([4]byte{100, 65, 0, byte(i)})
			n.GivenName = strings.TrimSuffix(fmt.Sprintf("many-%d", i), "-0")
			if err := tx.CreateNode(n); err != nil {
				return err
			}
			if got, err := tx.FreeName("many", ""); got != fmt.Sprintf("many-%d", i+1) {
				t.Errorf("after %s came %q, %v", n.GivenName, got, err)
			}
		}
		return nil
	})
	if err := f.try(func(tx *db.Tx) error { _, err := tx.FreeName("Bad Name", ""); return err }); err == nil {
		t.Error("a base that is no label was accepted")
	}
}

func testNameHeld(t *testing.T, f *fixture) {
	n := f.node("mail")
	f.update(func(tx *db.Tx) error { return tx.DeleteNode(n.ID) })
	other := &db.Node{Tags: []string{"tag:b", "tag:a"}}
	name := func(owner string) (got string) {
		t.Helper()
		f.update(func(tx *db.Tx) (err error) { got, err = tx.FreeName("mail", owner); return err })
		return got
	}
	if got := name(other.Owner()); got != "mail-1" {
		t.Errorf("somebody else was given %q at once", got)
	}
	if got := name(n.Owner()); got != "mail" {
		t.Errorf("the former owner was given %q", got)
	}
	f.clock.Advance(24 * time.Hour)
	if got := name(other.Owner()); got != "mail" {
		t.Errorf("after a day somebody else was given %q", got)
	}

	// A name that was changed is held as well.
	n = f.node("web")
	n.GivenName = "www"
	f.update(func(tx *db.Tx) error { return tx.PutNode(n) })
	f.update(func(tx *db.Tx) error {
		if got, err := tx.FreeName("web", other.Owner()); got != "web-1" || err != nil {
			t.Errorf("a name just given up: %q, %v", got, err)
		}
		for name, want := range map[string]bool{"web": true, "www": false, "localhost": false, "vpn": false} {
			if free, err := tx.NameFree(name, "vpn"); err != nil || free != want {
				t.Errorf("NameFree(%s) = %v, %v", name, free, err)
			}
		}
		return nil
	})
}

func testNameReserved(t *testing.T, f *fixture) {
	f.update(func(tx *db.Tx) error {
		for base, want := range map[string]string{
			"localhost": "localhost-1", "wpad": "wpad-1", "isatap": "isatap-1", "ipv4only": "ipv4only-1",
			"signalbox": "signalbox-2", "fine": "fine",
		} {
			if got, err := tx.FreeName(base, "", "signalbox", "signalbox-1"); err != nil || got != want {
				t.Errorf("FreeName(%q) = %q, %v; want %q", base, got, err, want)
			}
		}
		return nil
	})
}
