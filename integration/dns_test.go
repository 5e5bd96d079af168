package integration

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// TestConfiguredNames has clients of each version resolve what the
// configuration adds to the devices' names: records of both families, below
// the base domain and elsewhere, and a domain that has a resolver of its own.
func TestConfiguredNames(t *testing.T) {
	lab := Open(t)
	resolver := lab.Host(t, "resolver")
	inside := netip.MustParseAddr("10.77.0.7")
	answerEverything(t, resolver, inside)
	file := filepath.Join(t.TempDir(), "config.yaml")
	err := os.WriteFile(file, fmt.Appendf(nil, `
dns:
  nameservers:
    split:
      corp.example: [%v]
  extra_records:
    - {name: grafana.mesh.internal, type: A, value: 100.64.99.9}
    - {name: grafana.mesh.internal, type: AAAA, value: "fd7a:115c:a1e0::99"}
    - {name: wiki.elsewhere.example, type: A, value: 100.64.99.8}
`, resolver.Addr), 0o644)
	if err != nil {
		t.Fatal(err)
	}
	server := lab.Server(t, ServerConfig{Args: []string{"-c", file}})
	key := server.Key(t, "admin", "--reusable")
	for _, version := range Versions {
		t.Run(version, func(t *testing.T) {
			c := lab.Client(t, ClientConfig{Version: version})
			c.Up(t, server, key)
			c.AwaitName(t, "grafana.mesh.internal", netip.MustParseAddr("100.64.99.9"))
			c.AwaitName(t, "grafana.mesh.internal", netip.MustParseAddr("fd7a:115c:a1e0::99"))
			c.AwaitName(t, "wiki.elsewhere.example", netip.MustParseAddr("100.64.99.8"))
			c.AwaitName(t, "box.corp.example", inside)
		})
	}
}

// answerEverything runs a resolver on the host's port 53 that has the address
// for every name.
func answerEverything(t testing.TB, h *Host, addr netip.Addr) {
	t.Helper()
	conn, err := h.ListenUDP(netip.AddrPortFrom(h.Addr, 53).String())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		conn.Close()
		<-done
	})
	go func() {
		defer close(done)
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			m.Header.Response, m.Header.Authoritative = true, true
			m.Additionals = nil
			if q.Type == dnsmessage.TypeA {
				m.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: 60},
					Body:   &dnsmessage.AResource{A: addr.As4()},
				}}
			}
			if out, err := m.Pack(); err == nil {
				// A client that gets no answer asks again.
				_, _ = conn.WriteTo(out, from)
			}
		}
	}()
}
