package acl

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"tailscale.com/tailcfg"
)

// fleet builds a tailnet of n nodes: a third are tagged with one or two of the
// tags, the others belong to users with about three devices each; one node in
// a hundred routes a subnet, one in two hundred is an exit node.
func fleet(n, tags int, rnd *rand.Rand) *Tailnet {
	t := &Tailnet{Domains: []string{"example.com"}, ControlURL: "https://control.example.com"}
	users := n*2/9 + 1
	for u := range users {
		role := "member"
		if u == 0 {
			role = "owner"
		} else if u < 5 {
			role = "admin"
		}
		t.Users = append(t.Users, User{ID: tailcfg.UserID(u + 1), Name: fmt.Sprint("u", u), Email: fmt.Sprintf("u%d@example.com", u), Role: role})
	}
	for i := range n {
		x := Node{
			ID: tailcfg.NodeID(i + 1), Hostname: fmt.Sprint("n", i),
			IPv4: netip.AddrFrom4([4]byte{100, 64 + byte(i>>14), byte(i >> 7 & 0x7f), byte(i&0x7f) + 1}),
			IPv6: netip.AddrFrom16([16]byte{0xfd, 0x7a, 0x11, 0x5c, 0xa1, 0xe0, 13: byte(i >> 16), 14: byte(i >> 8), 15: byte(i)}),
			OS:   "linux",
		}
		if i%3 == 0 && tags > 0 {
			x.Tags = []string{fmt.Sprint("tag:t", rnd.IntN(tags))}
			if rnd.IntN(4) == 0 {
				x.Tags = append(x.Tags, fmt.Sprint("tag:t", rnd.IntN(tags)))
			}
			if x.Tags[0] == x.Tags[len(x.Tags)-1] {
				x.Tags = x.Tags[:1]
			}
		} else {
			x.User = tailcfg.UserID(rnd.IntN(users) + 1)
		}
		if i%100 == 7 {
			x.RoutableIPs = append(x.RoutableIPs, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24))
		}
		if i%200 == 8 {
			x.RoutableIPs = append(x.RoutableIPs, netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0"))
		}
		x.ApprovedRoutes = x.RoutableIPs
		t.Nodes = append(t.Nodes, x)
	}
	return t
}

// orgPolicy is what an organisation of many teams writes: groups reach tags,
// tags reach tags, everyone reaches some common services, routers and exits.
func orgPolicy(rules, groups, tags, users int, rnd *rand.Rand) []byte {
	var b strings.Builder
	b.WriteString("{\"groups\":{")
	for g := range groups {
		fmt.Fprintf(&b, "\"group:g%d\":[", g)
		for range 20 {
			fmt.Fprintf(&b, "\"u%d@example.com\",", rnd.IntN(users))
		}
		b.WriteString("],\n")
	}
	b.WriteString("},\"tagOwners\":{")
	for t := range tags {
		fmt.Fprintf(&b, "\"tag:t%d\":[],\n", t)
	}
	b.WriteString("},\"acls\":[\n")
	for i := range rules {
		src, dst := fmt.Sprint("group:g", rnd.IntN(groups)), fmt.Sprintf("tag:t%d:443,8443", rnd.IntN(tags))
		switch i % 10 {
		case 0, 1, 2:
			src = fmt.Sprint("tag:t", rnd.IntN(tags))
		case 3:
			dst = fmt.Sprintf("10.%d.0.0/16:*", rnd.IntN(40))
		}
		switch {
		case i == 4:
			src, dst = "autogroup:member", "tag:t0:53"
		case i == 5:
			src, dst = "autogroup:member", "autogroup:internet:*"
		}
		fmt.Fprintf(&b, "{\"action\":\"accept\",\"src\":[%q],\"dst\":[%q]},\n", src, dst)
	}
	b.WriteString("],\"ssh\":[{\"action\":\"check\",\"src\":[\"group:g0\"],\"dst\":[\"tag:t1\"],\"users\":[\"root\"]}]}")
	return []byte(b.String())
}

