package derp

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	tsderp "tailscale.com/derp"
	"tailscale.com/net/wsconn"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// pinned is a client configuration that trusts s's certificate only.
func pinned(t *testing.T, s *Server) *tls.Config {
	return &tls.Config{
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			sum := sha256.Sum256(cs.PeerCertificates[0].Raw)
			if got := fmt.Sprintf("sha256-raw:%x", sum); got != s.pin {
				return fmt.Errorf("certificate %s, want %s", got, s.pin)
			}
			return nil
		},
	}
}

func (s *Server) testAddr() string { return s.tlsLn.Addr().String() }

// upgrade writes a native upgrade request on nc.
func upgrade(t *testing.T, nc net.Conn, headers string) {
	t.Helper()
	if _, err := io.WriteString(nc, "GET /derp HTTP/1.1\r\nHost: relay\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n"+headers+"\r\n"); err != nil {
		t.Fatal(err)
	}
}

func dialTLS(t *testing.T, s *Server) net.Conn {
	t.Helper()
	nc, err := tls.Dial("tcp", s.testAddr(), pinned(t, s))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(15 * time.Second))
	return nc
}

func TestWebSocketClientRelays(t *testing.T) {
	var m members
	s := start(t, Config{Admit: m.has})
	connect := func(priv key.NodePrivate) (*tsderp.Client, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		ws, _, err := websocket.Dial(ctx, "wss://"+s.testAddr()+"/derp", &websocket.DialOptions{
			Subprotocols: []string{"derp"},
			HTTPHeader:   http.Header{"Origin": {"https://elsewhere.example"}},
			HTTPClient:   &http.Client{Transport: &http.Transport{TLSClientConfig: pinned(t, s)}},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ws.CloseNow() })
		nc := wsconn.NetConn(context.Background(), ws, websocket.MessageBinary, "")
		return tsderp.NewClient(priv, nc, bufio.NewReadWriter(bufio.NewReader(nc), bufio.NewWriter(nc)), logger.Discard)
	}
	ka, kb := m.join(), m.join()
	a, err := connect(ka)
	if err != nil {
		t.Fatal(err)
	}
	b := mustDial(t, s.Region(), kb)
	// A reply proves that a's loop runs before b sends.
	big := strings.Repeat("x", 60_000)
	if err := a.Send(kb.Public(), []byte(big)); err != nil {
		t.Fatal(err)
	}
	wantPacket(t, b, ka.Public(), big)
	if err := b.Send(ka.Public(), []byte("to the browser")); err != nil {
		t.Fatal(err)
	}
	wantPacket(t, a, kb.Public(), "to the browser")
	if got := s.Metrics(); got.WebSockets != 1 || got.Admitted != 2 {
		t.Errorf("metrics: %+v", got)
	}

	m.set(ka.Public(), false)
	s.Revoke(ka.Public())
	wantClosed(t, a)
	again, err := connect(ka)
	if err == nil {
		wantClosed(t, again)
	}
	if got := s.Metrics(); got.Denied != 1 {
		t.Errorf("denied = %d, want 1", got.Denied)
	}
}

func TestFastStartOnlyWhereMetaCertWasShown(t *testing.T) {
	var m members
	s := start(t, Config{Admit: m.has})

	// On the own listener the client may skip the 101.
	nc := dialTLS(t, s)
	upgrade(t, nc, "Derp-Fast-Start: 1\r\n")
	kind, err := bufio.NewReader(nc).ReadByte()
	if err != nil || tsderp.FrameType(kind) != tsderp.FrameServerKey {
		t.Fatalf("fast start: first byte %#x, err %v; want the server's key frame", kind, err)
	}

	// Without the header it gets one.
	nc = dialTLS(t, s)
	upgrade(t, nc, "")
	res, err := http.ReadResponse(bufio.NewReader(nc), nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols || res.Header.Get("Derp-Public-Key") != s.PublicKey().UntypedHexString() {
		t.Fatalf("plain start: %v, %v", res, err)
	}

	// A main listener shows it only after AddMetaCert.
	main := httptest.NewUnstartedServer(s.Handler())
	main.StartTLS()
	defer main.Close()
	for _, meta := range []bool{false, true} {
		if meta {
			s.AddMetaCert(&tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, nil }})
		}
		nc, err := tls.Dial("tcp", main.Listener.Addr().String(), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		nc.SetDeadline(time.Now().Add(10 * time.Second))
		upgrade(t, nc, "Derp-Fast-Start: 1\r\n")
		first, err := bufio.NewReader(nc).ReadByte()
		want := byte('H')
		if meta {
			want = byte(tsderp.FrameServerKey)
		}
		if err != nil || first != want {
			t.Errorf("main listener, meta certificate %v: first byte %#x, err %v; want %#x", meta, first, err, want)
		}
		nc.Close()
	}
}

