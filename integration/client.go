package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"tailscale.com/client/local"
	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
)

// Versions are the client versions that the tests drive, oldest first.
var Versions = []string{"v1.80.3", "v1.102.5", "v1.104.5"}

// Newest is for tests that need no particular version.
const Newest = "v1.104.5"

// clientDirs builds the clients that are not built yet and returns the
// directory of each version.
var clientDirs = sync.OnceValues(func() (map[string]string, error) {
	cmd := exec.Command("go", "run", "./clients")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("build clients: %w", err)
	}
	dirs := make(map[string]string)
	for line := range strings.Lines(string(out)) {
		version, dir, _ := strings.Cut(strings.TrimSpace(line), " ")
		dirs[version] = dir
	}
	return dirs, nil
})

// ClientConfig says what kind of machine a client is.
type ClientConfig struct {
	Version string // empty means Newest
	Name    string // host name; empty means one made of the version
	NAT     NAT
	NoUDP   bool // its network carries no UDP
	Env     []string
}

// A Client is a host that runs tailscaled.
type Client struct {
	*Host
	Version string
	API     *local.Client

	dir  string // of its programs
	env  []string
	proc *process
	log  *journal
}

// Client makes a machine and starts tailscaled on it. It is not logged in.
func (l *Lab) Client(t testing.TB, cfg ClientConfig) *Client {
	t.Helper()
	dirs, err := clientDirs()
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Version == "" {
		cfg.Version = Newest
	}
	if cfg.Name == "" {
		cfg.Name = "c" + strings.ReplaceAll(strings.TrimPrefix(cfg.Version, "v"), ".", "-")
	}
	c := &Client{
		Host:    l.hostBehind(t, cfg.Name, cfg.NAT),
		Version: cfg.Version,
		dir:     dirs[cfg.Version],
		log:     newJournal(),
	}
	if c.dir == "" {
		t.Fatalf("no client %s", cfg.Version)
	}
	if cfg.NoUDP {
		c.DropUDP(t)
	}
	c.env = append([]string{
		"PATH=" + c.dir + ":" + os.Getenv("PATH") + ":/usr/sbin:/sbin",
		"TS_NO_LOGS_NO_SUPPORT=true",
		// A client that turns to Tailscale's own server must not go unnoticed.
		"TS_PANIC_IF_HIT_MAIN_CONTROL=1",
	}, cfg.Env...)
	c.API = &local.Client{
		OmitAuth:      true,
		UseSocketOnly: true,
		Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			// The socket lies on the host's own /run, seen through its first
			// process; that also keeps the path short enough for a socket.
			return new(net.Dialer).DialContext(ctx, "unix", fmt.Sprintf("/proc/%d/root/run/tailscale/tailscaled.sock", c.pid()))
		},
	}
	c.log.showOnFailure(t, "tailscaled on "+c.Name, 60)
	c.Start(t)
	return c
}

// Start starts tailscaled on the state it had, if any, and waits until it
// answers.
func (c *Client) Start(t testing.TB) {
	t.Helper()
	// A killed daemon leaves its socket, which must not be taken for the new one.
	if err := c.script("rm -f /run/tailscale/tailscaled.sock"); err != nil {
		t.Fatal(err)
	}
	var err error
	c.proc, err = c.launch(c.env, c.log, c.log, c.dir+"/tailscaled",
		"--statedir=/var/lib/tailscale", "--port=41641", "--tun=tailscale0")
	if err != nil {
		t.Fatal(err)
	}
	probe(t, 20*time.Second, c.Name+": tailscaled answers", func(ctx context.Context) error {
		select {
		case <-c.proc.done:
			t.Fatalf("%s: tailscaled ended: %v", c.Name, c.proc.err)
		default:
		}
		_, err := c.API.StatusWithoutPeers(ctx)
		return err
	})
}

// Kill ends tailscaled without a chance to say goodbye. What is in the host's
// network stays.
func (c *Client) Kill() { c.proc.kill() }

