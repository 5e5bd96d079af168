package acl

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"

	"tailscale.com/tailcfg"
)

// randomTailnet is small and full of special cases: nodes of one address
// family, several tags, overlapping and unapproved routes, exit nodes, holes,
// expired nodes, routes that cover node addresses.
func randomTailnet(rnd *rand.Rand) *Tailnet {
	t := &Tailnet{Domains: []string{"example.com"}, ControlURL: "https://control.example.com", Primaries: map[netip.Prefix]tailcfg.NodeID{}}
	roles := []string{"owner", "admin", "member", "auditor", ""}
	for i := range 4 {
		domain := "example.com"
		if i == 3 {
			domain = "example.org"
		}
		t.Users = append(t.Users, User{ID: tailcfg.UserID(i + 1), Name: fmt.Sprint("u", i), Email: fmt.Sprintf("u%d@%s", i, domain), Role: roles[rnd.IntN(len(roles))]})
	}
	routes := []string{"10.0.0.0/8", "10.33.0.0/16", "10.33.1.0/24", "192.168.1.0/24", "fd00:1::/64", "100.64.0.0/29", "0.0.0.0/0", "::/0"}
	for i := range 4 + rnd.IntN(9) {
		if rnd.IntN(12) == 0 {
			t.Nodes = append(t.Nodes, Node{})
			continue
		}
		n := Node{ID: tailcfg.NodeID(i + 1), Hostname: fmt.Sprint("n", i), Expired: rnd.IntN(10) == 0}
		if rnd.IntN(8) != 0 {
			n.IPv4 = netip.AddrFrom4([4]byte{100, 64, 0, byte(i + 1)})
		}
		if !n.IPv4.IsValid() || rnd.IntN(8) != 0 {
			n.IPv6 = netip.MustParseAddr(fmt.Sprintf("fd7a:115c:a1e0::%x", i+1))
		}
		if rnd.IntN(2) == 0 {
			n.Tags = []string{fmt.Sprint("tag:t", rnd.IntN(3))}
			if rnd.IntN(3) == 0 {
				n.Tags = append(n.Tags, "tag:extra")
			}
		} else {
			n.User = tailcfg.UserID(rnd.IntN(4) + 1)
		}
		for range rnd.IntN(3) {
			p := netip.MustParsePrefix(routes[rnd.IntN(len(routes))])
			n.RoutableIPs = append(n.RoutableIPs, p)
			if rnd.IntN(3) != 0 {
				n.ApprovedRoutes = append(n.ApprovedRoutes, p)
			}
			if rnd.IntN(4) == 0 {
				t.Primaries[p] = n.ID
			}
		}
		n.OS = []string{"linux", "macOS", ""}[rnd.IntN(3)]
		n.Posture = map[string]any{"custom:level": float64(rnd.IntN(3))}
		t.Nodes = append(t.Nodes, n)
	}
	if rnd.IntN(3) == 0 && len(t.Nodes) > 0 && t.Nodes[0].ID != 0 {
		t.Services = []Service{{
			Name: "svc:web", IPv4: netip.MustParseAddr("100.64.9.9"), IPv6: netip.MustParseAddr("fd7a:115c:a1e0::999"),
			Hosts: []tailcfg.NodeID{t.Nodes[0].ID},
		}}
	}
	return t
}

