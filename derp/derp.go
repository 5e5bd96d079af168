// Package derp runs the embedded relay: the DERP server that nodes fall back
// to when no direct path exists, the STUN responders that tell them how their
// NAT looks, and the DERP map that points them to both.
//
// A Server owns its sockets: an optional TLS listener of its own (stock
// clients speak only TLS to a relay, so a control server reachable over plain
// HTTP needs one, with a certificate pinned in the map) and two STUN ports (a
// client tells a hard NAT by asking two). When the control server itself
// speaks TLS, Server.Handler is mounted on its main listener instead.
//
// The package knows no tailnet. Who may relay is decided by Config.Admit,
// asked once per connection after the client has proved its key; whoever
// changes that answer calls Server.Revoke afterwards. Loader merges the
// embedded region with regions from files and URLs.
//
// A connection, in order: TLS handshake, GET /derp with Upgrade, the server's
// key frame, the client's frame with its key (the connection is filed under
// that key from here on, so Revoke finds it), proof of the key, Admit, relay.
// Filing before asking makes the order of Admit and Revoke harmless: whichever
// comes last ends the connection.
//
// It never opens an outbound connection by itself; only a Loader with URLs and
// the resolver behind /bootstrap-dns do.
package derp

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"tailscale.com/derp/derpserver"
	"tailscale.com/types/key"
)

// Names of the configuration keys, as errors of Listen call them.
const (
	keyListen     = "derp.server.listen_addr"
	keySTUN       = "derp.server.stun_listen_addr"
	keySTUNSecond = "derp.server.stun_second_listen_addr"
)

// Config says what a Server serves and where. The zero Config is a relay
// without sockets and with a fresh key that admits nobody.
type Config struct {
	// PrivateKey is the relay's own key. Clients do not pin it, but peers of
	// a mesh would; zero means a new one for this process.
	PrivateKey key.NodePrivate

	// Admit reports whether a node may relay. It is called after the client
	// has proved that it holds the key, must not block, and may be called
	// from many goroutines. Nil admits nobody.
	Admit func(key.NodePublic) bool

	// RegionID is tailcfg.DERPRegion.RegionID, at least 900 (lower ones are
	// Tailscale's own). Zero means 999.
	RegionID int
	// Instance tells apart the relays of one region, whose nodes need names of
	// their own. Zero for the only one.
	Instance int64
	// MeshKey joins the relays of one region: 64 hex digits, the same for all.
	// Empty means that this relay forwards to no other and lets no other
	// watch it.
	MeshKey string

	// RegionCode is tailcfg.DERPRegion.RegionCode. Empty means "signalbox".
	RegionCode string
	// RegionName is tailcfg.DERPRegion.RegionName. Empty means "Signalbox".
	RegionName string

	// HostName is what clients dial and name in the TLS handshake: a DNS name
	// or an IP literal. Empty means 127.0.0.1.
	HostName string
	// IPv4 and IPv6 are published so that clients need no DNS. The zero
	// address publishes nothing for a DNS name; for an IP literal the literal
	// stands in its own family and the other family is switched off.
	IPv4, IPv6 netip.Addr

	// TLSListen is the TCP address of the relay's own TLS listener. Empty
	// means none: the relay is then reached by Handler at PublicPort.
	TLSListen string
	// CertPEM and KeyPEM are the pair that TLSListen presents and the map
	// pins; exactly one certificate, for HostName. Both empty means a new
	// pair for this process, which changes the pin at each start.
	CertPEM, KeyPEM []byte
	// PublicPort is the port of the main HTTPS listener, published when
	// TLSListen is empty. Zero means 443.
	PublicPort int
	// CanPort80 is tailcfg.DERPNode.CanPort80: whether /generate_204 is
	// reachable on port 80 of HostName, for captive portal checks.
	CanPort80 bool

	// STUNListen and STUNSecondListen are UDP addresses. An empty STUNListen
	// switches STUN off in the map, an empty STUNSecondListen only the second
	// port.
	STUNListen, STUNSecondListen string

	// BootstrapHosts are the names besides HostName that /bootstrap-dns
	// answers: the host of the control server. IP literals are ignored.
	BootstrapHosts []string
	// LookupIP resolves them. Nil means the system's resolver.
	LookupIP func(ctx context.Context, host string) ([]netip.Addr, error)

	// Source tells the client's address of a request to Handler, for servers
	// behind a trusted proxy. Nil means the connection's remote address.
	Source func(*http.Request) netip.AddrPort

	// ClientRate and ClientBurst bound what one client may send, in bytes a
	// second and bytes. A client above it is slowed down, not cut off. Zero
	// ClientRate means no bound.
	ClientRate, ClientBurst uint64

	// OnDuplicate is called when a key gets a second admitted connection
	// while the first is open: a client that just reconnected, or a cloned
	// node. It must not block. Nil means that only the counter moves.
	OnDuplicate func(Duplicate)
	// Identified is called with the upgrade request of a connection whose key
	// was admitted, for listeners that treat unidentified connections worse.
	// It must not block. Nil means nobody cares.
	Identified func(*http.Request)
	// WrapListener and ConnContext let the owner count and limit connections
	// of the own TLS listener: WrapListener sees the TCP listener before TLS,
	// ConnContext is that of http.Server. Nil leaves them as they are.
	WrapListener func(net.Listener) net.Listener
	ConnContext  func(ctx context.Context, c net.Conn) context.Context

	// Now is the clock of limits and caches. Nil means time.Now.
	Now func() time.Time
	// Log receives one line per event that an operator acts on. Nil discards.
	Log *slog.Logger
}

