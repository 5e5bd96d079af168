package integration

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"tailscale.com/tailcfg"
)

// probePace is how far apart repeated packet probes start at least.
const probePace = 20 * time.Millisecond

// probe repeats try until it succeeds, and returns how long that took.
func probe(t testing.TB, within time.Duration, what string, try func(context.Context) error) time.Duration {
	t.Helper()
	start := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	pace := time.NewTicker(probePace)
	defer pace.Stop()
	for {
		err := try(ctx)
		if err == nil {
			return time.Since(start)
		}
		select {
		case <-pace.C:
		case <-ctx.Done():
			t.Fatalf("waited %v for: %s: %v", within, what, err)
		}
	}
}

// Ping sends ICMP echo requests from this host until one is answered.
func (h *Host) Ping(t testing.TB, to netip.Addr) {
	t.Helper()
	probe(t, 15*time.Second, fmt.Sprintf("ping from %s to %v", h.Name, to), func(ctx context.Context) error {
		_, err := h.Run(ctx, nil, "ping", "-n", "-c1", "-W1", to.String())
		return err
	})
}

// PingDirect has the client probe its path to another until the answer comes
// over UDP from the other's own address, and returns that address.
func (c *Client) PingDirect(t testing.TB, to *Client) netip.AddrPort {
	t.Helper()
	addr := to.IPv4(t)
	var endpoint netip.AddrPort
	probe(t, 30*time.Second, fmt.Sprintf("direct path from %s to %s", c.Name, to.Name), func(ctx context.Context) error {
		// One that is sent before the other's endpoints are known gets lost.
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		r, err := c.API.Ping(ctx, addr, tailcfg.PingDisco)
		switch {
		case err != nil:
			return err
		case r.Err != "":
			return errors.New(r.Err)
		case r.Endpoint == "":
			return fmt.Errorf("the answer came through relay %q", r.DERPRegionCode)
		}
		endpoint, err = netip.ParseAddrPort(r.Endpoint)
		return err
	})
	return endpoint
}

// Meet waits until two clients have found a direct path, each for itself.
//
// Until both have, a client before v1.82 on a server without a trusted
// certificate loses handshake packets, since it cannot relay there, and
// WireGuard repeats them only after five seconds.
func Meet(t testing.TB, a, b *Client) {
	t.Helper()
	a.PingDirect(t, b)
	b.PingDirect(t, a)
}

// PingRelayed has the client's command line probe its path to another once, and
// checks that the answer came through the relay region of the given code.
func (c *Client) PingRelayed(t testing.TB, to *Client, region string) {
	t.Helper()
	addr := to.IPv4(t).String()
	want := "via DERP(" + region + ")"
	probe(t, 30*time.Second, fmt.Sprintf("tailscale ping from %s to %s %s", c.Name, to.Name, want), func(ctx context.Context) error {
		out, err := c.Run(ctx, c.env, c.dir+"/tailscale", "ping", "--c=1", "--timeout=3s", "--until-direct=false", addr)
		if err != nil {
			return err
		}
		if !strings.Contains(out, want) {
			return fmt.Errorf("tailscale ping says %q", strings.TrimSpace(out))
		}
		return nil
	})
}