// randomPolicy writes a valid policy for it.
func randomPolicy(rnd *rand.Rand) []byte {
	pick := func(list ...string) string { return list[rnd.IntN(len(list))] }
	some := func(list ...string) string {
		var out []string
		for range 1 + rnd.IntN(2) {
			out = append(out, fmt.Sprintf("%q", pick(list...)))
		}
		return strings.Join(out, ",")
	}
	src := []string{
		"*", "u0@example.com", "u1@example.com", "u3@example.org", "u2@", "group:a", "group:b", "group:none", "tag:t0", "tag:t1", "tag:extra",
		"autogroup:member", "autogroup:tagged", "autogroup:admin", "autogroup:owner", "autogroup:danger-all", "user:*@example.com",
		"100.64.0.1", "100.64.0.0/30", "10.33.0.0/16", "lan", "box", "ipset:some", "fd7a:115c:a1e0::2", "100.64.0.2-100.64.0.5",
	}
	dst := []string{
		"*", "u0@example.com", "u1@example.com", "group:a", "tag:t0", "tag:t1", "tag:t2", "tag:extra", "autogroup:member", "autogroup:tagged",
		"autogroup:internet", "100.64.0.1", "100.64.0.3", "10.33.0.0/16", "10.33.1.7", "lan", "box", "ipset:some", "fd00:1::/64", "svc:web",
	}
	people := []string{"u0@example.com", "group:a", "group:b", "autogroup:member", "autogroup:admin"}
	ports := []string{"*", "22", "80-443", "22,443", "1-65535"}
	posture := func() string {
		if rnd.IntN(6) != 0 {
			return ""
		}
		return `"srcPosture":["` + pick("posture:linux", "posture:high") + `"],`
	}
	var b strings.Builder
	b.WriteString(`{"groups":{"group:a":["u0@example.com","u1@example.com"],"group:b":["u2@example.com","u3@example.org"],"group:none":[]},
"tagOwners":{"tag:t0":[],"tag:t1":[],"tag:t2":[],"tag:extra":[]},
"hosts":{"lan":"192.168.1.0/24","box":"100.64.0.2"},
"ipsets":{"ipset:some":["add 10.33.0.0/16","remove 10.33.1.0/24","box"]},
"postures":{"posture:linux":["node:os == 'linux'"],"posture:high":["custom:level >= 1"]},
`)
	b.WriteString("\"acls\":[\n")
	for range rnd.IntN(4) {
		switch rnd.IntN(5) {
		case 0:
			fmt.Fprintf(&b, "{\"action\":\"accept\",%s\"src\":[%s],\"dst\":[\"autogroup:self:%s\",%q]},\n", posture(), some(people...), pick(ports...), pick(dst...)+":"+pick(ports...))
		case 1:
			fmt.Fprintf(&b, "{\"action\":\"accept\",\"proto\":%q,\"src\":[%s],\"dst\":[%q]},\n", pick("tcp", "udp", "17", "sctp"), some(src...), pick(dst...)+":"+pick(ports...))
		case 2:
			fmt.Fprintf(&b, "{\"action\":\"accept\",\"proto\":%q,\"src\":[%s],\"dst\":[%q]},\n", pick("icmp", "gre", "58"), some(src...), pick(dst...)+":*")
		default:
			fmt.Fprintf(&b, "{\"action\":\"accept\",%s\"src\":[%s],\"dst\":[%q,%q]},\n", posture(), some(src...), pick(dst...)+":"+pick(ports...), pick(dst...)+":"+pick(ports...))
		}
	}
	b.WriteString("],\n\"grants\":[\n")
	for range rnd.IntN(4) {
		switch rnd.IntN(4) {
		case 0:
			fmt.Fprintf(&b, "{\"src\":[%s],\"dst\":[%s],\"via\":[%s],\"ip\":[%q]},\n", some(src...), some("10.33.0.0/16", "10.33.1.0/24", "autogroup:internet", "lan", "10.0.0.0/8", "*", "100.64.0.0/29"), some("tag:t0", "tag:t1", "tag:extra"), pick("*", "tcp:22", "icmp:*"))
		case 1:
			fmt.Fprintf(&b, "{\"src\":[%s],\"dst\":[%q],\"app\":{\"tailscale.com/cap/drive\":[{\"shares\":[\"*\"]}],\"example.com/cap/x\":[]}},\n", some(src...), pick("*", "tag:t0", "group:a", "box"))
		default:
			fmt.Fprintf(&b, "{%s\"src\":[%s],\"dst\":[%s],\"ip\":[%s]},\n", posture(), some(src...), some(dst...), some("*", "22", "tcp:443", "udp:53", "gre:*", "80-90"))
		}
	}
	b.WriteString("],\n\"ssh\":[\n")
	for range rnd.IntN(3) {
		switch rnd.IntN(3) {
		case 0:
			fmt.Fprintf(&b, "{\"action\":%q,\"src\":[%s],\"dst\":[\"autogroup:self\"],\"users\":[%s]},\n", pick("accept", "check"), some(people...), some("root", "autogroup:nonroot", "bob"))
		default:
			fmt.Fprintf(&b, "{\"action\":%q,\"src\":[%s],\"dst\":[%s],\"users\":[%s]},\n", pick("accept", "check"), some("tag:t0", "group:a", "autogroup:member", "u3@example.org"), some("tag:t0", "tag:t1", "autogroup:member"), some("root", "autogroup:nonroot", "localpart:*@example.com", "bob"))
		}
	}
	b.WriteString("],\n\"nodeAttrs\":[\n")
	if rnd.IntN(4) == 0 {
		fmt.Fprintf(&b, "{\"target\":[%s],\"attr\":[%s]},\n", some("tag:t0", "autogroup:member", "box"), some("disable-ipv4", "funnel", "custom:x"))
	}
	b.WriteString("]}")
	return []byte(b.String())
}
