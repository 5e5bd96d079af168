package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tailscale.com/ipn/ipnstate"
)

// API calls the server's own HTTP interface on its unix socket, and decodes the
// answer into T.
func API[T any](t testing.TB, s *Server, method, path string, body any) T {
	t.Helper()
	client := http.Client{
		Timeout: 20 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", fmt.Sprintf("/proc/%d/root/var/lib/signalbox/signalbox.sock", s.pid()))
			},
		},
	}
	payload, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://local/api/signalbox/v1"+path, bytes.NewReader(payload))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("%s %s: %s %v\n%s", method, path, res.Status, err, text)
	}
	return decode[T](t, string(text))
}

// effect is what `policy diff` says of connections and peers.
type effect struct {
	Flows []struct {
		Opened   bool
		From, To []string
		Allow    string
	}
	Peers []struct {
		Appear         bool
		Viewers, Peers []string
	}
}

// fleet is a set of clients by name, whose connections to each other are
// measured.
type fleet struct {
	server  *Server
	clients []*Client
	addrs   map[string][2]netip.Addr // IPv4 and IPv6 by client name
	ports   []uint16
}

// attempt is one connection that one client may open to another.
type attempt struct {
	from, to string
	six      bool
	port     uint16
}

func (a attempt) String() string {
	family := "IPv4"
	if a.six {
		family = "IPv6"
	}
	return fmt.Sprintf("%s to %s:%d over %s", a.from, a.to, a.port, family)
}

// newFleet waits for nothing: the clients are up.
func newFleet(t testing.TB, server *Server, ports []uint16, clients ...*Client) *fleet {
	t.Helper()
	f := &fleet{server: server, clients: clients, ports: ports, addrs: map[string][2]netip.Addr{}}
	for _, c := range clients {
		f.addrs[c.Name] = [2]netip.Addr{c.IPv4(t), c.IPv6(t)}
		for _, port := range ports {
			c.Echo(t, port)
		}
	}
	return f
}

// attempts lists every connection between two different clients.
func (f *fleet) attempts() []attempt {
	var out []attempt
	for _, from := range f.clients {
		for _, to := range f.clients {
			for _, six := range []bool{false, true} {
				for _, port := range f.ports {
					if from != to {
						out = append(out, attempt{from.Name, to.Name, six, port})
					}
				}
			}
		}
	}
	return out
}

// explained asks the server for the verdict of every attempt.
func (f *fleet) explained(t testing.TB) map[attempt]bool {
	t.Helper()
	type answer struct {
		Verdicts []struct {
			Src, Dst string
			Allowed  bool
		}
	}
	out := map[attempt]bool{}
	for _, a := range f.attempts() {
		if a.six {
			continue // the answer for names holds both families
		}
		q := url.Values{"src": {a.from}, "dst": {a.to}, "port": {strconv.Itoa(int(a.port))}, "proto": {"tcp"}}
		got := API[answer](t, f.server, "GET", "/policy/explain?"+q.Encode(), nil)
		for _, v := range got.Verdicts {
			for i, addr := range f.addrs[a.to] {
				if strings.Contains(v.Dst, "("+addr.String()+")") {
					out[attempt{a.from, a.to, i == 1, a.port}] = v.Allowed
				}
			}
		}
	}
	if len(out) != len(f.attempts()) {
		t.Fatalf("explain answered %d of %d questions", len(out), len(f.attempts()))
	}
	return out
}

