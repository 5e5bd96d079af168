package listener

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"
)

func TestOnlyTrustedProxiesTellTheClient(t *testing.T) {
	trusted := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}
	for _, tt := range []struct {
		name   string
		peer   string
		header http.Header
		ip     string
		scheme string
	}{
		{"no header", "192.0.2.1:5", nil, "192.0.2.1", "http"},
		{"untrusted peer", "192.0.2.1:5", http.Header{
			"X-Forwarded-For": {"198.51.100.9"}, "Forwarded": {"for=198.51.100.9;proto=https"},
			"X-Real-Ip": {"198.51.100.9"}, "X-Forwarded-Proto": {"https"}, "True-Client-Ip": {"198.51.100.9"},
		}, "192.0.2.1", "http"},
		{"trusted", "10.1.1.1:5", http.Header{"X-Forwarded-For": {"198.51.100.9"}, "X-Forwarded-Proto": {"https"}}, "198.51.100.9", "https"},
		{"client wrote the beginning", "10.1.1.1:5", http.Header{"X-Forwarded-For": {"127.0.0.1, 198.51.100.9"}}, "198.51.100.9", "http"},
		{"on several lines", "10.1.1.1:5", http.Header{"X-Forwarded-For": {"127.0.0.1", "198.51.100.9"}}, "198.51.100.9", "http"},
		{"two proxies", "10.1.1.1:5", http.Header{"X-Forwarded-For": {"203.0.113.7, 198.51.100.9, 10.2.2.2"}}, "198.51.100.9", "http"},
		{"only proxies", "10.1.1.1:5", http.Header{"X-Forwarded-For": {"10.3.3.3, 10.2.2.2"}}, "10.3.3.3", "http"},
		{"garbage before proxy", "10.1.1.1:5", http.Header{"X-Forwarded-For": {"nonsense, 10.2.2.2"}}, "10.2.2.2", "http"},
		{"garbage", "10.1.1.1:5", http.Header{"X-Forwarded-For": {"<script>"}}, "10.1.1.1", "http"},
		{"with ports", "[fd00::1]:5", http.Header{"X-Forwarded-For": {"[2001:db8::7]:44123"}}, "2001:db8::7", "http"},
		{"mapped peer", "[::ffff:10.1.1.1]:5", http.Header{"X-Forwarded-For": {"::ffff:198.51.100.9"}}, "198.51.100.9", "http"},
		{"RFC 7239", "10.1.1.1:5", http.Header{"Forwarded": {`for=203.0.113.7, for="[2001:db8::7]:1";proto=https;by=10.1.1.1`}}, "2001:db8::7", "https"},
		{"RFC 7239 hidden", "10.1.1.1:5", http.Header{"Forwarded": {`for=_hidden`}}, "10.1.1.1", "http"},
		{"real ip", "10.1.1.1:5", http.Header{"X-Real-Ip": {"198.51.100.9"}}, "198.51.100.9", "http"},
		{"websocket scheme", "10.1.1.1:5", http.Header{"X-Forwarded-Proto": {"wss"}}, "10.1.1.1", "https"},
		{"odd scheme", "10.1.1.1:5", http.Header{"X-Forwarded-Proto": {"javascript"}}, "10.1.1.1", "http"},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr = tt.peer
		for k, v := range tt.header {
			r.Header[k] = v
		}
		r = withOrigin(r, trusted)
		if got := ClientIP(r); got != netip.MustParseAddr(tt.ip) {
			t.Errorf("%s: client %v, want %s", tt.name, got, tt.ip)
		}
		if got := Scheme(r); got != tt.scheme {
			t.Errorf("%s: scheme %s, want %s", tt.name, got, tt.scheme)
		}
	}
}

func TestClientAddrHasAPortOnlyWithoutProxy(t *testing.T) {
	r := httptest.NewRequest("GET", "/", nil)
	r.RemoteAddr = "10.1.1.1:5"
	if got := ClientAddr(withOrigin(r, nil)); got != netip.MustParseAddrPort("10.1.1.1:5") {
		t.Errorf("direct: %v", got)
	}
	r.Header.Set("X-Forwarded-For", "198.51.100.9")
	if got := ClientAddr(withOrigin(r, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")})); got != netip.MustParseAddrPort("198.51.100.9:0") {
		t.Errorf("through a proxy: %v", got)
	}
}

func TestSpoofedHeadersOverTheWire(t *testing.T) {
	tell := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, ClientIP(r), " ", Scheme(r))
	})
	for _, tt := range []struct {
		trusted []netip.Prefix
		want    string
	}{
		{nil, "127.0.0.1 http"},
		{[]netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}, "127.0.0.1 http"},
		{[]netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, "198.51.100.9 https"},
	} {
		_, addr := start(t, Config{Handler: tell, TrustedProxies: tt.trusted})
		req, _ := http.NewRequest("GET", "http://"+addr, nil)
		req.Header.Set("X-Forwarded-For", "127.0.0.1, 198.51.100.9")
		req.Header.Set("X-Forwarded-Proto", "https")
		req.Header.Set("X-Real-IP", "203.0.113.1")
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := io.ReadAll(res.Body); string(b) != tt.want {
			t.Errorf("trusted %v: got %q, want %q", tt.trusted, b, tt.want)
		}
		res.Body.Close()
	}
}

func FuzzForwarded(f *testing.F) {
	f.Add("198.51.100.9, 10.0.0.1", `for="[2001:db8::7]:1";proto=https`, "1.2.3.4")
	trusted := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	f.Fuzz(func(t *testing.T, xff, forwarded, real string) {
		r := &http.Request{RemoteAddr: "10.1.1.1:5", Header: http.Header{}}
		r.Header.Set("X-Forwarded-For", xff)
		r.Header.Set("Forwarded", forwarded)
		r.Header.Set("X-Real-Ip", real)
		r = withOrigin(r, trusted)
		if ip := ClientIP(r); !ip.IsValid() || ip.Zone() != "" || ip.Is4In6() {
			t.Errorf("client %v", ip)
		}
		if s := Scheme(r); s != "http" && s != "https" {
			t.Errorf("scheme %q", s)
		}
	})
}
