package serve

import (
	"crypto/tls"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/derp"
)

// https is a configuration with a certificate for mesh.example.com.
func https(t *testing.T) string {
	t.Helper()
	cert, key, err := derp.NewPinnedCert("mesh.example.com", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certPath, keyPath := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	write(t, certPath, string(cert))
	write(t, keyPath, string(key))
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
