package listener

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"
)

// tlsConfig is what every TLS listener starts from.
func tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2", "http/1.1"},
	}
}

// CertFiles shows the certificate in two PEM files and follows them: within
// CheckEvery of a change the next handshake uses the new pair. A pair that
// cannot be used is logged and the old one kept.
type CertFiles struct {
	certPath, keyPath string
	log               *slog.Logger

	// CheckEvery is how often handshakes look at the files: 2 s. It must not
	// be changed after the first handshake.
	CheckEvery time.Duration
	// Now is the clock that certificates expire by. It must not be changed
	// after the first handshake either.
	Now func() time.Time

	cur atomic.Pointer[tls.Certificate]

	// mu guards the following fields.
	mu      sync.Mutex
	checked time.Time
	warned  time.Time // of the pair in use, that its time ends; zero: not yet
	cert    []byte    // contents of the files at the last look
	key     []byte
	failed  string // last error that was logged
}

// NewCertFiles returns a source that has not read its files; Load does.
func NewCertFiles(certPath, keyPath string, log *slog.Logger) *CertFiles {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &CertFiles{certPath: certPath, keyPath: keyPath, log: log, CheckEvery: 2 * time.Second, Now: time.Now}
}

// Reload reads the files now. On an error the pair in use stays.
func (f *CertFiles) Reload() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.reload()
}

func (f *CertFiles) reload() error {
	f.checked = time.Now()
	cert, err := os.ReadFile(f.certPath)
	if err != nil {
		return fmt.Errorf("read certificate: %w", err)
	}
	key, err := os.ReadFile(f.keyPath)
	if err != nil {
		return fmt.Errorf("read certificate key: %w", err)
	}
	if f.cur.Load() != nil && bytes.Equal(cert, f.cert) && bytes.Equal(key, f.key) {
		return nil
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return fmt.Errorf("certificate %s with key %s: %w", f.certPath, f.keyPath, err)
	}
	if pair.Leaf == nil {
		if pair.Leaf, err = x509.ParseCertificate(pair.Certificate[0]); err != nil {
			return fmt.Errorf("certificate %s: %w", f.certPath, err)
		}
	}
	f.cert, f.key, f.failed = cert, key, ""
	f.warned = time.Time{}
	f.cur.Store(&pair)
	f.log.Info("certificate loaded", "file", f.certPath, "names", pair.Leaf.DNSNames, "expires", pair.Leaf.NotAfter)
	f.remind()
	return nil
}

// remind warns once a day of a certificate that has expired, or has at most a
// tenth of its time and a week left. Clients that no longer take it make
// handshakes all the same, so it is called as long as anybody comes. It is
// called with mu held.
func (f *CertFiles) remind() {
	pair, now := f.cur.Load(), f.Now()
	if pair == nil {
		return
	}
	end := pair.Leaf.NotAfter
	const week = 7 * 24 * time.Hour
	expired, soon := !now.Before(end), end.Sub(now) <= min(week, end.Sub(pair.Leaf.NotBefore)/10)
	if !expired && !soon || now.Sub(f.warned) < 24*time.Hour && (!expired || !f.warned.Before(end)) {
		return
	}
	f.warned = now
	if expired {
		f.log.Error("the certificate has expired: clients refuse it", "file", f.certPath, "expired", end)
	} else {
		f.log.Warn("the certificate expires soon", "file", f.certPath, "expires", end)
	}
}

// follow looks at the files when it is time. Handshakes that come meanwhile
// do not wait for it.
func (f *CertFiles) follow() {
	if !f.mu.TryLock() {
		return
	}
	defer f.mu.Unlock()
	if time.Since(f.checked) < f.CheckEvery {
		return
	}
	if err := f.reload(); err != nil && err.Error() != f.failed {
		f.failed = err.Error()
		f.log.Error("keeping the old certificate", "err", err)
	}
	f.remind()
}

// Certificate is the pair in use, nil before the first Reload.
func (f *CertFiles) Certificate() *tls.Certificate { return f.cur.Load() }

// TLSConfig shows the pair in use to every client, whatever name it asks for.
func (f *CertFiles) TLSConfig() *tls.Config {
	c := tlsConfig()
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		f.follow()
		if pair := f.cur.Load(); pair != nil {
			return pair, nil
		}
		return nil, fmt.Errorf("no certificate loaded from %s", f.certPath)
	}
	return c
}

// ACMEConfig says for which name and from whom certificates are ordered.
type ACMEConfig struct {
	Hostname string // the only name that is ever ordered
	CacheDir string // keeps account and certificates, mode 0700
	URL      string // directory; "" means Let's Encrypt
	Email    string // told to the authority; may be empty
	HTTP     *http.Client
}

// ACME orders certificates and answers the authority's challenges.
type ACME struct{ m *autocert.Manager }

// NewACME returns an ACME that has ordered nothing yet; the first handshake
// for the host name does.
func NewACME(cfg ACMEConfig) (*ACME, error) {
	if cfg.Hostname == "" {
		return nil, fmt.Errorf("acme: no host name")
	}
	if cfg.CacheDir == "" {
		return nil, fmt.Errorf("acme: no cache directory")
	}
	return &ACME{&autocert.Manager{
		Prompt:     autocert.AcceptTOS,
		Cache:      autocert.DirCache(cfg.CacheDir),
		HostPolicy: autocert.HostWhitelist(cfg.Hostname),
		Email:      cfg.Email,
		Client:     &acme.Client{DirectoryURL: cfg.URL, HTTPClient: cfg.HTTP, UserAgent: "signalbox"},
	}}, nil
}

// TLSConfig shows the ordered certificate and answers TLS-ALPN-01.
func (a *ACME) TLSConfig() *tls.Config {
	c := tlsConfig()
	c.NextProtos = append(c.NextProtos, acme.ALPNProto)
	c.GetCertificate = a.m.GetCertificate
	return c
}

// Handler answers HTTP-01 on port 80 and passes on the rest.
func (a *ACME) Handler(rest http.Handler) http.Handler { return a.m.HTTPHandler(rest) }
