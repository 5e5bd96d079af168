package listener

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// authority is an ACME server (RFC 8555) that has one order and validates it
// by HTTP-01. It does not check the client's signatures.
type authority struct {
	t        *testing.T
	url      string
	validate string // host:port where the challenge is fetched
	key      *ecdsa.PrivateKey
	cert     *x509.Certificate

	mu     sync.Mutex
	valid  bool // the challenge was met
	issued []byte
	orders int
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "authority"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, key: key, cert: cert}
	ts := httptest.NewServer(a)
	t.Cleanup(ts.Close)
	a.url = ts.URL
	return a
}

func (a *authority) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	w.Header().Set("Replay-Nonce", "nonce")
	reply := func(status int, v any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(v)
	}
	type object = map[string]any
	status := "pending"
	if a.valid {
		status = "valid"
	}
	challenge := object{"type": "http-01", "url": a.url + "/challenge", "token": "token-of-the-order", "status": status}
	order := object{
		"status":         map[bool]string{false: "pending", true: "ready"}[a.valid],
		"identifiers":    []object{{"type": "dns", "value": "box.example"}},
		"authorizations": []string{a.url + "/authorization"},
		"finalize":       a.url + "/finalize",
	}
	switch r.URL.Path {
	case "/directory":
		reply(200, object{"newNonce": a.url + "/nonce", "newAccount": a.url + "/account", "newOrder": a.url + "/orders"})
	case "/nonce":
	case "/account":
		w.Header().Set("Location", a.url+"/account/1")
		reply(201, object{"status": "valid"})
	case "/orders":
		a.orders++
		w.Header().Set("Location", a.url+"/order")
		reply(201, order)
	case "/order":
		reply(200, order)
	case "/authorization":
		reply(200, object{"status": status, "identifier": object{"type": "dns", "value": "box.example"}, "challenges": []object{challenge}})
	case "/challenge":
		a.valid = a.fetch("token-of-the-order")
		reply(200, challenge)
	case "/finalize":
		a.issue(r)
		order["status"], order["certificate"] = "valid", a.url+"/certificate"
		w.Header().Set("Location", a.url+"/order")
		reply(200, order)
	case "/certificate":
		w.Header().Set("Content-Type", "application/pem-certificate-chain")
		for _, der := range [][]byte{a.issued, a.cert.Raw} {
			pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: der})
		}
	default:
		http.NotFound(w, r)
	}
}

// fetch asks the server for the answer to a challenge.
func (a *authority) fetch(token string) bool {
	req, err := http.NewRequest("GET", "http://"+a.validate+"/.well-known/acme-challenge/"+token, nil)
	if err != nil {
		a.t.Error(err)
		return false
	}
	req.Host = "box.example"
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		a.t.Error(err)
		return false
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	if !strings.HasPrefix(string(b), token+".") {
		a.t.Errorf("challenge answered with %d %q", res.StatusCode, b)
		return false
	}
	return true
}

func (a *authority) issue(r *http.Request) {
	var jws struct{ Payload string }
	var payload struct{ CSR string }
	body, _ := io.ReadAll(r.Body)
	json.Unmarshal(body, &jws)
	raw, _ := base64.RawURLEncoding.DecodeString(jws.Payload)
	json.Unmarshal(raw, &payload)
	der, _ := base64.RawURLEncoding.DecodeString(payload.CSR)
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		a.t.Errorf("certificate request: %v", err)
		return
	}
	a.issued, err = x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2),
		DNSNames:     csr.DNSNames,
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(90 * 24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, a.cert, csr.PublicKey, a.key)
	if err != nil {
		a.t.Errorf("issue: %v", err)
	}
}

func TestACMEOrdersAndKeepsACertificate(t *testing.T) {
	ca := newAuthority(t)
	cache := t.TempDir()
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	for run := range 2 { // the second start finds the certificate in the cache
		a, err := NewACME(ACMEConfig{Hostname: "box.example", CacheDir: cache, URL: ca.url + "/directory", Email: "admin@box.example"})
		if err != nil {
			t.Fatal(err)
		}
		_, port80 := start(t, Config{Name: "port 80", Handler: a.Handler(ok)})
		ca.mu.Lock()
		ca.validate = port80
		ca.mu.Unlock()
		_, addr := start(t, Config{Handler: ok, TLS: a.TLSConfig()})
		c, err := tls.Dial("tcp", addr, &tls.Config{ServerName: "box.example", RootCAs: roots})
		if err != nil {
			t.Fatalf("run %d: %v", run, err)
		}
		c.Close()
	}
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if ca.orders != 1 {
		t.Errorf("%d orders, want 1", ca.orders)
	}
}

// A certificate is ordered for the configured name only: an authority must
// not be asked because of what a stranger says.
func TestACMEOrdersOnlyItsName(t *testing.T) {
	ca := newAuthority(t)
	a, err := NewACME(ACMEConfig{Hostname: "box.example", CacheDir: t.TempDir(), URL: ca.url + "/directory"})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"evil.example", "", "127.0.0.1", "box.example.evil.example"} {
		if _, err := a.TLSConfig().GetCertificate(&tls.ClientHelloInfo{ServerName: name, SupportedProtos: []string{"h2"}}); err == nil {
			t.Errorf("%q got a certificate", name)
		}
	}
	if ca.orders != 0 {
		t.Errorf("%d orders", ca.orders)
	}
}
