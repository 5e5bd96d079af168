package derp

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/netip"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// maxVerifyBody bounds a tailcfg.DERPAdmitClientRequest; a real one has about
// 130 bytes.
const maxVerifyBody = 4 << 10

// VerifyHandler answers relays outside this process that run derper with
// --verify-client-url: POST of a tailcfg.DERPAdmitClientRequest, answered by a
// tailcfg.DERPAdmitClientResponse. The answer tells who is a member, so only
// addresses that allowed accepts get one; nil allows nobody. Source tells the
// asking address; nil means the connection's remote address.
func VerifyHandler(admit func(key.NodePublic) bool, allowed func(netip.Addr) bool, source func(*http.Request) netip.AddrPort) http.Handler {
	if source == nil {
		source = remoteAddr
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			w.Header().Set("Allow", http.MethodPost)
			http.Error(w, "POST only", http.StatusMethodNotAllowed)
			return
		}
		if allowed == nil || !allowed(source(r).Addr()) {
			w.Header().Set("Connection", "close")
			http.Error(w, "not a relay of this network", http.StatusForbidden)
			return
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxVerifyBody))
		if err != nil {
			status := http.StatusBadRequest
			if errors.As(err, new(*http.MaxBytesError)) {
				status = http.StatusRequestEntityTooLarge
			}
			w.Header().Set("Connection", "close")
			http.Error(w, "unreadable request", status)
			return
		}
		var req tailcfg.DERPAdmitClientRequest
		if err := json.Unmarshal(body, &req); err != nil {
			http.Error(w, "malformed request", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		// A write error means that the asker is gone.
		_ = json.NewEncoder(w).Encode(tailcfg.DERPAdmitClientResponse{
			Allow: !req.NodePublic.IsZero() && admit != nil && admit(req.NodePublic),
		})
	})
}