// The certificate of a challenge of ACME must come as it is.
func TestMetaCertStaysAwayFromChallenges(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c := &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		return &tls.Certificate{Certificate: [][]byte{{1}}}, nil
	}}
	s.AddMetaCert(c)
	for proto, want := range map[string]int{"h2": 2, "http/1.1": 2, "acme-tls/1": 1} {
		got, err := c.GetCertificate(&tls.ClientHelloInfo{SupportedProtos: []string{proto}})
		if err != nil || len(got.Certificate) != want {
			t.Errorf("%s: %d certificates, %v; want %d", proto, len(got.Certificate), err, want)
		}
	}
}

func TestHandlerOnMainListenerRelays(t *testing.T) {
	var m members
	s, err := New(Config{Admit: m.has})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	main := httptest.NewServer(s.Handler())
	defer main.Close()
	nc, err := net.Dial("tcp", main.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	upgrade(t, nc, "")
	br := bufio.NewReader(nc)
	if res, err := http.ReadResponse(br, nil); err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v, %v", res, err)
	}
	k := m.join()
	c, err := tsderp.NewClient(k, nc, bufio.NewReadWriter(br, bufio.NewWriter(nc)), logger.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Send(k.Public(), []byte("echo")); err != nil {
		t.Fatal(err)
	}
	wantPacket(t, c, k.Public(), "echo")
}

// claimFrame is a client's first frame that claims k without proof.
func claimFrame(k key.NodePublic, box int) []byte {
	b := []byte{byte(tsderp.FrameClientInfo)}
	b = binary.BigEndian.AppendUint32(b, uint32(tsderp.KeyLen+box))
	raw := k.Raw32()
	b = append(b, raw[:]...)
	return append(b, make([]byte, box)...)
}

func TestUnprovedClaimHurtsNobody(t *testing.T) {
	var m members
	s := start(t, Config{Admit: m.has})
	k := m.join()
	honest := mustDial(t, s.Region(), k)
	for range maxPerKey + 4 {
		nc := dialTLS(t, s)
		upgrade(t, nc, "Derp-Fast-Start: 1\r\n")
		if _, err := nc.Write(claimFrame(k.Public(), 64)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, nc); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("the impostor stayed connected")
		}
	}
	if err := honest.Send(k.Public(), []byte("unharmed")); err != nil {
		t.Fatal(err)
	}
	wantPacket(t, honest, k.Public(), "unharmed")
	if got := s.Metrics(); got.Admitted != 1 || got.Duplicates != 0 || got.Failed == 0 {
		t.Errorf("metrics: %+v", got)
	}
}

func TestRevokeReachesUnprovedConnections(t *testing.T) {
	// The admission question is held open: Revoke in between must win.
	asked, answer := make(chan struct{}), make(chan bool)
	s := start(t, Config{Admit: func(key.NodePublic) bool {
		asked <- struct{}{}
		return <-answer
	}})
	k := key.NewNode()
	result := make(chan error, 1)
	go func() {
		_, err := dial(t, s.Region(), k)
		result <- err
	}()
	<-asked
	s.Revoke(k.Public())
	answer <- true
	if err := <-result; err == nil || errors.Is(err, errSilent) {
		t.Fatalf("err = %v, want a closed connection", err)
	}
}

