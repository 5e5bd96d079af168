package derp

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"time"
)

// Clients compare a pinned certificate's dates with their own clock, and a
// pin cannot be renewed without a new DERP map, so the span is as wide as a
// wrong clock may be.
var (
	pinNotBefore = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	pinNotAfter  = time.Date(2099, 12, 31, 0, 0, 0, 0, time.UTC)
)

// NewPinnedCert makes a self-signed pair for the own TLS listener. Host is the
// relay's HostName: a DNS name becomes a DNS SAN, because clients verify it
// even against a pin, an IP literal becomes an IP SAN. It is valid from 2020
// to 2099, or further when now lies outside.
//
// The pin follows the certificate, so a new pair cuts clients off until they
// have a new DERP map: keep one pair per host name.
func NewPinnedCert(host string, now time.Time) (certPEM, keyPEM []byte, err error) {
	if err := CheckHostName(host); err != nil {
		return nil, nil, fmt.Errorf("make relay certificate: %w", err)
	}
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make relay certificate: %w", err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, nil, fmt.Errorf("make relay certificate: %w", err)
	}
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "signalbox relay"},
		NotBefore:             pinNotBefore,
		NotAfter:              pinNotAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	if t := now.AddDate(-1, 0, 0); t.Before(tmpl.NotBefore) {
		tmpl.NotBefore = t
	}
	if t := now.AddDate(20, 0, 0); t.After(tmpl.NotAfter) {
		tmpl.NotAfter = t
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		tmpl.IPAddresses = []net.IP{ip.Unmap().AsSlice()}
	} else {
		tmpl.DNSNames = []string{host}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, priv.Public(), priv)
	if err != nil {
		return nil, nil, fmt.Errorf("make relay certificate: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		return nil, nil, fmt.Errorf("make relay certificate: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), nil
}

// pinnedPair loads the configured pair, or makes one, and returns it with its
// tailcfg.DERPNode.CertName.
func pinnedPair(c Config) (*tls.Certificate, string, error) {
	certPEM, keyPEM := c.CertPEM, c.KeyPEM
	if len(certPEM) == 0 && len(keyPEM) == 0 {
		var err error
		if certPEM, keyPEM, err = NewPinnedCert(c.HostName, c.Now()); err != nil {
			return nil, "", err
		}
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, "", fmt.Errorf("relay certificate: %w", err)
	}
	if len(pair.Certificate) != 1 {
		return nil, "", fmt.Errorf("relay certificate: %d certificates, clients accept exactly one against a pin", len(pair.Certificate))
	}
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		return nil, "", fmt.Errorf("relay certificate: %w", err)
	}
	if _, err := netip.ParseAddr(c.HostName); err != nil {
		// For an IP literal the client sends no server name and checks none.
		if err := leaf.VerifyHostname(c.HostName); err != nil {
			return nil, "", fmt.Errorf("relay certificate: %w", err)
		}
	}
	if now := c.Now(); now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return nil, "", errors.New("relay certificate: not valid now")
	}
	pair.Leaf = leaf
	return &pair, certName(pair.Certificate[0]), nil
}

// certName is the pin of a certificate in DER form. Clients compare the text,
// so the hex is lower case.
func certName(der []byte) string {
	sum := sha256.Sum256(der)
	return "sha256-raw:" + hex.EncodeToString(sum[:])
}

// tlsConfig is that of the own TLS listener. The meta certificate, which
// carries the relay's key, saves clients a round trip and is exempt from the
// pin; it hangs on GetCertificate.
func (s *Server) tlsConfig() *tls.Config {
	c := &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return s.cert, nil
		},
	}
	s.relay.ModifyTLSConfigToAddMetaCert(c)
	return c
}

// acmeProto is what an authority that validates by TLS-ALPN-01 asks for.
const acmeProto = "acme-tls/1"

// AddMetaCert lets clients that reach Handler through a listener with c start
// one round trip sooner. Call it before that listener serves; c must have
// GetCertificate set, and TLS must end in this process. The certificate that
// answers a challenge of ACME (RFC 8737) stays alone.
func (s *Server) AddMetaCert(c *tls.Config) {
	plain := c.GetCertificate
	s.relay.ModifyTLSConfigToAddMetaCert(c)
	meta := c.GetCertificate
	c.GetCertificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
		if slices.Contains(h.SupportedProtos, acmeProto) {
			return plain(h)
		}
		return meta(h)
	}
	s.metaOnMain.set()
}
