package serve

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"tailscale.com/derp/derphttp"
	"tailscale.com/net/netmon"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"

	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/derp"
	"github.com/signalbox-net/signalbox/web/listener"
)

// https is a configuration with a certificate for mesh.example.com.
func https(t *testing.T) string {
	t.Helper()
	cert, private, err := derp.NewPinnedCert("mesh.example.com", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certPath, keyPath := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	write(t, certPath, string(cert))
	write(t, keyPath, string(private))
	return "server_url: https://mesh.example.com\ntls_cert_path: " + certPath + "\ntls_key_path: " + keyPath + "\n"
}

// A client that finds port 80 closed asks foreign servers for the name of ours.
func TestPlainListenerBesideHTTPS(t *testing.T) {
	s := running(t, load(t, https(t)), func(s *server) { s.plainPort = "0" })
	if len(s.doors) != 3 {
		t.Fatalf("%d listeners, want https, plain, socket", len(s.doors))
	}
	client := &http.Client{
		Timeout:       20 * time.Second,
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	get := func(url string) (*http.Response, string) {
		t.Helper()
		res, err := client.Get(url)
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
	secure, plain := "https://"+s.doors[0].Addr().String(), "http://"+s.doors[1].Addr().String()
	_, want := get(secure + "/key?v=130")
	if res, body := get(plain + "/key?v=130"); res.StatusCode != http.StatusOK || body != want || !strings.Contains(body, "mkey:") {
		t.Errorf("GET /key by plain http: %s %q, want that of https, %q", res.Status, body, want)
	}
	if res, _ := get(plain + "/generate_204"); res.StatusCode != http.StatusNoContent {
		t.Errorf("GET /generate_204 by plain http: %s", res.Status)
	}
	for _, path := range []string{"/", "/register/x?y=z", "/api/v1/user"} {
		if res, _ := get(plain + path); res.StatusCode != http.StatusMovedPermanently || res.Header.Get("Location") != "https://mesh.example.com"+path {
			t.Errorf("GET %s by plain http: %s to %q", path, res.Status, res.Header.Get("Location"))
		}
	}
}

// A proxy that ends TLS has port 80 as well; with it taken on loopback alone nginx cannot listen on all addresses.
func TestPort80IsTheProxysWhereAProxyHasTheCertificate(t *testing.T) {
	s := assembled(t, load(t, "server_url: https://mesh.example.com\ntrusted_proxies: [127.0.0.1]\n"), func(s *server) { s.plainPort = "0" })
	if len(s.doors) != 2 {
		t.Errorf("%d listeners, want listen_addr and the socket", len(s.doors))
	}
}

// The relay's own TLS listener is under the same cap as the others: strangers count, admitted devices do not.
func TestRelayListenerIsGuarded(t *testing.T) {
	s := running(t, load(t, ""), func(s *server) { s.guard = listener.NewGuard(listener.GuardConfig{PerSource: 1, Grace: time.Hour}) })
	priv := key.NewNode()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	_, err := s.ledger.DoWait(ctx, system, func(tx *db.Tx) error {
		n := &db.Node{Tailnet: tx.Tailnet(), Created: tx.Now(), MachineKey: key.NewMachine().Public(), NodeKey: priv.Public(), Hostname: "a", RegisterMethod: "cli", Tags: []string{"tag:a"}}
		var err error
		if n.IPv4, n.IPv6, err = tx.AllocateAddrs(s.pools()); err != nil {
			return err
		}
		if n.GivenName, err = tx.FreeName("a", n.Owner()); err != nil {
			return err
		}
		return tx.CreateNode(n)
	})
	if err != nil {
		t.Fatal(err)
	}
	region := s.relay.Region()
	device := derphttp.NewRegionClient(priv, logger.Discard, netmon.NewStatic(), func() *tailcfg.DERPRegion { return region })
	defer device.Close()
	if err := device.Connect(ctx); err != nil {
		t.Fatal(err)
	}
	// The one place of this source is free again as soon as the device is known: the handshake of the next gets through.
	addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(region.Nodes[0].DERPPort))
	stranger, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}).DialContext(ctx, "tcp", addr)
	if err != nil {
		t.Fatalf("a stranger beside an admitted device: %v", err)
	}
	defer stranger.Close()
	if n := s.guard.Open(); n != 2 {
		t.Errorf("%d connections are counted, want the device's and the stranger's", n)
	}
	rec := httptest.NewRecorder()
	s.debugHandler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{"signalbox_relay_connections 1\n", "signalbox_relay_admitted_total 1\n", "signalbox_stun_packets_total 0\n"} {
		if !strings.Contains(rec.Body.String(), "\n"+want) {
			t.Errorf("/metrics lacks %q", want)
		}
	}
}

// Clients that find the relay's certificate beside the server's save a round trip, whoever issued the server's.
func TestRelayCertificateStandsBesideThatOfACME(t *testing.T) {
	cert, private, err := derp.NewPinnedCert("mesh.example.com", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	// What ACME issued earlier is used without asking the authority.
	dir := t.TempDir()
	write(t, filepath.Join(dir, "mesh.example.com"), string(private)+string(cert))
	s := running(t, load(t, "server_url: https://mesh.example.com\ntls_letsencrypt_hostname: mesh.example.com\ntls_letsencrypt_challenge_type: TLS-ALPN-01\n"+
		"tls_letsencrypt_cache_dir: "+dir+"\n"), func(s *server) { s.plainPort = "0" })
	c, err := tls.Dial("tcp", s.doors[0].Addr().String(), &tls.Config{InsecureSkipVerify: true, ServerName: "mesh.example.com"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	shown := c.ConnectionState().PeerCertificates
	if len(shown) != 2 || !strings.HasPrefix(shown[1].Subject.CommonName, "derpkey") {
		t.Errorf("%d certificates were shown, want the server's and the relay's", len(shown))
	}
}

// Clients look for captive portals on port 80 of relays that say that they have it.
func TestRelaySaysWhetherItHasPort80(t *testing.T) {
	s := assembled(t, load(t, https(t)), func(s *server) { s.plainPort = "0" })
	if s.relay.Region().Nodes[0].CanPort80 {
		t.Error("a relay without port 80 claims it")
	}
	s.plainAt = 80
	if c, err := s.relayConfig(); err != nil || !c.CanPort80 {
		t.Errorf("with port 80 bound: CanPort80 = %v, %v", c.CanPort80, err)
	}
}
