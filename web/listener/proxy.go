package listener

import (
	"context"
	"net/http"
	"net/netip"
	"strings"
)

// origin is where a request came from, as far as we believe it.
type origin struct {
	client netip.Addr
	scheme string
}

type originKey struct{}

// ClientIP is the address of whoever sent the request: the TCP peer, or what a
// trusted proxy says (X-Forwarded-For, else Forwarded, else X-Real-IP). Of a
// chain of proxies the last address that is not itself a trusted proxy counts,
// since everything before it was written by that address. It is invalid for
// requests through a unix socket.
//
// A proxy must set or append to the first of these headers that it passes on;
// one that sets X-Real-IP alone and lets X-Forwarded-For through lets its
// clients choose their address.
func ClientIP(r *http.Request) netip.Addr {
	if o, ok := r.Context().Value(originKey{}).(*origin); ok {
		return o.client
	}
	return peerIP(r)
}

// ClientAddr is ClientIP with the port of the TCP peer, or port 0 when the
// address came from a proxy.
func ClientAddr(r *http.Request) netip.AddrPort {
	ip := ClientIP(r)
	if p, err := netip.ParseAddrPort(r.RemoteAddr); err == nil && p.Addr().Unmap().WithZone("") == ip {
		return netip.AddrPortFrom(ip, p.Port())
	}
	return netip.AddrPortFrom(ip, 0)
}

// Scheme is "https" or "http": how the client's request reached us or the
// trusted proxy before us.
func Scheme(r *http.Request) string {
	if o, ok := r.Context().Value(originKey{}).(*origin); ok {
		return o.scheme
	}
	return ownScheme(r)
}

func peerIP(r *http.Request) netip.Addr {
	p, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return p.Addr().Unmap().WithZone("")
}

func ownScheme(r *http.Request) string {
	if r.TLS != nil {
		return "https"
	}
	return "http"
}

func withOrigin(r *http.Request, trusted []netip.Prefix) *http.Request {
	o := &origin{client: peerIP(r), scheme: ownScheme(r)}
	if contains(trusted, o.client) {
		o.client = forwardedClient(r.Header, trusted, o.client)
		if s := forwardedScheme(r.Header); s != "" {
			o.scheme = s
		}
	}
	return r.WithContext(context.WithValue(r.Context(), originKey{}, o))
}

func contains(prefixes []netip.Prefix, a netip.Addr) bool {
	if !a.IsValid() {
		return false
	}
	for _, p := range prefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// forwardedClient follows the chain of proxies backwards from peer.
func forwardedClient(h http.Header, trusted []netip.Prefix, peer netip.Addr) netip.Addr {
	chain := elements(h.Values("X-Forwarded-For"))
	if len(chain) == 0 {
		for _, e := range elements(h.Values("Forwarded")) {
			chain = append(chain, forwardedParam(e, "for"))
		}
	}
	if len(chain) == 0 {
		chain = h.Values("X-Real-Ip")
	}
	client := peer
	for i := len(chain) - 1; i >= 0; i-- {
		a, ok := parseNode(chain[i])
		if !ok {
			// Written by the last address that we know: no further back.
			return client
		}
		client = a
		if !contains(trusted, a) {
			return client
		}
	}
	return client
}

// forwardedScheme is what the nearest proxy says.
func forwardedScheme(h http.Header) string {
	v := elements(h.Values("X-Forwarded-Proto"))
	if len(v) == 0 {
		for _, e := range elements(h.Values("Forwarded")) {
			v = append(v, forwardedParam(e, "proto"))
		}
	}
	if len(v) == 0 {
		return ""
	}
	switch s := strings.ToLower(v[len(v)-1]); s {
	case "http", "https":
		return s
	case "ws", "wss":
		return "http" + s[2:]
	}
	return ""
}

// elements splits header lines at commas.
func elements(lines []string) []string {
	var out []string
	for _, line := range lines {
		for e := range strings.SplitSeq(line, ",") {
			out = append(out, strings.TrimSpace(e))
		}
	}
	return out
}

// forwardedParam is one parameter of an element of Forwarded (RFC 7239).
func forwardedParam(element, name string) string {
	for pair := range strings.SplitSeq(element, ";") {
		k, v, ok := strings.Cut(strings.TrimSpace(pair), "=")
		if ok && strings.EqualFold(k, name) {
			return strings.Trim(v, `"`)
		}
	}
	return ""
}

// parseNode reads an address with or without a port and brackets.
func parseNode(s string) (netip.Addr, bool) {
	s = strings.TrimSpace(s)
	if p, err := netip.ParseAddrPort(s); err == nil {
		return p.Addr().Unmap().WithZone(""), true
	}
	if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
		s = s[1 : len(s)-1]
	}
	a, err := netip.ParseAddr(s)
	return a.Unmap().WithZone(""), err == nil
}
