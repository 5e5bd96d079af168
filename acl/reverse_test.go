package acl

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"go4.org/netipx"
)

// outsiders are addresses that no random node has: behind routers, beyond exit
// nodes, and where nothing leads.
var outsiders = func() []netip.Addr {
	var out []netip.Addr
	for _, s := range []string{"10.0.0.0", "10.200.3.4", "10.33.0.9", "10.33.1.7", "10.33.255.255", "192.168.1.4", "192.168.9.9", "8.8.8.8",
		"100.64.0.7", "100.64.9.9", "100.64.200.1", "224.0.0.5", "169.254.1.1", "169.254.169.254", "fd00:1::5", "fd00:2::5",
		"2001:4860:4860::8888", "4000::1", "fd7a:115c:a1e0::999", "fd7a:115c:a1e0::abcd", "ff02::1"} {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}()

// opens reports whether the openings contain the query.
func opens(t *testing.T, a *Access, list []Opening, q Query, other Endpoint) bool {
	t.Helper()
	return slices.ContainsFunc(list, func(o Opening) bool {
		if o.Slot >= 0 || other.Slot >= 0 && a.uses(other.Slot, other.Addr) {
			if o.Slot != other.Slot {
				return false
			}
		} else if !rangeHas(t, o.Range, other.Addr) {
			return false
		}
		return slices.ContainsFunc(o.Ports, func(s string) bool {
			proto, ports := 0, s
			if name, rest, ok := strings.Cut(s, ":"); ok {
				n, err := parseProto(name)
				if err != nil {
					t.Fatal(err)
				}
				proto, ports = n, rest
			}
			list, err := parsePorts(ports, 0)
			if err != nil {
				t.Fatal(err)
			}
			return portMatch(&flow{proto: proto}, &part{ports: list}, q.Proto, q.Port)
		})
	})
}

// rangeHas reads Opening.Range as a person does.
func rangeHas(t *testing.T, text string, addr netip.Addr) bool {
	t.Helper()
	if text == "autogroup:internet" {
		return internetSet.Contains(addr) && forwarded(addr)
	}
	if p, _, ok := parsePrefix(text); ok {
		return p.Contains(addr) && (p.Bits() > 0 || forwarded(addr))
	}
	rng, err := netipx.ParseIPRange(text)
	if err != nil {
		t.Fatal(err)
	}
	return rng.Contains(addr)
}

// TestReachEqualsExplain asks for every pair of addresses whether the two
// lists, what A reaches and who reaches B, say what explain says.
func TestReachEqualsExplain(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 15
	}
	allowed, outside := 0, 0
	for seed := range rounds {
		rnd := rand.New(rand.NewPCG(uint64(seed), 23))
		tn, src := randomTailnet(rnd), randomPolicy(rnd)
		a := newWorld(t, tn, src).a
		var ends []Endpoint
		for slot := range tn.Nodes {
			ends = append(ends, a.prog.nodeEndpoints(slot)...)
		}
		nodes := len(ends)
		for _, addr := range outsiders {
			if e := a.prog.endpoint(addr); e.Slot < 0 {
				ends = append(ends, e)
			}
		}
		who := make([][]Opening, len(ends))
		for k, to := range ends {
			who[k] = a.WhoReaches(to)
		}
		for _, from := range ends[:nodes] {
			what := a.ReachableFrom(from)
			for k, to := range ends {
				if from.Addr.Is4() != to.Addr.Is4() || from.Slot == to.Slot {
					continue
				}
				for _, q := range samples {
					q.From, q.To = from, to
					q.Proto = icmpFor(to.Addr, q.Proto)
					want := a.Explain(q).Allowed
					if got := opens(t, a, what, q, to); got != want {
						t.Fatalf("seed %d: %v -> %v proto %d port %d: explain says %v, what %v reaches %v: %+v\n%s",
							seed, from, to, q.Proto, q.Port, want, from, got, what, src)
					}
					// The lists of senders do not tell families apart.
					if want && !opens(t, a, who[k], q, Endpoint{from.Slot, netip.Addr{}}) {
						t.Fatalf("seed %d: %v -> %v proto %d port %d is allowed, but who reaches it is %+v\n%s",
							seed, from, to, q.Proto, q.Port, who[k], src)
					}
					if want {
						if allowed++; to.Slot < 0 {
							outside++
						}
					}
				}
			}
		}
	}
	t.Logf("%d allowed, %d of them beyond the nodes", allowed, outside)
	if outside < rounds {
		t.Errorf("only %d allowed connections leave the tailnet: the samples prove little", outside)
	}
}

// The reach of a rule is what routers offer of the range that it names.
func TestReachListsWhatRoutersOffer(t *testing.T) {
	tn := &Tailnet{
		Users: []User{{ID: 1, Name: "ann", Email: "ann@example.com"}},
		Nodes: []Node{
			{ID: 1, Hostname: "pc", User: 1, IPv4: netip.MustParseAddr("100.64.0.1"), IPv6: netip.MustParseAddr("fd7a:115c:a1e0::1")},
			{ID: 2, Hostname: "router", Tags: []string{"tag:r"}, IPv4: netip.MustParseAddr("100.64.0.2"), IPv6: netip.MustParseAddr("fd7a:115c:a1e0::2")},
			{ID: 3, Hostname: "exit", Tags: []string{"tag:e"}, IPv4: netip.MustParseAddr("100.64.0.3"), IPv6: netip.MustParseAddr("fd7a:115c:a1e0::3")},
		},
	}
	routes := func(slot int, list ...string) {
		for _, s := range list {
			p := netip.MustParsePrefix(s)
			tn.Nodes[slot].RoutableIPs = append(tn.Nodes[slot].RoutableIPs, p)
			tn.Nodes[slot].ApprovedRoutes = append(tn.Nodes[slot].ApprovedRoutes, p)
		}
	}
	routes(1, "10.33.0.0/16", "10.99.0.0/24")
	routes(2, "0.0.0.0/0", "::/0")
	for rules, want := range map[string][]string{
		`{"action":"accept","src":["*"],"dst":["10.0.0.0/8:443"]}`:          {"10.33.0.0/16 443", "10.99.0.0/24 443"},
		`{"action":"accept","src":["*"],"dst":["10.33.4.0/24:443"]}`:        {"10.33.4.0/24 443"},
		`{"action":"accept","src":["*"],"dst":["10.34.0.0/16:443"]}`:        nil,
		`{"action":"accept","src":["*"],"dst":["*:80"]}`:                    {"router 80", "exit 80", "10.33.0.0/16 80", "10.99.0.0/24 80", "0.0.0.0/0 80", "::/0 80"},
		`{"action":"accept","src":["*"],"dst":["autogroup:internet:80"]}`:   {"autogroup:internet 80"},
		`{"action":"accept","src":["*"],"dst":["8.8.0.0/16:53","tag:r:1"]}`: {"router 1"}, // exit nodes serve autogroup:internet and * alone
	} {
		a := newWorld(t, tn, []byte(`{"tagOwners":{"tag:r":[],"tag:e":[]},"acls":[`+rules+`]}`)).a
		var got []string
		for _, from := range a.prog.nodeEndpoints(0) {
			for _, o := range a.ReachableFrom(from) {
				other := o.Range
				if o.Slot >= 0 {
					other = tn.Nodes[o.Slot].Hostname
				}
				if line := fmt.Sprint(other, " ", strings.Join(o.Ports, " ")); !slices.Contains(got, line) {
					got = append(got, line)
				}
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s:\ngot  %q\nwant %q", rules, got, want)
		}
	}
}