// Echo answers TCP connections to a port of this host, on every address, by
// sending back what it gets, until the test ends.
func (h *Host) Echo(t testing.TB, port uint16) {
	t.Helper()
	l, err := h.Listen(":" + strconv.Itoa(int(port)))
	if err != nil {
		t.Fatalf("listen on %s: %v", h.Name, err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	conns := make(map[net.Conn]bool)
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns[conn] = true
			mu.Unlock()
			wg.Go(func() {
				io.Copy(conn, conn)
				conn.Close()
				mu.Lock()
				delete(conns, conn)
				mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for conn := range conns {
			conn.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
}

// exchange connects, sends a line and reads it back.
func (h *Host) exchange(ctx context.Context, to netip.AddrPort) error {
	conn, err := h.Dial(ctx, "tcp", to.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	line := "from " + h.Name + "\n"
	if _, err := io.WriteString(conn, line); err != nil {
		return err
	}
	got, err := bufio.NewReader(conn).ReadString('\n')
	if err == nil && got != line {
		err = fmt.Errorf("sent %q, got %q back", line, got)
	}
	return err
}

// AwaitTCP connects from this host to an echo port until it answers, and
// returns how long that took.
func (h *Host) AwaitTCP(t testing.TB, to netip.Addr, port uint16, within time.Duration) time.Duration {
	t.Helper()
	target := netip.AddrPortFrom(to, port)
	return probe(t, within, fmt.Sprintf("TCP from %s to %v", h.Name, target), func(ctx context.Context) error {
		// A first packet that was dropped is repeated by the kernel only after
		// a second, so each attempt is a new connection.
		ctx, cancel := context.WithTimeout(ctx, 250*time.Millisecond)
		defer cancel()
		return h.exchange(ctx, target)
	})
}

// RefusedTCP checks that nothing comes back when this host connects to a port:
// a packet filter drops without an answer.
func (h *Host) RefusedTCP(t testing.TB, to netip.Addr, port uint16) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 1500*time.Millisecond)
	defer cancel()
	target := netip.AddrPortFrom(to, port)
	conn, err := h.Dial(ctx, "tcp", target.String())
	if err == nil {
		conn.Close()
		t.Fatalf("%s reached %v, which the policy does not allow", h.Name, target)
	}
	var ne net.Error
	if !errors.As(err, &ne) || !ne.Timeout() {
		t.Fatalf("%s to %v: %v, want a time-out", h.Name, target, err)
	}
}

// A Flow is a TCP connection that carries a small exchange all the time.
type Flow struct {
	stop chan struct{}
	done chan struct{}

	count   int           // exchanges; valid after done, as the others
	longest time.Duration // of one exchange
	err     error
}

// Flow opens a connection to an echo port and keeps it busy.
func (h *Host) Flow(t testing.TB, to netip.Addr, port uint16) *Flow {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := h.Dial(ctx, "tcp", netip.AddrPortFrom(to, port).String())
	if err != nil {
		t.Fatalf("%s to %v:%d: %v", h.Name, to, port, err)
	}
	f := &Flow{stop: make(chan struct{}), done: make(chan struct{})}
	go f.run(conn)
	t.Cleanup(f.end)
	return f
}

func (f *Flow) run(conn net.Conn) {
	defer close(f.done)
	defer conn.Close()
	pace := time.NewTicker(probePace)
	defer pace.Stop()
	r := bufio.NewReader(conn)
	for {
		select {
		case <-f.stop:
			return
		case <-pace.C:
		}
		start := time.Now()
		conn.SetDeadline(start.Add(10 * time.Second))
		line := strconv.Itoa(f.count) + "\n"
		if _, f.err = io.WriteString(conn, line); f.err != nil {
			return
		}
		var got string
		if got, f.err = r.ReadString('\n'); f.err != nil {
			return
		}
		if got != line {
			f.err = fmt.Errorf("sent %q, got %q back", line, got)
			return
		}
		f.count++
		f.longest = max(f.longest, time.Since(start))
	}
}

func (f *Flow) end() {
	select {
	case <-f.stop:
	default:
		close(f.stop)
	}
	<-f.done
}

// Unbroken ends the flow, and checks that it went on to the end and never stood
// still for longer than the given time.
func (f *Flow) Unbroken(t testing.TB, still time.Duration) {
	t.Helper()
	f.end()
	if f.err != nil {
		t.Fatalf("the connection broke after %d exchanges: %v", f.count, f.err)
	}
	if f.longest > still {
		t.Fatalf("the connection stood still for %v, want at most %v", f.longest, still)
	}
	t.Logf("%d exchanges, the longest took %v", f.count, f.longest.Round(time.Millisecond))
}

// AwaitName resolves a name as programs on this host do until it has the given
// address.
func (h *Host) AwaitName(t testing.TB, name string, want netip.Addr) {
	t.Helper()
	probe(t, 10*time.Second, fmt.Sprintf("%s resolves %s", h.Name, name), func(ctx context.Context) error {
		database := "ahostsv4"
		if want.Is6() {
			database = "ahostsv6"
		}
		out, err := h.Run(ctx, nil, "getent", database, name)
		if err != nil {
			return err
		}
		if got, _, _ := strings.Cut(out, " "); got != want.String() {
			return fmt.Errorf("%s is %q, want %v", name, out, want)
		}
		return nil
	})
}
