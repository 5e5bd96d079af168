package serve

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/go-chi/chi/v5"
	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/derp"
	"github.com/signalbox-net/signalbox/web/apiv1"
	"github.com/signalbox-net/signalbox/web/auth"
	"github.com/signalbox-net/signalbox/web/listener"
	"github.com/signalbox-net/signalbox/web/pages"
)

// bindMain binds the main listener and port 80 beside it, where clients look for it, and settles the URL that is the listener's own when nobody
// has set another. Connections wait in the kernel until everything runs.
func (s *server) bindMain() error {
	var err error
	if s.tls, s.http01, err = s.tlsConfig(); err != nil {
		return err
	}
	err = s.openDoor(listener.Config{
		Name: "listen_addr", Addr: s.cfg.ListenAddr, TLS: s.tls, TrustedProxies: s.cfg.TrustedProxies,
		Handler: s.mainLater(),
	})
	if err != nil {
		return err
	}
	if door, ok := s.port80(); ok {
		if err := s.openDoor(door); err != nil {
			return err
		}
		if a, ok := s.doors[1].Addr().(*net.TCPAddr); ok {
			s.plainAt = a.Port
		}
	}
	if base, ok := strings.CutSuffix(s.cfg.ServerURL, ":0"); ok {
		bound, err := netip.ParseAddrPort(s.doors[0].Addr().String())
		if err != nil {
			return fmt.Errorf("listen_addr: %w", err)
		}
		c := *s.cfg
		c.ServerURL = base + ":" + strconv.Itoa(int(bound.Port()))
		s.cfg = &c
	}
	return nil
}

// mainLater is the main handler for listeners that are bound before it can be made. None of them serves before that.
func (s *server) mainLater() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.main.ServeHTTP(w, r) })
}

// buildDoors makes the main handler, and binds the metrics listener and the unix socket.
func (s *server) buildDoors() error {
	api := s.api()
	debug := s.debugHandler()
	s.main = s.mainHandler(api)
	if s.tls != nil && s.relay != nil {
		s.relay.AddMetaCert(s.tls)
	}
	var list []listener.Config
	if s.cfg.MetricsListenAddr != "" {
		// The default port is a popular one. Only who asked for it wants to hear that it is taken before anything works.
		list = append(list, listener.Config{
			Name: "metrics_listen_addr", Addr: s.cfg.MetricsListenAddr, Handler: debug, Optional: !s.cfg.IsSet("metrics_listen_addr"),
		})
	}
	list = append(list, listener.Config{
		Name: "unix_socket", Unix: s.cfg.UnixSocket, UnixMode: s.cfg.UnixSocketPermission, Handler: s.local(api, debug),
	})
	for _, c := range list {
		if err := s.openDoor(c); err != nil {
			return err
		}
	}
	return nil
}

func (s *server) openDoor(c listener.Config) error {
	c.Log = s.log
	c.Limits.Shutdown = stopWithin
	if c.Unix == "" {
		c.Guard = s.guard
	}
	d, err := listener.New(c)
	if err != nil {
		return err
	}
	if err := d.Listen(); err != nil {
		return err
	}
	s.doors = append(s.doors, d)
	return nil
}

// tlsConfig is nil when the main listener speaks plain HTTP. The second result answers ACME's HTTP-01 challenges, if they are used.
func (s *server) tlsConfig() (*tls.Config, func(http.Handler) http.Handler, error) {
	c := &s.cfg.TLS
	switch {
	case c.CertPath != "":
		s.certs = listener.NewCertFiles(c.CertPath, c.KeyPath, s.log)
		if err := s.certs.Reload(); err != nil {
			return nil, nil, fmt.Errorf("tls_cert_path: %w", err)
		}
		return s.certs.TLSConfig(), nil, nil
	case c.LetsEncryptHostname != "":
		acme, err := listener.NewACME(listener.ACMEConfig{Hostname: c.LetsEncryptHostname, CacheDir: c.LetsEncryptCacheDir, URL: s.cfg.ACMEURL, Email: s.cfg.ACMEEmail})
		if err != nil {
			return nil, nil, err
		}
		if c.LetsEncryptChallengeType == "HTTP-01" {
			return acme.TLSConfig(), acme.Handler, nil
		}
		return acme.TLSConfig(), nil, nil
	}
	return nil, nil, nil
}