func TestGarbageInsteadOfClientInfo(t *testing.T) {
	s := start(t, Config{})
	for name, garbage := range map[string][]byte{
		"HTTP":         []byte(strings.Repeat("GET / HTTP/1.1\r\n\r\n", 4)),
		"other frame":  append([]byte{byte(tsderp.FrameSendPacket), 0, 0, 0, 200}, make([]byte, 200)...),
		"short frame":  {byte(tsderp.FrameClientInfo), 0, 0, 0, 3, 1, 2, 3},
		"giant frame":  append([]byte{byte(tsderp.FrameClientInfo), 0xff, 0xff, 0xff, 0xff}, make([]byte, 64)...),
		"box of zeros": claimFrame(key.NewNode().Public(), 100),
	} {
		nc := dialTLS(t, s)
		upgrade(t, nc, "Derp-Fast-Start: 1\r\n")
		if _, err := nc.Write(garbage); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, nc); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the connection stayed open", name)
		}
	}
}

func TestFailingSourceIsLimited(t *testing.T) {
	var m members
	s := start(t, Config{Admit: m.has})
	// Without a failure an office may open as many as it likes.
	var idle []net.Conn
	for range unadmittedPerSource + 4 {
		nc := dialTLS(t, s)
		upgrade(t, nc, "Derp-Fast-Start: 1\r\n")
		b := make([]byte, 1)
		if _, err := io.ReadFull(nc, b); err != nil || tsderp.FrameType(b[0]) != tsderp.FrameServerKey {
			t.Fatalf("first byte %x, %v", b, err)
		}
		idle = append(idle, nc)
	}
	if _, err := dial(t, s.Region(), key.NewNode()); err == nil {
		t.Fatal("stranger was admitted")
	}
	nc := dialTLS(t, s)
	upgrade(t, nc, "")
	res, err := http.ReadResponse(bufio.NewReader(nc), nil)
	if err != nil || res.StatusCode != http.StatusTooManyRequests || res.Header.Get("Retry-After") == "" {
		t.Fatalf("%v, %v; want 429", res, err)
	}
	if got := s.Metrics(); got.Limited != 1 {
		t.Errorf("limited = %d, want 1", got.Limited)
	}
	for _, nc := range idle {
		nc.Close()
	}
}

func TestSourceTable(t *testing.T) {
	tab := newSourceTable()
	now := time.Unix(1e9, 0)
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	var ends []func(bool, time.Time)
	for range 100 {
		end, ok := tab.begin(a, now)
		if !ok {
			t.Fatal("source without failures refused")
		}
		ends = append(ends, end)
	}
	ends[0](true, now)
	if _, ok := tab.begin(a, now.Add(59*time.Second)); ok {
		t.Error("99 open connections within a minute of a failure: not refused")
	}
	if _, ok := tab.begin(b, now); !ok {
		t.Error("another source refused")
	}
	if _, ok := tab.begin(a, now.Add(time.Minute)); !ok {
		t.Error("refused a minute after the failure")
	}
	for _, end := range ends[1:] {
		end(false, now)
	}
	for range unadmittedPerSource - 1 { // one is open from above
		if _, ok := tab.begin(a, now); !ok {
			t.Fatal("refused below the limit")
		}
	}
	if _, ok := tab.begin(a, now); ok {
		t.Error("one more than the limit accepted")
	}
	if sourceOf(netip.MustParseAddr("2001:db8:1:2:3::4")) != sourceOf(netip.MustParseAddr("2001:db8:1:2::5%eth0")) {
		t.Error("one IPv6 /64 counts as two sources")
	}
	if sourceOf(netip.MustParseAddr("::ffff:192.0.2.1")) != a {
		t.Error("mapped IPv4 address counts apart")
	}
}

