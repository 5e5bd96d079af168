package listener

import (
	"net/http"
	"net/url"
	"strings"
)

// Companion is the handler for port 80 beside an https server: clients try
// /ts2021 there first, and one that finds the port closed asks foreign
// bootstrap servers for our name. What is not theirs is redirected to base,
// the server's own https URL; the Host header has no say in it.
func Companion(h http.Handler, base *url.URL) http.Handler {
	root := strings.TrimSuffix(base.String(), "/")
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ts2021", "/key", "/generate_204":
			h.ServeHTTP(w, r)
			return
		}
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "use "+root, http.StatusMethodNotAllowed)
			return
		}
		target := root + r.URL.EscapedPath()
		if r.URL.RawQuery != "" {
			target += "?" + r.URL.RawQuery
		}
		w.Header().Set("Location", target)
		w.WriteHeader(http.StatusMovedPermanently)
	})
}