// port80 is the plain listener beside an https one: a client that finds port 80 closed asks foreign bootstrap servers for our name. Without
// TLS of our own a proxy has the name, and port 80 is the proxy's too: taking it on one address would keep the proxy from taking it on all.
func (s *server) port80() (listener.Config, bool) {
	u, err := url.Parse(s.cfg.ServerURL)
	if err != nil || u.Scheme != "https" || s.tls == nil {
		return listener.Config{}, false
	}
	h := listener.Companion(s.mainLater(), u)
	addr, name, optional := hostOf(s.cfg.ListenAddr)+":"+cmp.Or(s.plainPort, "80"), "port 80", true
	if s.http01 != nil {
		h = s.http01(h)
		addr, name, optional = s.cfg.TLS.LetsEncryptListen, "tls_letsencrypt_listen", false
	}
	return listener.Config{Name: name, Addr: addr, Handler: h, Optional: optional, TrustedProxies: s.cfg.TrustedProxies}, true
}

// hostOf is the host part of a listen address, in brackets if it has to be.
func hostOf(addr string) string {
	i := strings.LastIndexByte(addr, ':')
	if i < 0 {
		return ""
	}
	return addr[:i]
}

func (s *server) api() http.Handler {
	return apiv1.New(apiv1.Config{
		Store: s.store, Tailnet: s.tailnet, Ledger: s.ledger, Replica: s.replica, Register: s.control.Register, Auth: s.checker, Pools: s.pools(), Instance: s.self.ID, Streams: s.control.Poll.Sessions.Load,
		PolicyMode: s.cfg.Policy.Mode, Reserved: s.reserved(), Calls: s.control.C2N, Log: s.log,
	})
}

// mainHandler is everything that clients and people reach.
func (s *server) mainHandler(api http.Handler) http.Handler {
	r := chi.NewRouter()
	s.control.Routes(r)
	if s.relay != nil {
		relay := s.relay.Handler()
		for _, path := range []string{"/derp", "/derp/probe", "/derp/latency-check", "/bootstrap-dns", "/generate_204"} {
			r.Handle(path, relay)
		}
	}
	r.Method(http.MethodPost, "/verify", s.verify())
	r.Handle("/api/*", api)
	rest := pages.New(pages.Config{
		Store: s.store, Tailnet: s.tailnet, Ledger: s.ledger, ServerURL: s.cfg.ServerURL, Build: build(), Checks: s.checks(), Log: s.log,
	})
	r.NotFound(rest.ServeHTTP)
	r.MethodNotAllowed(func(w http.ResponseWriter, req *http.Request) {
		for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost} {
			if r.Match(chi.NewRouteContext(), method, req.URL.Path) {
				w.Header().Add("Allow", method)
			}
		}
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
	})
	return r
}

// local is the handler of the unix socket: whoever can open it is an administrator.
func (s *server) local(api, debug http.Handler) http.Handler {
	rest := pages.New(pages.Config{Store: s.store, Tailnet: s.tailnet, Ledger: s.ledger, ServerURL: s.cfg.ServerURL, Build: build(), Checks: s.checks(), Log: s.log})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		uid := -1
		if u, ok := listener.PeerUID(r.Context()); ok {
			uid = int(u)
		}
		r = r.WithContext(auth.Local(r.Context(), uid))
		switch {
		case strings.HasPrefix(r.URL.Path, "/api/"):
			api.ServeHTTP(w, r)
			return
		case r.URL.Path == "/metrics", strings.HasPrefix(r.URL.Path, "/debug/"):
			debug.ServeHTTP(w, r)
			return
		}
		rest.ServeHTTP(w, r)
	})
}

// verify answers relays elsewhere that ask who is a member.
func (s *server) verify() http.Handler {
	sources := &derp.RelaySources{
		Map: func() *tailcfg.DERPMap { return s.replica.Current().DERPMap() }, Extra: s.cfg.DERP.Verify.Allow, LookupIP: s.lookupIP,
	}
	return derp.VerifyHandler(s.admit, sources.Allow, listener.ClientAddr)
}