// Duplicate tells of one node key on more than one admitted connection.
type Duplicate struct {
	Key         key.NodePublic
	Connections int            // admitted connections of Key, the new one included
	New, Old    netip.AddrPort // the newcomer and the latest of the others
}

// Server is the embedded relay. Methods may be called from any goroutine.
type Server struct {
	cfg     Config
	relay   *derpserver.Server
	cert    *tls.Certificate // of the own TLS listener; nil without one
	pin     string           // CertName of cert; empty without one
	sources *sourceTable
	stun    *stunResponder
	names   *bootstrap
	stats   counters

	// metaOnMain is set when the main listener presents the meta certificate.
	metaOnMain onceFlag

	mu     sync.Mutex // guards the following fields
	closed bool
	tlsLn  net.Listener
	stunPC [2]*net.UDPConn
	conns  map[*conn]struct{}                    // every relay connection
	byKey  map[key.NodePublic]map[*conn]struct{} // by claimed key, admitted or not

	// serving counts conns; Add only under mu and while not closed.
	serving sync.WaitGroup
}

// New checks cfg and makes a Server. It opens nothing.
func New(cfg Config) (*Server, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	if err := registerAdmission(); err != nil {
		return nil, err
	}
	s := &Server{
		cfg:     cfg,
		sources: newSourceTable(),
		conns:   map[*conn]struct{}{},
		byKey:   map[key.NodePublic]map[*conn]struct{}{},
	}
	if cfg.TLSListen != "" {
		var err error
		if s.cert, s.pin, err = pinnedPair(cfg); err != nil {
			return nil, err
		}
	}
	s.stun = newSTUNResponder(cfg.Now)
	s.names = newBootstrap(cfg)
	s.relay = derpserver.New(cfg.PrivateKey, func(format string, args ...any) {
		cfg.Log.Debug("relay", "msg", fmt.Sprintf(format, args...))
	})
	s.relay.SetVerifyClientURL(admissionURL)
	if cfg.MeshKey != "" {
		if err := s.relay.SetMeshKey(cfg.MeshKey); err != nil {
			return nil, fmt.Errorf("mesh key: %w", err)
		}
	}
	s.relay.UpdateRateLimits(derpserver.RateConfig{
		PerClientRateLimitBytesPerSec: cfg.ClientRate,
		PerClientRateBurstBytes:       cfg.ClientBurst,
	})
	return s, nil
}

