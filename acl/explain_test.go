package acl

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"go4.org/netipx"
	"tailscale.com/types/ipproto"
	"tailscale.com/wgengine/filter"
)

// clientFilter is the filter that a stock client builds from what the node gets.
func clientFilter(t *testing.T, a *Access, slot int) *filter.Filter {
	t.Helper()
	matches, err := filter.MatchesFromFilterRules(a.Filter(slot).Rules)
	if err != nil {
		t.Fatalf("the client refuses the filter: %v", err)
	}
	var local netipx.IPSetBuilder
	// A client cuts private networks and the tailnet's ranges out of a default
	// route (ipnlocal, shrinkDefaultRoute).
	for _, p := range a.Self(slot).AllowedIPs {
		if p.Bits() == 0 {
			local.AddPrefix(p)
		}
	}
	for _, s := range []string{"192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "100.64.0.0/10",
		"fe80::/10", "ff00::/8", "fd7a:115c:a1e0::/48"} {
		local.RemovePrefix(netip.MustParsePrefix(s))
	}
	for _, p := range a.Self(slot).AllowedIPs {
		if p.Bits() > 0 {
			local.AddPrefix(p)
		}
	}
	nets, err := local.IPSet()
	if err != nil {
		t.Fatal(err)
	}
	return filter.New(matches, nil, nets, nil, nil, t.Logf)
}

// receiversOf follows the sender's routing table as a client does: the visible
// peers with the longest prefix of AllowedIPs. There are several only for
// default routes, between which the sender's user chooses an exit node.
func receiversOf(tn *Tailnet, a *Access, sender int, to netip.Addr) []int {
	var best []int
	bits := -1
	views := a.Views(sender)
	for slot := range tn.Nodes {
		if slot == sender || !a.Row(sender).Has(slot) {
			continue
		}
		v := a.Base(slot)
		for i, s := range views.Slots {
			if s == slot {
				v = views.Peers[i]
			}
		}
		for _, p := range v.AllowedIPs {
			switch {
			case !p.Contains(to) || p.Bits() < bits:
			case p.Bits() == bits:
				best = append(best, slot)
			default:
				best, bits = []int{slot}, p.Bits()
			}
		}
	}
	return best
}

// TestExplainEqualsClientFilter compares every verdict with tailscale's own
// packet filter, loaded with the compiled rules.
func TestExplainEqualsClientFilter(t *testing.T) {
	rounds := 200
	if testing.Short() {
		rounds = 50
	}
	checked, allowed, behind := 0, 0, 0
	for seed := range rounds {
		rnd := rand.New(rand.NewPCG(uint64(seed), 7))
		tn, src := randomTailnet(rnd), randomPolicy(rnd)
		p, err := Parse(src)
		if err != nil {
			t.Fatalf("seed %d: %v\n%s", seed, err, src)
		}
		a, err := Compile(p, tn)
		if err != nil {
			t.Fatalf("seed %d: %v\n%s", seed, err, src)
		}
		filters := make([]*filter.Filter, len(tn.Nodes))
		for slot := range tn.Nodes {
			filters[slot] = clientFilter(t, a, slot)
		}
		// Senders are nodes and what sits behind routers, with the slot whose
		// routing table their packets follow.
		type sender struct {
			Endpoint
			slot int
		}
		var senders []sender
		var tos []Endpoint
		for slot := range tn.Nodes {
			for _, e := range a.prog.nodeEndpoints(slot) {
				tos = append(tos, e)
				if a.uses(slot, e.Addr) { // with disable-ipv4 the node does not send from it
					senders = append(senders, sender{e, slot})
				}
			}
		}
		for _, addr := range outsiders {
			e := a.prog.endpoint(addr)
			if e.Slot >= 0 {
				continue
			}
			tos = append(tos, e)
			if router := a.routerOf(addr); router >= 0 {
				senders = append(senders, sender{e, router})
			}
		}
		for _, from := range senders {
			for _, to := range tos {
				if to.Addr.Is4() != from.Addr.Is4() || to.Slot == from.slot {
					continue
				}
				receivers := []int{to.Slot}
				if to.Slot < 0 || !a.uses(to.Slot, to.Addr) {
					receivers = receiversOf(tn, a, from.slot, to.Addr)
				}
				for _, q := range []Query{{Proto: 6, Port: 22}, {Proto: 6, Port: 443}, {Proto: 17, Port: 53}, {Proto: 132, Port: 100}, {Proto: 1}, {Proto: 47}} {
					q.From, q.To = from.Endpoint, to
					v := a.Explain(q)
					want := slices.ContainsFunc(receivers, func(r int) bool {
						return filters[r].Check(from.Addr, to.Addr, q.Port, ipproto.Proto(v.Proto)) == filter.Accept
					})
					if checked++; v.Allowed {
						allowed++
						if from.Slot < 0 {
							behind++
						}
					}
					if v.Allowed != want {
						t.Fatalf("seed %d: %v -> %v proto %d port %d: explain says %v (%s), the filters of %v %v\n%s",
							seed, from, to, v.Proto, q.Port, v.Allowed, v.Reason, receivers, want, src)
					}
					if v.Allowed != (len(v.Rules) > 0) {
						t.Fatalf("seed %d: verdict without rules: %+v", seed, v)
					}
				}
			}
		}
	}
	if behind < rounds {
		t.Errorf("only %d verdicts allow what comes from behind routers", behind)
	}
	t.Logf("%d verdicts, %d allowed", checked, allowed)
	if allowed < checked/100 {
		t.Errorf("only %d of %d verdicts allow: the samples prove little", allowed, checked)
	}
}