// try makes one attempt. A packet filter drops without an answer, and a client
// without peers has no route over IPv6, so anything but success, a time-out or
// an unreachable network is an error.
func (f *fleet) try(ctx context.Context, a attempt, within time.Duration) (open bool, err error) {
	i := slices.IndexFunc(f.clients, func(c *Client) bool { return c.Name == a.from })
	family := 0
	if a.six {
		family = 1
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	err = f.clients[i].exchange(ctx, netip.AddrPortFrom(f.addrs[a.to][family], a.port))
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() || a.six && errors.Is(err, syscall.ENETUNREACH) {
		return false, nil
	}
	return err == nil, err
}

// each calls fn for every attempt at the same time.
func (f *fleet) each(fn func(attempt)) {
	var wg sync.WaitGroup
	for _, a := range f.attempts() {
		wg.Go(func() { fn(a) })
	}
	wg.Wait()
}

// settle repeats each attempt until it ends as expected. What does not, shows in
// the measurement that follows.
func (f *fleet) settle(ctx context.Context, want map[attempt]bool, within time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	f.each(func(a attempt) {
		pace := time.NewTicker(5 * probePace)
		defer pace.Stop()
		for ctx.Err() == nil {
			if open, _ := f.try(ctx, a, 500*time.Millisecond); open == want[a] {
				return
			}
			select {
			case <-pace.C:
			case <-ctx.Done():
			}
		}
	})
}

// measure makes every attempt once. Within the time that it gives, the kernel
// sends the first packet twice.
func (f *fleet) measure(t testing.TB) map[attempt]bool {
	t.Helper()
	var mu sync.Mutex
	out := map[attempt]bool{}
	f.each(func(a attempt) {
		open, err := f.try(t.Context(), a, 2*time.Second)
		mu.Lock()
		defer mu.Unlock()
		out[a] = open
		if err != nil {
			t.Errorf("%v: %v, want an answer or a time-out", a, err)
		}
	})
	return out
}

// seen is which clients each client has as peers, as "viewer sees peer".
func (f *fleet) seen(t testing.TB) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	for _, c := range f.clients {
		st := c.Status(t)
		for _, other := range f.clients {
			if Peer(st, f.addrs[other.Name][0]) != nil {
				out[c.Name+" sees "+other.Name] = true
			}
		}
	}
	return out
}

// awaitPeers waits until the clients see what the server says they should.
func (f *fleet) awaitPeers(t testing.TB, want map[string]bool) {
	t.Helper()
	for _, c := range f.clients {
		c.Await(t, "the right peers", 10*time.Second, func(st *ipnstate.Status) bool {
			for _, other := range f.clients {
				if want[c.Name+" sees "+other.Name] != (Peer(st, f.addrs[other.Name][0]) != nil) {
					return false
				}
			}
			return true
		})
	}
}

// predicted reads an effect as changes of attempts and of peers: true is
// opened or appeared.
func (f *fleet) predicted(t testing.TB, e effect) (flows map[attempt]bool, peers map[string]bool) {
	t.Helper()
	flows, peers = map[attempt]bool{}, map[string]bool{}
	for _, c := range e.Flows {
		first, last, ok := tcpPorts(t, c.Allow)
		for _, a := range f.attempts() {
			if ok && first <= a.port && a.port <= last && names(c.From, a.from, a.six) && names(c.To, a.to, a.six) {
				if _, twice := flows[a]; twice {
					t.Errorf("the effect speaks of %v twice", a)
				}
				flows[a] = c.Opened
			}
		}
	}
	for _, c := range e.Peers {
		for _, v := range c.Viewers {
			for _, p := range c.Peers {
				if v != p {
					peers[v+" sees "+p] = c.Appear
				}
			}
		}
	}
	return flows, peers
}

// names reports whether a list of an effect holds an address of a client.
func names(list []string, name string, six bool) bool {
	family := " (IPv4)"
	if six {
		family = " (IPv6)"
	}
	return slices.Contains(list, name) || slices.Contains(list, name+family)
}

// tcpPorts reads "tcp", "tcp:7" or "tcp:7-9"; other protocols are not measured.
func tcpPorts(t testing.TB, allow string) (first, last uint16, ok bool) {
	t.Helper()
	proto, ports, some := strings.Cut(allow, ":")
	if proto != "tcp" {
		return 0, 0, false
	}
	if !some || ports == "*" {
		return 0, 65535, true
	}
	from, to, isRange := strings.Cut(ports, "-")
	if !isRange {
		to = from
	}
	a, err := strconv.ParseUint(from, 10, 16)
	b, err2 := strconv.ParseUint(to, 10, 16)
	if err != nil || err2 != nil {
		t.Fatalf("the effect says %q", allow)
	}
	return uint16(a), uint16(b), true
}

// changes is what differs between two maps: true is newly so.
func changes[K comparable](before, after map[K]bool) map[K]bool {
	out := map[K]bool{}
	for _, m := range []map[K]bool{before, after} {
		for k := range m {
			if before[k] != after[k] {
				out[k] = after[k]
			}
		}
	}
	return out
}

// same compares what was said with what was measured.
func same[K comparable](t testing.TB, what string, said, measured map[K]bool) {
	t.Helper()
	for _, m := range []map[K]bool{said, measured} {
		for k := range m {
			s, ok := said[k]
			r, was := measured[k]
			if ok != was || s != r {
				t.Errorf("%s: %v: said %v (%v), measured %v (%v)", what, k, s, ok, r, was)
			}
		}
	}
}