// fill puts defaults in place and refuses what clients would choke on.
func (c *Config) fill() error {
	if c.PrivateKey.IsZero() {
		c.PrivateKey = key.NewNode()
	}
	c.RegionID = cmp.Or(c.RegionID, 999)
	c.RegionCode = cmp.Or(c.RegionCode, "signalbox")
	c.RegionName = cmp.Or(c.RegionName, "Signalbox")
	c.HostName = cmp.Or(strings.TrimSuffix(c.HostName, "."), "127.0.0.1")
	if c.RegionID < 900 {
		return fmt.Errorf("derp.server.region_id: %d is below 900, which is Tailscale's own range", c.RegionID)
	}
	if err := CheckHostName(c.HostName); err != nil {
		return fmt.Errorf("relay host name: %w", err)
	}
	if c.IPv4.IsValid() && !c.IPv4.Is4() {
		return fmt.Errorf("derp.server.ipv4: %v is not an IPv4 address", c.IPv4)
	}
	if c.IPv6.IsValid() && (!c.IPv6.Is6() || c.IPv6.Is4In6() || c.IPv6.Zone() != "") {
		return fmt.Errorf("derp.server.ipv6: %v is not an IPv6 address", c.IPv6)
	}
	if c.PublicPort < 0 || c.PublicPort > 65535 {
		return fmt.Errorf("public port %d is out of range", c.PublicPort)
	}
	if c.STUNSecondListen != "" && c.STUNListen == "" {
		return fmt.Errorf("%s is set without %s", keySTUNSecond, keySTUN)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Source == nil {
		c.Source = remoteAddr
	}
	return nil
}

// Listen binds every configured socket, so that Region names the real ports.
// On an error, which names the configuration key of the address, nothing stays
// bound.
func (s *Server) Listen() (err error) {
	defer func() {
		if err != nil {
			s.closeSockets()
		}
	}()
	if s.cfg.TLSListen != "" {
		lc := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{
			Enable: true, Idle: 30 * time.Second, Interval: 30 * time.Second, Count: 3,
		}}
		ln, err := lc.Listen(context.Background(), "tcp", s.cfg.TLSListen)
		if err != nil {
			return fmt.Errorf("%s: %w", keyListen, err)
		}
		s.mu.Lock()
		s.tlsLn = ln
		s.mu.Unlock()
	}
	for i, l := range []struct{ key, addr string }{
		{keySTUN, s.cfg.STUNListen},
		{keySTUNSecond, s.cfg.STUNSecondListen},
	} {
		if l.addr == "" {
			continue
		}
		pc, err := listenUDP(l.addr)
		if err != nil {
			return fmt.Errorf("%s: %w", l.key, err)
		}
		s.mu.Lock()
		s.stunPC[i] = pc
		s.mu.Unlock()
	}
	return nil
}

// Run serves what Listen bound until ctx ends, then closes every connection
// and waits for their goroutines. It returns nil when ctx ended it.
func (s *Server) Run(ctx context.Context) error {
	s.mu.Lock()
	ln, pcs := s.tlsLn, s.stunPC
	s.mu.Unlock()

	g, gctx := errgroup.WithContext(ctx)
	var srv *http.Server
	if ln != nil {
		srv = s.httpServer()
		if s.cfg.WrapListener != nil {
			ln = s.cfg.WrapListener(ln)
		}
		g.Go(func() error {
			err := srv.Serve(tls.NewListener(ln, s.tlsConfig()))
			if gctx.Err() != nil || errors.Is(err, http.ErrServerClosed) {
				return nil
			}
			return fmt.Errorf("%s: %w", keyListen, err)
		})
	}
	for i, pc := range pcs {
		if pc == nil {
			continue
		}
		g.Go(func() error {
			err := s.stun.serve(pc)
			if gctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("%s: %w", [2]string{keySTUN, keySTUNSecond}[i], err)
		})
	}
	g.Go(func() error {
		<-gctx.Done()
		if srv != nil {
			srv.Close() // idle and half-read requests; hijacked ones are ours
		}
		s.Close()
		return nil
	})
	return g.Wait()
}

// Close ends every connection, waits for their handlers and releases the
// sockets. It may be called more than once.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	conns := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	s.closeSockets()
	for _, c := range conns {
		c.Close()
	}
	s.serving.Wait()
	s.relay.Close()
}

func (s *Server) closeSockets() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tlsLn != nil {
		s.tlsLn.Close()
	}
	for _, pc := range s.stunPC {
		if pc != nil {
			pc.Close()
		}
	}
}

// PublicKey is the relay's public key.
func (s *Server) PublicKey() key.NodePublic { return s.relay.PublicKey() }
