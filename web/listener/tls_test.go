package listener

import (
	"crypto/tls"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

func TestCertificateFollowsItsFiles(t *testing.T) {
	dir := t.TempDir()
	certPath, keyPath := writePair(t, dir, "first.example")
	var log logBuffer
	certs := NewCertFiles(certPath, keyPath, log.logger())
	certs.CheckEvery = 1
	if err := certs.Reload(); err != nil {
		t.Fatal(err)
	}
	_, addr := start(t, Config{Handler: ok, TLS: certs.TLSConfig()})
	if got := shownName(t, addr); got != "first.example" {
		t.Errorf("shown: %s", got)
	}

	writePair(t, dir, "second.example")
	if got := shownName(t, addr); got != "second.example" {
		t.Errorf("after a change: %s", got)
	}

	// A key that does not belong to the certificate, then half a file.
	other := t.TempDir()
	_, foreign := writePair(t, other, "third.example")
	b, err := os.ReadFile(foreign)
	if err != nil {
		t.Fatal(err)
	}
	for _, broken := range [][]byte{b, b[:len(b)/2]} {
		if err := os.WriteFile(keyPath, broken, 0o600); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if got := shownName(t, addr); got != "second.example" {
				t.Errorf("with a broken pair: %s", got)
			}
		}
		if err := certs.Reload(); err == nil {
			t.Error("Reload accepted a broken pair")
		}
	}
	if n := strings.Count(log.String(), "keeping the old certificate"); n != 2 {
		t.Errorf("%d log lines for two broken pairs:\n%s", n, log.String())
	}

	writePair(t, dir, "fourth.example")
	if got := shownName(t, addr); got != "fourth.example" {
		t.Errorf("after the repair: %s", got)
	}
}

func TestReloadDoesNotWaitForTheNextLook(t *testing.T) {
	dir := t.TempDir()
	certPath, keyPath := writePair(t, dir, "first.example")
	certs := NewCertFiles(certPath, keyPath, nil)
	certs.CheckEvery = time.Hour
	if err := certs.Reload(); err != nil {
		t.Fatal(err)
	}
	_, addr := start(t, Config{Handler: ok, TLS: certs.TLSConfig()})
	writePair(t, dir, "second.example")
	if got := shownName(t, addr); got != "first.example" {
		t.Errorf("before Reload: %s", got)
	}
	if err := certs.Reload(); err != nil {
		t.Fatal(err)
	}
	if got := shownName(t, addr); got != "second.example" {
		t.Errorf("after Reload: %s", got)
	}
}

func TestTLSOffersBothProtocols(t *testing.T) {
	certPath, keyPath := writePair(t, t.TempDir(), "box.example")
	certs := NewCertFiles(certPath, keyPath, nil)
	if err := certs.Reload(); err != nil {
		t.Fatal(err)
	}
	guard := NewGuard(GuardConfig{Total: 10})
	_, addr := start(t, Config{Guard: guard, TLS: certs.TLSConfig(), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		Identify(r)
		io.WriteString(w, r.Proto+" "+Scheme(r)+" "+ClientIP(r).String())
	})})
	for _, tt := range []struct {
		h2   bool
		want string
	}{
		{true, "HTTP/2.0 https 127.0.0.1"},
		{false, "HTTP/1.1 https 127.0.0.1"},
	} {
		tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: tt.h2}
		res, err := (&http.Client{Transport: tr}).Get("https://" + addr)
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := io.ReadAll(res.Body); string(b) != tt.want {
			t.Errorf("got %q, want %q", b, tt.want)
		}
		if n := guard.Strangers(loopback); n != 0 {
			t.Errorf("%d strangers after Identify over TLS", n)
		}
		tr.CloseIdleConnections()
	}
	old := &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}
	if c, err := tls.Dial("tcp", addr, old); err == nil {
		c.Close()
		t.Error("TLS 1.1 was accepted")
	}
}

func TestSilentTLSHandshakeEnds(t *testing.T) {
	certPath, keyPath := writePair(t, t.TempDir(), "box.example")
	certs := NewCertFiles(certPath, keyPath, nil)
	if err := certs.Reload(); err != nil {
		t.Fatal(err)
	}
	_, addr := start(t, Config{TLS: certs.TLSConfig(), Handler: ok, Limits: Limits{ReadHeader: 200 * time.Millisecond}})
	untilClosed(t, dial(t, addr))
}

func TestACMEHandlerPassesOnTheRest(t *testing.T) {
	a, err := NewACME(ACMEConfig{Hostname: "box.example", CacheDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	_, addr := start(t, Config{Handler: a.Handler(ok)})
	for path, want := range map[string]int{"/key": 200, "/.well-known/acme-challenge/unknown": 404} {
		req, _ := http.NewRequest("GET", "http://"+addr+path, nil)
		req.Host = "box.example"
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, res.StatusCode, want)
		}
	}
}

func TestEndOfACertificateIsWarnedOfDaily(t *testing.T) {
	certPath, keyPath := writePair(t, t.TempDir(), "box.example.com") // from an hour ago to an hour from now
	var log logBuffer
	f := NewCertFiles(certPath, keyPath, log.logger())
	f.CheckEvery = 0
	start := time.Now()
	now := start
	f.Now = func() time.Time { return now }
	if err := f.Reload(); err != nil {
		t.Fatal(err)
	}
	get := f.TLSConfig().GetCertificate
	for _, x := range []struct {
		after         time.Duration
		soon, expired int // lines so far
	}{
		{0, 0, 0},
		{50 * time.Minute, 1, 0},
		{55 * time.Minute, 1, 0},
		{61 * time.Minute, 1, 1},
		{2 * time.Hour, 1, 1},
		{26 * time.Hour, 1, 2},
	} {
		now = start.Add(x.after)
		if _, err := get(nil); err != nil {
			t.Fatal(err)
		}
		soon, expired := strings.Count(log.String(), "expires soon"), strings.Count(log.String(), "has expired")
		if soon != x.soon || expired != x.expired {
			t.Errorf("after %v: %d warnings before and %d after the end, want %d and %d", x.after, soon, expired, x.soon, x.expired)
		}
	}
}