// TestPolicyVerdictsMatchPackets puts six clients of three people and two tags
// under one policy after the other. For each, what `policy explain` says of
// every pair and port is what a TCP connection finds, and what `policy diff`
// said beforehand is what changed.
func TestPolicyVerdictsMatchPackets(t *testing.T) {
	t.Parallel()
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	const declared = `"tagOwners": {"tag:web": [], "tag:db": []}`
	server.SetPolicy(t, `{`+declared+`, "acls": []}`)
	ann, ben, cyd := server.User(t, "ann"), server.User(t, "ben"), server.User(t, "cyd")
	join := func(name, version string, key string) *Client {
		c := lab.Client(t, ClientConfig{Name: name, Version: version})
		c.Up(t, server, key)
		return c
	}
	f := newFleet(t, server, []uint16{7000, 7001},
		join("ann1", Versions[1], server.Key(t, ann)),
		join("ann2", Versions[1], server.Key(t, ann)),
		join("ben", Versions[1], server.Key(t, ben)),
		join("cyd", Versions[2], server.Key(t, cyd)),
		join("web", Versions[1], server.Key(t, "", "--tags", "tag:web")),
		join("db", Versions[1], server.Key(t, "", "--tags", "tag:db")),
	)
	policies := []struct {
		name, text string
		open       int // attempts that succeed, counted by hand
	}{
		// ann1 and ann2 on both ports, and both of them to web: 6 for a family.
		{"own devices", `"acls": [
			{"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*"]},
			{"action": "accept", "src": ["ann@"], "dst": ["tag:web:7000"]},
		]`, 12},
		// ops (ann1, ann2, cyd) to web on both ports, web to db, ben to db: 3*2+1+2.
		{"groups and grants", `"groups": {"group:ops": ["ann@", "cyd@"]},
		"grants": [
			{"src": ["group:ops"], "dst": ["tag:web"], "ip": ["tcp:7000-7001"]},
			{"src": ["tag:web"], "dst": ["tag:db"], "ip": ["tcp:7001", "udp:7000"]},
			{"src": ["ben@"], "dst": ["tag:db"], "ip": ["7000", "7001"]},
		]`, 18},
		// One family to one address only: five to db. And cyd to ann's by an app
		// alone, which opens nothing.
		{"an address", `"hosts": {"store": "` + f.addrs["db"][0].String() + `"},
		"grants": [
			{"src": ["*"], "dst": ["store"], "ip": ["tcp:7000"]},
			{"src": ["cyd@"], "dst": ["ann@"], "app": {"example.com/cap/look": [{}]}},
		]`, 5},
		// All but the newer cyd to all other five: 5*5*1.
		{"postures", `"postures": {"posture:known": ["node:tsVersion < '1.104'"]},
		"acls": [{"action": "accept", "src": ["*"], "srcPosture": ["posture:known"], "dst": ["*:7001"]}]`, 50},
		{"everything", `"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]`, 120},
		{"nothing", `"acls": []`, 0},
	}
	before, peers := f.measure(t), f.seen(t)
	for _, p := range policies {
		t.Run(p.name, func(t *testing.T) {
			text := `{` + declared + `, ` + p.text + `}`
			foretold, peerChanges := f.predicted(t, API[effect](t, server, "POST", "/policy/diff", map[string]string{"policy": text}))
			server.SetPolicy(t, text)
			said := f.explained(t)
			wantPeers := map[string]bool{}
			for k := range peers {
				wantPeers[k] = true
			}
			for k, appear := range peerChanges {
				wantPeers[k] = appear
			}
			f.awaitPeers(t, wantPeers)
			// WireGuard takes 15 seconds to notice a session that the other side
			// lost, as happens when both forget and find each other at once.
			f.settle(t.Context(), said, 20*time.Second)
			after := f.measure(t)
			same(t, "explain", said, after)
			same(t, "diff", foretold, changes(before, after))
			open := 0
			for _, ok := range after {
				if ok {
					open++
				}
			}
			if open != p.open {
				t.Errorf("%d attempts succeed, want %d", open, p.open)
			}
			now := f.seen(t)
			same(t, "diff of peers", peerChanges, changes(peers, now))
			before, peers = after, now
		})
	}
}
