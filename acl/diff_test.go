package acl

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"tailscale.com/tailcfg"
	"tailscale.com/types/ipproto"
	"tailscale.com/wgengine/filter"
)

// world is one side of a comparison as stock clients see it.
type world struct {
	tn      *Tailnet
	a       *Access
	filters []*filter.Filter
}

func newWorld(t *testing.T, tn *Tailnet, src []byte) *world {
	t.Helper()
	p, err := Parse(src)
	if err != nil {
		t.Fatalf("%v\n%s", err, src)
	}
	a, err := Compile(p, tn)
	if err != nil {
		t.Fatalf("%v\n%s", err, src)
	}
	w := &world{tn: tn, a: a}
	for slot := range tn.Nodes {
		w.filters = append(w.filters, clientFilter(t, a, slot))
	}
	return w
}

// allows asks the receiving client's packet filter.
func (w *world) allows(from, to Endpoint, proto int, port uint16) bool {
	if !from.Addr.IsValid() || !to.Addr.IsValid() {
		return false
	}
	receivers := []int{to.Slot}
	if to.Slot < 0 {
		sender := from.Slot
		if sender < 0 {
			if sender = w.a.routerOf(from.Addr); sender < 0 {
				return false
			}
		}
		receivers = receiversOf(w.tn, w.a, sender, to.Addr)
	}
	return slices.ContainsFunc(receivers, func(r int) bool {
		return w.filters[r].Check(from.Addr, to.Addr, port, ipproto.Proto(icmpFor(to.Addr, proto))) == filter.Accept
	})
}

// TestDiffEqualsMatrices compares the flow changes with the difference of two
// full reachability matrices, taken from clients' packet filters.
func TestDiffEqualsMatrices(t *testing.T) {
	rounds := 250
	if testing.Short() {
		rounds = 40
	}
	changes := 0
	for seed := range rounds {
		rnd := rand.New(rand.NewPCG(uint64(seed), 11))
		oldNet, newNet := randomTailnet(rnd), (*Tailnet)(nil)
		if rnd.IntN(2) == 0 {
			newNet = randomTailnet(rnd)
		} else {
			newNet = oldNet
		}
		oldSrc, newSrc := randomPolicy(rnd), randomPolicy(rnd)
		was, now := newWorld(t, oldNet, oldSrc), newWorld(t, newNet, newSrc)
		d := &differ{sides: [2]*side{newSide(was.a), newSide(now.a)}}
		d.collectNodes()
		flows := d.flows()
		changes += len(flows)
		said := map[string]bool{}
		for _, f := range flows {
			for _, from := range f.from {
				for _, to := range f.to {
					for _, q := range samples {
						if f.span.proto == q.Proto && f.span.first <= q.Port && q.Port <= f.span.last {
							said[fmt.Sprint(f.Opened, from, to, q.Proto, q.Port)] = true
						}
					}
				}
			}
		}
		for i := range d.points.list {
			for k := range d.points.list {
				a, b := &d.points.list[i], &d.points.list[k]
				if a.six != b.six || i == k || a.node >= 0 && a.node == b.node {
					continue
				}
				for _, q := range samples {
					x := was.allows(a.at[0], b.at[0], q.Proto, q.Port)
					y := now.allows(a.at[1], b.at[1], q.Proto, q.Port)
					opened, closed := said[fmt.Sprint(true, i, k, q.Proto, q.Port)], said[fmt.Sprint(false, i, k, q.Proto, q.Port)]
					if opened != (!x && y) || closed != (x && !y) {
						t.Fatalf("seed %d: %+v -> %+v proto %d port %d: was %v, now %v, but diff says opened %v, closed %v\nold %s\nnew %s",
							seed, a, b, q.Proto, q.Port, x, y, opened, closed, oldSrc, newSrc)
					}
				}
			}
		}
		checkOutsiders(t, seed, d, was, now, said)
		checkPeerChanges(t, seed, d, was, now)
	}
	t.Logf("%d flow changes", changes)
	if changes < rounds {
		t.Errorf("only %d changes in %d rounds: the samples prove little", changes, rounds)
	}
}

var samples = []Query{
	{Proto: 6, Port: 22}, {Proto: 6, Port: 80}, {Proto: 6, Port: 443}, {Proto: 6, Port: 1}, {Proto: 17, Port: 53}, {Proto: 17, Port: 65535},
	{Proto: 132, Port: 100}, {Proto: 1}, {Proto: 47},
}

