package derp

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	tsderp "tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/netmon"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// members is a set of keys that a test's relay admits.
type members struct {
	mu   sync.Mutex
	keys map[key.NodePublic]bool
}

func (m *members) has(k key.NodePublic) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.keys[k]
}

func (m *members) set(k key.NodePublic, in bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.keys == nil {
		m.keys = map[key.NodePublic]bool{}
	}
	m.keys[k] = in
}

// join makes a new key and admits it.
func (m *members) join() key.NodePrivate {
	k := key.NewNode()
	m.set(k.Public(), true)
	return k
}

// start runs a relay on loopback until the test ends and checks that nothing
// of it stays.
func start(t *testing.T, cfg Config) *Server {
	t.Helper()
	if cfg.TLSListen == "" {
		cfg.TLSListen = "127.0.0.1:0"
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.conns) != 0 || len(s.byKey) != 0 {
			t.Errorf("after Run: %d connections, %d keys", len(s.conns), len(s.byKey))
		}
		if n := s.stats.connections.Load(); n != 0 {
			t.Errorf("after Run: gauge of connections is %d", n)
		}
	})
	return s
}

// dial makes a stock client for the region and waits until the relay has
// greeted it.
func dial(t *testing.T, region *tailcfg.DERPRegion, priv key.NodePrivate) (*derphttp.Client, error) {
	t.Helper()
	c := derphttp.NewRegionClient(priv, logger.Discard, netmon.NewStatic(), func() *tailcfg.DERPRegion { return region })
	t.Cleanup(func() { c.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := c.Connect(ctx); err != nil {
		return c, err
	}
	for {
		m, err := recv(c)
		if err != nil {
			return c, err
		}
		if _, ok := m.(tsderp.ServerInfoMessage); ok {
			return c, nil
		}
	}
}

func mustDial(t *testing.T, region *tailcfg.DERPRegion, priv key.NodePrivate) *derphttp.Client {
	t.Helper()
	c, err := dial(t, region, priv)
	if err != nil {
		t.Fatalf("dial relay: %v", err)
	}
	return c
}

type receiver interface {
	Recv() (tsderp.ReceivedMessage, error)
}

var errSilent = errors.New("nothing received")

// recv is the next message, or errSilent after ten seconds.
func recv(c receiver) (tsderp.ReceivedMessage, error) {
	type result struct {
		m   tsderp.ReceivedMessage
		err error
	}
	ch := make(chan result, 1)
	go func() {
		m, err := c.Recv()
		ch <- result{m, err}
	}()
	select {
	case r := <-ch:
		return r.m, r.err
	case <-time.After(10 * time.Second):
		return nil, errSilent
	}
}

// wantPacket checks that the next packet at c is text from src.
func wantPacket(t *testing.T, c receiver, src key.NodePublic, text string) {
	t.Helper()
	for {
		m, err := recv(c)
		if err != nil {
			t.Fatalf("waiting for %q: %v", text, err)
		}
		p, ok := m.(tsderp.ReceivedPacket)
		if !ok {
			continue
		}
		if p.Source != src || string(p.Data) != text {
			t.Fatalf("got %q from %v, want %q from %v", p.Data, p.Source, text, src)
		}
		return
	}
}

// wantClosed checks that the connection of c ends at once.
func wantClosed(t *testing.T, c receiver) {
	t.Helper()
	for {
		m, err := recv(c)
		if errors.Is(err, errSilent) {
			t.Fatal("the connection stayed open")
		}
		if err != nil {
			return
		}
		if _, ok := m.(tsderp.ReceivedPacket); ok {
			t.Fatalf("got %v, want the end of the connection", m)
		}
	}
}

func TestStockClientsRelayBothWays(t *testing.T) {
	for _, tc := range []struct {
		name string
		cfg  Config
	}{
		{"IP literal", Config{HostName: "127.0.0.1"}},
		{"DNS name with address", Config{HostName: "Relay.example.invalid", IPv4: netip.MustParseAddr("127.0.0.1"), IPv6: netip.IPv6Loopback()}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var m members
			tc.cfg.Admit = m.has
			s := start(t, tc.cfg)
			ka, kb := m.join(), m.join()
			a, b := mustDial(t, s.Region(), ka), mustDial(t, s.Region(), kb)
			if err := a.Send(kb.Public(), []byte("to b")); err != nil {
				t.Fatal(err)
			}
			wantPacket(t, b, ka.Public(), "to b")
			if err := b.Send(ka.Public(), []byte("to a")); err != nil {
				t.Fatal(err)
			}
			wantPacket(t, a, kb.Public(), "to a")
			got := s.Metrics()
			if got.Connections != 2 || got.Clients != 2 || got.Admitted != 2 || got.FastStarts != 2 || got.PacketsSent != 2 || got.BytesSent != 8 {
				t.Errorf("metrics: %+v", got)
			}
			if state, ok := a.TLSConnectionState(); !ok || state.Version != 0x0304 {
				t.Errorf("TLS state: %+v", state)
			}
		})
	}
}

func TestWrongPinIsRefusedByClients(t *testing.T) {
	var m members
	s := start(t, Config{Admit: m.has})
	for name, pin := range map[string]string{
		"other":      certName([]byte("another certificate")),
		"upper case": "sha256-raw:" + strings.ToUpper(strings.TrimPrefix(s.pin, "sha256-raw:")),
		"none":       "",
	} {
		r := s.Region()
		r.Nodes[0].CertName = pin
		if _, err := dial(t, r, m.join()); err == nil {
			t.Errorf("%s pin: client connected", name)
		}
	}
}

func TestStrangerIsRefused(t *testing.T) {
	var m members
	s := start(t, Config{Admit: m.has})
	if _, err := dial(t, s.Region(), key.NewNode()); err == nil || errors.Is(err, errSilent) {
		t.Fatalf("stranger: err = %v, want a closed connection", err)
	}
	if got := s.Metrics(); got.Denied != 1 || got.Admitted != 0 {
		t.Errorf("metrics: %+v", got)
	}
}

func TestWithoutAdmitNobodyRelays(t *testing.T) {
	s := start(t, Config{})
	if _, err := dial(t, s.Region(), key.NewNode()); err == nil || errors.Is(err, errSilent) {
		t.Fatalf("err = %v, want a closed connection", err)
	}
}

func TestRevokeClosesAtOnceAndKeepsOut(t *testing.T) {
	var m members
	s := start(t, Config{Admit: m.has})
	ka, kb := m.join(), m.join()
	a, b := mustDial(t, s.Region(), ka), mustDial(t, s.Region(), kb)

	m.set(ka.Public(), false)
	s.Revoke(ka.Public())
	wantClosed(t, a)
	if _, err := dial(t, s.Region(), ka); err == nil || errors.Is(err, errSilent) {
		t.Fatalf("revoked client came back: %v", err)
	}

	kc := m.join()
	c := mustDial(t, s.Region(), kc)
	if err := c.Send(kb.Public(), []byte("still here")); err != nil {
		t.Fatal(err)
	}
	wantPacket(t, b, kc.Public(), "still here")
	if got := s.Metrics(); got.Revoked != 1 {
		t.Errorf("revoked = %d, want 1", got.Revoked)
	}
}

func TestKeyKeepsItsNewestConnections(t *testing.T) {
	var m members
	dups := make(chan Duplicate, 16)
	s := start(t, Config{Admit: m.has, OnDuplicate: func(d Duplicate) { dups <- d }})
	k := m.join()
	var clients []*derphttp.Client
	for range maxPerKey + 1 {
		clients = append(clients, mustDial(t, s.Region(), k))
	}
	wantClosed(t, clients[0])
	for want := 2; want <= maxPerKey+1; want++ {
		d := <-dups
		if d.Key != k.Public() || d.Connections != want || !d.New.IsValid() || !d.Old.IsValid() || d.New == d.Old {
			t.Errorf("duplicate alarm %d: %+v", want, d)
		}
	}
	if got := s.Metrics(); got.Evicted != 1 || got.Duplicates != maxPerKey {
		t.Errorf("metrics: %+v", got)
	}
	if err := clients[maxPerKey].Send(k.Public(), []byte("newest")); err != nil {
		t.Fatal(err)
	}
	wantPacket(t, clients[maxPerKey], k.Public(), "newest")
}

func TestRunEndsConnections(t *testing.T) {
	var m members
	s, err := New(Config{Admit: m.has, TLSListen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	c := mustDial(t, s.Region(), m.join())
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	wantClosed(t, c)
	s.Close()
}

func TestIdentifiedAndListenerHooks(t *testing.T) {
	var m members
	type ctxKey struct{}
	identified := make(chan any, 1)
	wrapped := 0
	s := start(t, Config{
		Admit:        m.has,
		Identified:   func(r *http.Request) { identified <- r.Context().Value(ctxKey{}) },
		ConnContext:  func(ctx context.Context, _ net.Conn) context.Context { return context.WithValue(ctx, ctxKey{}, "mark") },
		WrapListener: func(ln net.Listener) net.Listener { wrapped++; return ln },
	})
	mustDial(t, s.Region(), m.join())
	if got := <-identified; got != "mark" {
		t.Errorf("identified with %v, want the connection's context", got)
	}
	if wrapped != 1 {
		t.Errorf("listener wrapped %d times", wrapped)
	}
}

func TestListenNamesTheKeyOfATakenPort(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	for _, tc := range []struct {
		key string
		cfg Config
	}{
		{"derp.server.listen_addr", Config{TLSListen: tcp.Addr().String()}},
		{"derp.server.stun_listen_addr", Config{STUNListen: udp.LocalAddr().String()}},
		{"derp.server.stun_second_listen_addr", Config{TLSListen: "127.0.0.1:0", STUNListen: "127.0.0.1:0", STUNSecondListen: udp.LocalAddr().String()}},
	} {
		s, err := New(tc.cfg)
		if err != nil {
			t.Fatal(err)
		}
		err = s.Listen()
		if err == nil || !strings.HasPrefix(err.Error(), tc.key+": ") || !strings.Contains(err.Error(), "address already in use") {
			t.Errorf("%s: err = %v", tc.key, err)
		}
		s.mu.Lock()
		if s.tlsLn != nil {
			if _, err := s.tlsLn.Accept(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("%s: TLS listener left open: %v", tc.key, err)
			}
		}
		s.mu.Unlock()
	}
}

func TestConfigRefused(t *testing.T) {
	cert, certKey, err := NewPinnedCert("other.example", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for want, cfg := range map[string]Config{
		"below 900":         {RegionID: 42},
		"neither a DNS":     {HostName: "not a host"},
		"clients can dial":  {HostName: "0.0.0.0"},
		"not an IPv4":       {IPv4: netip.IPv6Loopback()},
		"not an IPv6":       {IPv6: netip.MustParseAddr("10.0.0.1")},
		"is set without":    {STUNSecondListen: ":0"},
		"not relay.example": {HostName: "relay.example", TLSListen: ":0", CertPEM: cert, KeyPEM: certKey},
		"exactly one":       {HostName: "other.example", TLSListen: ":0", CertPEM: append(cert, cert...), KeyPEM: certKey},
	} {
		_, err := New(cfg)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: err = %v, want %q", cfg, err, want)
		}
	}
}

func TestRegionPublishesBoundPorts(t *testing.T) {
	s := start(t, Config{HostName: "relay.example", IPv4: netip.MustParseAddr("192.0.2.7"),
		STUNListen: "127.0.0.1:0", STUNSecondListen: "127.0.0.1:0", RegionName: "Home"})
	r := s.Region()
	if err := validateRegion(999, r); err != nil {
		t.Fatal(err)
	}
	if r.RegionCode != "signalbox" || r.RegionName != "Home" || len(r.Nodes) != 1 {
		t.Fatalf("region: %+v", r)
	}
	relay := r.Nodes[0]
	if relay.DERPPort != s.tlsLn.Addr().(*net.TCPAddr).Port || relay.STUNPort != s.stunPC[0].LocalAddr().(*net.UDPAddr).Port ||
		relay.CertName != s.pin || relay.IPv4 != "192.0.2.7" || relay.IPv6 != "" || relay.STUNOnly {
		t.Errorf("relay node: %+v", relay)
	}
	c := s.Companion(1000)
	if err := validateRegion(1000, c); err != nil {
		t.Fatal(err)
	}
	second := c.Nodes[0]
	if second.STUNPort != s.stunPC[1].LocalAddr().(*net.UDPAddr).Port || second.DERPPort != relay.DERPPort || second.CertName != s.pin ||
		second.STUNOnly || second.Name == relay.Name {
		t.Errorf("companion node: %+v", second)
	}
}

func TestCompanionNeedsASecondPort(t *testing.T) {
	s := start(t, Config{HostName: "relay.example", STUNListen: "127.0.0.1:0"})
	if c := s.Companion(1000); c != nil {
		t.Errorf("companion without a second STUN port: %+v", c)
	}
}

func TestRegionAddressesFollowHostName(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")
	for _, tc := range []struct {
		cfg    Config
		v4, v6 string
	}{
		{Config{}, "127.0.0.1", "none"},
		{Config{HostName: "192.0.2.1"}, "192.0.2.1", "none"},
		{Config{HostName: "2001:db8::1"}, "none", "2001:db8::1"},
		{Config{HostName: "192.0.2.1", IPv6: v6}, "192.0.2.1", "2001:db8::7"},
		{Config{HostName: "relay.example"}, "", ""},
		{Config{HostName: "relay.example.", IPv4: v4, IPv6: v6}, "192.0.2.7", "2001:db8::7"},
	} {
		tc.cfg.PublicPort = 443
		s, err := New(tc.cfg)
		if err != nil {
			t.Fatal(err)
		}
		r := s.Region()
		n := r.Nodes[0]
		if n.IPv4 != tc.v4 || n.IPv6 != tc.v6 || n.STUNPort != -1 || n.CertName != "" || n.DERPPort != 443 || len(r.Nodes) != 1 {
			t.Errorf("%+v: got %+v, want %q and %q", tc.cfg, n, tc.v4, tc.v6)
		}
		if err := validateRegion(999, r); err != nil {
			t.Errorf("%+v: %v", tc.cfg, err)
		}
	}
}
