package listener

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"
)

var loopback = netip.MustParseAddr("127.0.0.1")

// request sends one and waits for its answer on a connection that stays open.
func request(t *testing.T, c net.Conn, path string) error {
	t.Helper()
	io.WriteString(c, "GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n")
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, res.Body)
	return err
}

var identifying = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/login" {
		Identify(r)
		Identify(r)
	}
})

func TestOldestStrangerMakesRoom(t *testing.T) {
	g := NewGuard(GuardConfig{Total: 100, PerSource: 3, Grace: 300 * time.Millisecond})
	_, addr := start(t, Config{Guard: g, Handler: identifying})
	var conns []net.Conn
	for range 3 {
		c := dial(t, addr)
		if err := request(t, c, "/"); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	begun := time.Now()
	fourth := dial(t, addr)
	if err := request(t, fourth, "/"); err != nil {
		t.Fatalf("the fourth was not served: %v", err)
	}
	if d := time.Since(begun); d < 200*time.Millisecond {
		t.Errorf("the fourth was served after %v, within the grace of the others", d)
	}
	untilClosed(t, conns[0])
	if n := g.Closed(); n != 1 {
		t.Errorf("%d connections closed to make room, want 1", n)
	}
	for i, c := range conns[1:] {
		if err := request(t, c, "/"); err != nil {
			t.Errorf("connection %d was closed too: %v", i+2, err)
		}
	}
}

func TestIdentifiedConnectionsDoNotCount(t *testing.T) {
	g := NewGuard(GuardConfig{Total: 100, PerSource: 2, Grace: time.Hour})
	_, addr := start(t, Config{Guard: g, Handler: identifying})
	var known []net.Conn
	for range 10 {
		c := dial(t, addr)
		if err := request(t, c, "/login"); err != nil {
			t.Fatal(err)
		}
		known = append(known, c)
	}
	if n := g.Strangers(loopback); n != 0 {
		t.Errorf("%d strangers", n)
	}
	if n := g.Open(); n != 10 {
		t.Errorf("%d open, want 10", n)
	}
	a, b, waiting := dial(t, addr), dial(t, addr), dial(t, addr)
	served := make(chan error, 1)
	if err := request(t, a, "/"); err != nil {
		t.Fatal(err)
	}
	if err := request(t, b, "/"); err != nil {
		t.Fatal(err)
	}
	go func() { served <- request(t, waiting, "/") }()
	select {
	case err := <-served:
		t.Fatalf("a third stranger was served beside two young ones: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	// One of the two turns out to be somebody.
	if err := request(t, a, "/login"); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Errorf("the waiting one: %v", err)
	}
	for _, c := range known {
		if err := request(t, c, "/"); err != nil {
			t.Errorf("a known connection: %v", err)
		}
	}
}

func TestAllConnectionsWaitBeyondTheTotal(t *testing.T) {
	g := NewGuard(GuardConfig{Total: 2})
	_, addr := start(t, Config{Guard: g, Handler: ok})
	a, b, c := dial(t, addr), dial(t, addr), dial(t, addr)
	for _, c := range []net.Conn{a, b} {
		if err := request(t, c, "/"); err != nil {
			t.Fatal(err)
		}
	}
	served := make(chan error, 1)
	go func() { served <- request(t, c, "/") }()
	select {
	case err := <-served:
		t.Fatalf("the third was served: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	a.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestStormOfConnectionsFromOneAddressIsServed(t *testing.T) {
	n := 3000
	if testing.Short() {
		n = 300
	}
	g := NewGuard(GuardConfig{Total: 20_000, PerSource: 64})
	_, addr := start(t, Config{Guard: g, Handler: identifying})
	var wg sync.WaitGroup
	todo := make(chan string, n)
	for i := range n {
		todo <- []string{"/", "/login"}[i%2]
	}
	close(todo)
	for range 256 {
		wg.Go(func() {
			for path := range todo {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					t.Error(err)
					continue
				}
				if err := request(t, c, path); err != nil {
					t.Error(err)
				}
				c.Close()
			}
		})
	}
	wg.Wait()
}

// tellingListener tells of each call of Accept.
type tellingListener struct {
	net.Listener
	calls chan struct{}
}

func (l *tellingListener) Accept() (net.Conn, error) {
	l.calls <- struct{}{}
	return l.Listener.Accept()
}

func TestListenerCloseEndsWaitingConnections(t *testing.T) {
	g := NewGuard(GuardConfig{Total: 100, PerSource: 1, Grace: time.Hour})
	raw, err := ListenTCP(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	calls := make(chan struct{}, 10)
	l := g.Wrap(&tellingListener{raw, calls})
	first, second := dial(t, raw.Addr().String()), dial(t, raw.Addr().String())
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	// The accept that follows takes in the second one, which has to wait.
	accepted := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		accepted <- err
	}()
	for range 3 { // the third call comes when the second connection is placed
		<-calls
	}
	if n := g.Strangers(loopback); n != 2 {
		t.Errorf("%d strangers, want 2", n)
	}
	l.Close()
	if err := <-accepted; err != net.ErrClosed {
		t.Errorf("Accept: %v", err)
	}
	untilClosed(t, second)
	c.Close()
	untilClosed(t, first)
	if n := g.Open(); n != 0 {
		t.Errorf("%d connections counted after the end", n)
	}
}

func TestSitesAreSlash64(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1":        "192.0.2.1",
		"::ffff:192.0.2.1": "192.0.2.1",
		"2001:db8::1:2":    "2001:db8::",
		"fe80::1%eth0":     "fe80::",
	} {
		if got := site(netip.MustParseAddr(in)); got != netip.MustParseAddr(want) {
			t.Errorf("site(%s) = %v, want %s", in, got, want)
		}
	}
}