func benchCompile(b *testing.B, t *Tailnet, src []byte) {
	p, err := Parse(src)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	before, n := cpuTime(b), 0
	for b.Loop() {
		n++
		if _, err := Compile(p, t); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/1000/float64(n), "cpu-ms/op")
}

// cpuTime is the process's, so that a busy machine does not distort results.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func BenchmarkCompile10000Nodes200Rules(b *testing.B) {
	rnd := rand.New(rand.NewPCG(1, 2))
	t := fleet(10_000, 60, rnd)
	benchCompile(b, t, orgPolicy(200, 120, 60, len(t.Users), rnd))
}

func BenchmarkCompileSelf1000Nodes(b *testing.B) {
	rnd := rand.New(rand.NewPCG(1, 2))
	benchCompile(b, fleet(1000, 0, rnd), []byte(`{"acls":[{"action":"accept","src":["autogroup:member"],"dst":["autogroup:self:*"]}],
		"ssh":[{"action":"check","src":["autogroup:member"],"dst":["autogroup:self"],"users":["autogroup:nonroot"]}]}`))
}

func BenchmarkCompileSelf10000Nodes(b *testing.B) {
	rnd := rand.New(rand.NewPCG(1, 2))
	benchCompile(b, fleet(10_000, 0, rnd), []byte(`{"acls":[{"action":"accept","src":["autogroup:member"],"dst":["autogroup:self:*"]}],
		"ssh":[{"action":"check","src":["autogroup:member"],"dst":["autogroup:self"],"users":["autogroup:nonroot"]}]}`))
}

func BenchmarkCompileAllowAll10000Nodes(b *testing.B) {
	rnd := rand.New(rand.NewPCG(1, 2))
	benchCompile(b, fleet(10_000, 60, rnd), []byte(`{"acls":[{"action":"accept","src":["*"],"dst":["*:*"]}]}`))
}

// BenchmarkCompileManyRouters has 2,500 subnet routers, whose routes are part of
// what * means as a source.
func BenchmarkCompileManyRouters(b *testing.B) {
	rnd := rand.New(rand.NewPCG(1, 2))
	t := fleet(10_000, 60, rnd)
	for i := range t.Nodes {
		if i%4 == 1 {
			t.Nodes[i].RoutableIPs = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)}
			t.Nodes[i].ApprovedRoutes = t.Nodes[i].RoutableIPs
		}
	}
	src := orgPolicy(200, 120, 60, len(t.Users), rnd)
	for i := range 20 {
		src = bytes.Replace(src, []byte(`"acls":[`), fmt.Appendf(nil, `"acls":[{"action":"accept","src":["*"],"dst":["tag:t%d:%d"]},`, i, i+1), 1)
	}
	benchCompile(b, t, src)
}

// bigPolicy has about 1 MiB and 10,000 rules.
func bigPolicy(users int) []byte {
	return orgPolicy(10_000, 300, 60, users, rand.New(rand.NewPCG(3, 4)))
}

func BenchmarkParse10000Rules(b *testing.B) {
	src := bigPolicy(2000)
	b.SetBytes(int64(len(src)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(src); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCompile1000Nodes10000Rules(b *testing.B) {
	t := fleet(1000, 60, rand.New(rand.NewPCG(1, 2)))
	benchCompile(b, t, bigPolicy(len(t.Users)))
}

func BenchmarkDiff10000Nodes200Rules(b *testing.B) {
	rnd := rand.New(rand.NewPCG(1, 2))
	t := fleet(10_000, 60, rnd)
	src := orgPolicy(200, 120, 60, len(t.Users), rnd)
	edited := []byte(strings.Replace(string(src), ":443,8443", ":443", 1))
	var sides [2]*Access
	for i, text := range [][]byte{src, edited} {
		p, err := Parse(text)
		if err != nil {
			b.Fatal(err)
		}
		if sides[i], err = Compile(p, t); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		if Diff(sides[0], sides[1]).Empty() {
			b.Fatal("no change found")
		}
	}
}