// checkOutsiders compares connections with addresses that the comparison did
// not choose itself, both ways: what it took for no point has to be unchanged.
func checkOutsiders(t *testing.T, seed int, d *differ, was, now *world, said map[string]bool) {
	t.Helper()
	for _, addr := range outsiders {
		_, a := was.a.prog.owner(addr)
		_, b := now.a.prog.owner(addr)
		if a || b {
			continue
		}
		there := slices.IndexFunc(d.points.list, func(p point) bool { return p.node < 0 && p.rng.Contains(addr) })
		out := Endpoint{-1, addr}
		for i := range d.points.list {
			p := &d.points.list[i]
			if p.six != addr.Is6() || i == there {
				continue
			}
			for _, q := range samples {
				for _, c := range []struct {
					from, to         int
					fromWas, fromNow Endpoint
					toWas, toNow     Endpoint
				}{{i, there, p.at[0], p.at[1], out, out}, {there, i, out, out, p.at[0], p.at[1]}} {
					x := was.allows(c.fromWas, c.toWas, q.Proto, q.Port)
					y := now.allows(c.fromNow, c.toNow, q.Proto, q.Port)
					if c.from < 0 {
						// Nobody sends from an address that is behind no router.
						x, y = x && was.a.routerOf(addr) >= 0, y && now.a.routerOf(addr) >= 0
					}
					opened, closed := said[fmt.Sprint(true, c.from, c.to, q.Proto, q.Port)], said[fmt.Sprint(false, c.from, c.to, q.Proto, q.Port)]
					if opened != (!x && y) || closed != (x && !y) {
						t.Fatalf("seed %d: %v -> %v proto %d port %d: was %v, now %v, but diff says opened %v, closed %v",
							seed, c.fromNow, c.toNow, q.Proto, q.Port, x, y, opened, closed)
					}
				}
			}
		}
	}
}

// checkPeerChanges compares with the rows, pair by pair.
func checkPeerChanges(t *testing.T, seed int, d *differ, was, now *world) {
	t.Helper()
	said := map[string]bool{}
	for _, c := range d.peers() {
		for _, v := range c.Viewers {
			for _, p := range c.Peers {
				if v != p {
					said[fmt.Sprint(c.Appear, v, p)] = true
				}
			}
		}
	}
	sees := func(w *world, s *side, i, k int) bool {
		return s.slot[i] >= 0 && s.slot[k] >= 0 && w.a.Row(s.slot[i]).Has(s.slot[k])
	}
	for i := range d.ids {
		for k := range d.ids {
			if i == k {
				continue
			}
			x, y := sees(was, d.sides[0], i, k), sees(now, d.sides[1], i, k)
			appear, vanish := said[fmt.Sprint(true, d.names[i], d.names[k])], said[fmt.Sprint(false, d.names[i], d.names[k])]
			if appear != (!x && y) || vanish != (x && !y) {
				t.Fatalf("seed %d: %s sees %s: was %v, now %v; diff says appear %v, vanish %v", seed, d.names[i], d.names[k], x, y, appear, vanish)
			}
		}
	}
}

// TestDiffOfEqualPoliciesIsEmpty includes a policy that only moves and
// comments its rules.
func TestDiffOfEqualPoliciesIsEmpty(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 5))
	tn := randomTailnet(rnd)
	a := newWorld(t, tn, []byte(`{"tagOwners":{"tag:t0":[]},"acls":[{"action":"accept","src":["*"],"dst":["tag:t0:22"]},{"action":"accept","src":["autogroup:member"],"dst":["*:443"]}]}`))
	b := newWorld(t, tn, []byte(`{"tagOwners":{"tag:t0":[]},"acls":[ // other order
		{"action":"accept","src":["autogroup:member"],"dst":["*:443"]},
		{"action":"accept","src":["*"],"dst":["tag:t0:22"]}]}`))
	if e := Diff(a.a, b.a); !e.Empty() {
		t.Errorf("got changes %+v", e)
	}
}

func TestDiffTellsLoginsAndCapabilities(t *testing.T) {
	tn := &Tailnet{
		Users: []User{{ID: 1, Name: "ann", Email: "ann@example.com"}},
		Nodes: []Node{
			{ID: 1, Hostname: "laptop", User: 1, IPv4: netip.MustParseAddr("100.64.0.1")},
			{ID: 2, Hostname: "server", Tags: []string{"tag:s"}, IPv4: netip.MustParseAddr("100.64.0.2")},
		},
	}
	const head = `{"tagOwners":{"tag:s":[]},"acls":[],`
	a := newWorld(t, tn, []byte(head+`"ssh":[{"action":"accept","src":["ann@example.com"],"dst":["tag:s"],"users":["root","bob"]}]}`))
	b := newWorld(t, tn, []byte(head+`"ssh":[{"action":"check","src":["ann@example.com"],"dst":["tag:s"],"users":["root"]}],
		"nodeAttrs":[{"target":["tag:s"],"attr":["funnel"]}]}`))
	e := Diff(a.a, b.a)
	var logins []string
	for _, l := range e.Logins {
		logins = append(logins, fmt.Sprint(l.From, l.To, l.User, " ", l.Was, " ", l.Now))
	}
	want := []string{"[laptop] [server]bob accept deny", "[laptop] [server]root accept check"}
	if !slices.Equal(logins, want) {
		t.Errorf("logins: got %q, want %q", logins, want)
	}
	if !slices.ContainsFunc(e.Caps, func(c CapChange) bool {
		return c.Gained && c.Cap == string(tailcfg.NodeAttrFunnel) && slices.Equal(c.Nodes, []string{"server"})
	}) {
		t.Errorf("caps: got %+v, want funnel gained by server", e.Caps)
	}
}
