package derp

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

func TestVerifyAnswersAllowedRelaysOnly(t *testing.T) {
	var m members
	member, stranger := m.join().Public(), key.NewNode().Public()
	relay := netip.MustParseAddr("192.0.2.1")
	h := VerifyHandler(m.has, func(a netip.Addr) bool { return a == relay }, nil)
	body := func(k key.NodePublic) string {
		b, err := json.Marshal(tailcfg.DERPAdmitClientRequest{NodePublic: k, Source: netip.MustParseAddr("198.51.100.1")})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for _, tc := range []struct {
		name, method, from, body string
		status                   int
		allow                    bool
	}{
		{"member", "POST", "192.0.2.1:5", body(member), 200, true},
		{"mapped source", "POST", "[::ffff:192.0.2.1]:5", body(member), 200, true},
		{"stranger", "POST", "192.0.2.1:5", body(stranger), 200, false},
		{"zero key", "POST", "192.0.2.1:5", body(key.NodePublic{}), 200, false},
		{"other source", "POST", "192.0.2.2:5", body(member), 403, false},
		{"no source", "POST", "@", body(member), 403, false},
		{"GET", "GET", "192.0.2.1:5", "", 405, false},
		{"garbage", "POST", "192.0.2.1:5", "{", 400, false},
		{"wrong type", "POST", "192.0.2.1:5", `{"NodePublic":7}`, 400, false},
		{"too long", "POST", "192.0.2.1:5", `{"x":"` + strings.Repeat("y", maxVerifyBody) + `"}`, 413, false},
	} {
		r := httptest.NewRequest(tc.method, "/verify", strings.NewReader(tc.body))
		r.RemoteAddr = tc.from
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != tc.status {
			t.Errorf("%s: status %d, want %d", tc.name, w.Code, tc.status)
		}
		if w.Code != http.StatusOK {
			continue
		}
		var got tailcfg.DERPAdmitClientResponse
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || got.Allow != tc.allow {
			t.Errorf("%s: %s, want %v", tc.name, w.Body, tc.allow)
		}
	}
	w := httptest.NewRecorder()
	r := httptest.NewRequest("POST", "/verify", strings.NewReader(body(member)))
	VerifyHandler(m.has, nil, nil).ServeHTTP(w, r)
	if w.Code != http.StatusForbidden {
		t.Errorf("without an allow list: status %d, want 403", w.Code)
	}
}