func TestPlainRequests(t *testing.T) {
	s := start(t, Config{HostName: "Relay.example", IPv4: netip.MustParseAddr("192.0.2.7")})
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: pinned(t, s)}}
	do := func(method, path string, header ...string) (*http.Response, string) {
		t.Helper()
		req, err := http.NewRequest(method, "https://"+s.testAddr()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res, string(body)
	}
	for _, tc := range []struct {
		method, path string
		status       int
	}{
		{"GET", "/derp", http.StatusUpgradeRequired},
		{"POST", "/derp", http.StatusMethodNotAllowed},
		{"GET", "/derp/probe", http.StatusOK},
		{"HEAD", "/derp/latency-check", http.StatusOK},
		{"GET", "/derp/latency-check", http.StatusOK},
		{"PUT", "/derp/probe", http.StatusMethodNotAllowed},
		{"GET", "/generate_204", http.StatusNoContent},
		{"GET", "/bootstrap-dns", http.StatusOK},
		{"HEAD", "/bootstrap-dns", http.StatusMethodNotAllowed},
		{"POST", "/bootstrap-dns", http.StatusMethodNotAllowed},
		{"GET", "/", http.StatusNotFound},
		{"GET", "/debug/vars", http.StatusNotFound},
		{"GET", "/derp/../metrics", http.StatusNotFound},
	} {
		res, _ := do(tc.method, tc.path)
		if res.StatusCode != tc.status {
			t.Errorf("%s %s: %d, want %d", tc.method, tc.path, res.StatusCode, tc.status)
		}
	}
	if res, _ := do("GET", "/derp/probe"); res.Header.Get("Access-Control-Allow-Origin") != "*" {
		t.Error("probe lacks Access-Control-Allow-Origin: browsers could not measure")
	}
	res, _ := do("GET", "/generate_204", "X-Tailscale-Challenge", "ts_relay.example")
	if got := res.Header.Get("X-Tailscale-Response"); got != "response ts_relay.example" {
		t.Errorf("challenge answered %q", got)
	}
	res, _ = do("GET", "/generate_204", "X-Tailscale-Challenge", "<script>")
	if got := res.Header.Get("X-Tailscale-Response"); got != "" {
		t.Errorf("bad challenge answered %q", got)
	}
	if _, body := do("GET", "/bootstrap-dns?q=relay.example"); strings.TrimSpace(body) != `{"relay.example":["192.0.2.7"]}` {
		t.Errorf("bootstrap: %s", body)
	}
}

func TestSilentConnectionsEnd(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for the ten seconds that a client has to name itself")
	}
	t.Parallel()
	var m members
	s := start(t, Config{Admit: m.has})
	silent := map[string]func(t *testing.T) io.Reader{
		"before the request": func(t *testing.T) io.Reader { return dialTLS(t, s) },
		"native": func(t *testing.T) io.Reader {
			nc := dialTLS(t, s)
			upgrade(t, nc, "")
			return nc
		},
		"half a frame": func(t *testing.T) io.Reader {
			nc := dialTLS(t, s)
			upgrade(t, nc, "Derp-Fast-Start: 1\r\n")
			if _, err := nc.Write(claimFrame(key.NewNode().Public(), 100)[:50]); err != nil {
				t.Fatal(err)
			}
			return nc
		},
		"WebSocket in an endless frame": func(t *testing.T) io.Reader {
			nc := dialTLS(t, s)
			_, err := io.WriteString(nc, "GET /derp HTTP/1.1\r\nHost: relay\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
				"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: derp\r\n\r\n")
			if err != nil {
				t.Fatal(err)
			}
			// A masked binary frame that announces 2^62 bytes.
			if _, err := nc.Write([]byte{0x82, 0xff, 0x40, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4}); err != nil {
				t.Fatal(err)
			}
			return nc
		},
	}
	type end struct {
		name  string
		after time.Duration
		err   error
	}
	ends := make(chan end)
	for name, open := range silent {
		r := open(t) // with a deadline of 15 s
		go func() {
			begin := time.Now()
			_, err := io.Copy(io.Discard, r)
			ends <- end{name, time.Since(begin), err}
		}()
	}
	for range silent {
		e := <-ends
		if errors.Is(e.err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: still open after 15 s", e.name)
		} else if e.after < 5*time.Second {
			t.Errorf("%s: ended after %v, before a slow client could speak", e.name, e.after)
		}
	}
}