// Tailscale runs the client's command line and returns its output.
func (c *Client) Tailscale(t testing.TB, args ...string) string {
	t.Helper()
	out, err := c.TryTailscale(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TryTailscale is Tailscale for a command that may fail.
func (c *Client) TryTailscale(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	return c.Run(ctx, c.env, c.dir+"/tailscale", args...)
}

// Join runs a line that the server printed, unchanged, as a person would in a
// shell, and waits until the client is running.
func (c *Client) Join(t testing.TB, line string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if out, err := c.Run(ctx, c.env, "sh", "-c", line); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	c.AwaitRunning(t)
}

// Up logs the client in with an auth key and waits until it is running.
func (c *Client) Up(t testing.TB, s *Server, key string, args ...string) {
	t.Helper()
	c.Tailscale(t, append([]string{"up", "--login-server", s.URL, "--auth-key", key}, args...)...)
	c.AwaitRunning(t)
}

// Login starts an interactive login, and returns the page that a person is sent
// to and a function that waits for the command to end.
func (c *Client) Login(t testing.TB, s *Server, args ...string) (authURL string, wait func()) {
	t.Helper()
	out := newJournal()
	args = append([]string{"up", "--login-server", s.URL}, args...)
	p, err := c.launch(c.env, out, out, c.dir+"/tailscale", args...)
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.After(30 * time.Second)
	for authURL == "" {
		printed, more := out.watch()
		for _, word := range strings.Fields(printed) {
			if strings.HasPrefix(word, s.URL+"/") {
				authURL = word
			}
		}
		if authURL != "" {
			break
		}
		select {
		case <-more:
		case <-p.done:
			t.Fatalf("%s: tailscale up ended before it gave a login page: %v\n%s", c.Name, p.err, out)
		case <-deadline:
			p.kill()
			t.Fatalf("%s: no login page; tailscale up printed:\n%s", c.Name, out)
		}
	}
	return authURL, func() {
		t.Helper()
		select {
		case <-p.done:
			if p.err != nil {
				t.Fatalf("%s: tailscale up: %v\n%s", c.Name, p.err, out)
			}
		case <-time.After(30 * time.Second):
			p.kill()
			t.Fatalf("%s: tailscale up did not end after the login; it printed:\n%s", c.Name, out)
		}
	}
}

// Status returns the client's own view.
func (c *Client) Status(t testing.TB) *ipnstate.Status {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	st, err := c.API.Status(ctx)
	if err != nil {
		t.Fatalf("%s: status: %v", c.Name, err)
	}
	return st
}

// watchMask asks for every notice that can change a status. Old versions ignore
// the bits that they do not know; v1.104 refuses NotifyInitialNetMap. The
// engine's notices come at a steady pace and make sure that a change which has
// no notice of its own is seen.
const watchMask = ipn.NotifyInitialState | ipn.NotifyNoPrivateKeys | ipn.NotifyWatchEngineUpdates |
	ipn.NotifyPeerChanges | ipn.NotifyPeerPatches

// Await waits on the client's notification bus until its status satisfies ok,
// and returns that status and how long it took.
func (c *Client) Await(t testing.TB, what string, within time.Duration, ok func(*ipnstate.Status) bool) (*ipnstate.Status, time.Duration) {
	t.Helper()
	st, took, err := c.await(within, ok)
	if err != nil {
		t.Fatalf("%s: waited %v for: %s: %v\nits status:\n%s", c.Name, took.Round(time.Millisecond), what, err, describe(st))
	}
	return st, took
}

func (c *Client) await(within time.Duration, ok func(*ipnstate.Status) bool) (st *ipnstate.Status, took time.Duration, err error) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	st, err = c.watch(ctx, ok)
	return st, time.Since(start), err
}

// watch follows the notification bus until the status satisfies ok, and returns
// that status, or the last one it saw and why it ended.
func (c *Client) watch(ctx context.Context, ok func(*ipnstate.Status) bool) (st *ipnstate.Status, err error) {
	bus, err := c.API.WatchIPNBus(ctx, watchMask)
	if err != nil {
		return nil, fmt.Errorf("watch: %w", err)
	}
	defer bus.Close()
	for {
		if _, err := bus.Next(); err != nil {
			return st, err
		}
		now, err := c.API.Status(ctx)
		if err != nil {
			return st, err
		}
		if st = now; ok(st) {
			return st, nil
		}
	}
}

// describe is a status for a failed test.
func describe(st *ipnstate.Status) string {
	if st == nil {
		return "(none)"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "state %s, addresses %v, auth URL %q, health %q\n", st.BackendState, st.TailscaleIPs, st.AuthURL, st.Health)
	for _, p := range st.Peer {
		fmt.Fprintf(&b, "peer %s %v online=%v expired=%v tags=%v\n", p.DNSName, p.TailscaleIPs, p.Online, p.Expired, p.Tags)
	}
	return b.String()
}

// AwaitRunning waits until the client is logged in and has an address.
func (c *Client) AwaitRunning(t testing.TB) {
	t.Helper()
	c.Await(t, "running", 30*time.Second, func(st *ipnstate.Status) bool {
		return st.BackendState == ipn.Running.String() && len(st.TailscaleIPs) > 0
	})
}

// AwaitPeers waits until the client sees exactly n peers, all online.
func (c *Client) AwaitPeers(t testing.TB, n int) *ipnstate.Status {
	t.Helper()
	st, _ := c.Await(t, fmt.Sprintf("%d peers online", n), 20*time.Second, func(st *ipnstate.Status) bool {
		if len(st.Peer) != n {
			return false
		}
		for _, p := range st.Peer {
			if !p.Online {
				return false
			}
		}
		return true
	})
	return st
}

// Peer returns what a status says of another client, nil if it is no peer.
// Clients are told apart by their first address, which they keep.
func Peer(st *ipnstate.Status, addr netip.Addr) *ipnstate.PeerStatus {
	for _, p := range st.Peer {
		for _, a := range p.TailscaleIPs {
			if a == addr {
				return p
			}
		}
	}
	return nil
}

// IPv4 returns the client's address in the tailnet.
func (c *Client) IPv4(t testing.TB) netip.Addr {
	t.Helper()
	return c.address(t, netip.Addr.Is4)
}

// IPv6 returns the client's other address in the tailnet.
func (c *Client) IPv6(t testing.TB) netip.Addr {
	t.Helper()
	return c.address(t, netip.Addr.Is6)
}

func (c *Client) address(t testing.TB, family func(netip.Addr) bool) netip.Addr {
	t.Helper()
	st := c.Status(t)
	for _, a := range st.TailscaleIPs {
		if family(a) {
			return a
		}
	}
	t.Fatalf("%s has no such address, only %v", c.Name, st.TailscaleIPs)
	return netip.Addr{}
}

// DNSName returns the client's name in the tailnet, without a trailing dot.
func (c *Client) DNSName(t testing.TB) string {
	t.Helper()
	return strings.TrimSuffix(c.Status(t).Self.DNSName, ".")
}

// decode parses JSON that a command printed.
func decode[T any](t testing.TB, s string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(s), &v); err != nil {
		t.Fatalf("not the JSON that was expected: %v\n%s", err, s)
	}
	return v
}
