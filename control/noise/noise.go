// Package noise is the outer shell of the control protocol: it turns an HTTP
// request for /ts2021 into a Noise connection and serves HTTP/2 inside it.
//
// It owns the server's Noise private key, the handshakes, the connections and
// every limit that must hold before somebody is known. It knows no tailnet:
// Config.Known says whether a machine key has a node, Config.Handler answers
// what is asked inside, and Peer tells the handler who asks. A machine key
// proves nothing but itself, since anybody can make one up; the handler has to
// decide what that key may do.
//
// A connection, step by step:
//
//  1. POST /ts2021 with 101 bytes of handshake in X-Tailscale-Handshake, or a
//     WebSocket GET with the same in its query. Its shape is checked first.
//  2. The handshake waits its turn at the gate and is computed into memory.
//     Garbage, a replay for another server, a source that spends too many
//     unknown keys: all of them get a plain HTTP answer and cost no more.
//  3. The 101 answer and the Noise response leave in one write. The native
//     handler returns here, which frees net/http's part of the connection (12
//     of 72 KB), and HTTP/2 goes on with a context of its own. The WebSocket
//     handler stays until the end.
//  4. The first valid record proves that the peer holds the keys (message 1
//     could be a replay). From here on CloseMachine finds the connection.
//  5. Each request passes request.go: what an unknown key may ask, how large a
//     body may be, how long it may stall.
//
// The handshake (handshake.go) and the records after it (record.go) are our own
// since the library's cost twice the work and a system call for each record. A
// full HTTP/2 DATA frame is cut so that it makes exactly four records, and
// leaves in one system call.
//
// HTTP/2 is package h2's: an idle connection keeps no buffer.
package noise

import (
	"context"
	"crypto/ecdh"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control/limit"
)

// Config says what a Server is made of. PrivateKey and Handler are required.
type Config struct {
	// PrivateKey is the control server's Noise key. Clients pin its public
	// half as long as they run.
	PrivateKey key.MachinePrivate

	// Handler answers every request inside Noise that the limits let through.
	Handler http.Handler

	// Known reports whether a machine key has a node. It is called for each
	// handshake and each request, so it must be cheap and must not block.
	// Nil means that no key has one.
	Known func(key.MachinePublic) bool

	// Source tells the client's address from the outer request. Nil means
	// http.Request.RemoteAddr, which is wrong behind a proxy.
	Source func(*http.Request) netip.AddrPort

	// Identify returns a function that is called once, when the connection
	// that carries the request is known to belong to a node. May be nil.
	Identify func(*http.Request) func()

	// Overloaded reports that no work for unknown machine keys should be
	// accepted at the moment. Nil means: while the process uses more than
	// nine tenths of GOMEMLIMIT.
	Overloaded func() bool

	// MaxBody is the largest request body for a path and a machine key that
	// has a node. Nil means DefaultMaxBody.
	MaxBody func(path string) int64

	// MinVersion is the lowest tailcfg.CapabilityVersion that is served; 0
	// means 113 (Tailscale v1.80).
	MinVersion tailcfg.CapabilityVersion

	Limits Limits

	Log *slog.Logger     // nil means none
	Now func() time.Time // nil means time.Now
}

// Limits are the numbers that protect the server from strangers. A zero field
// means the default given with it.
type Limits struct {
	Handshakes     int           // handshakes computed at once: 2 x GOMAXPROCS
	HandshakeWait  time.Duration // how long one waits for its turn: 10 s
	HandshakeQueue int           // how many wait: 16,384
	Setup          time.Duration // from the answer to the HTTP/2 preface: 10 s

	// Handshakes of machine keys without a node, by source address.
	SourceRate  float64 // a second: 20
	SourceBurst float64 // at once: 200

	// Connections of machine keys without a node.
	StrangerRequests int           // requests answered at once: 8
	StrangerBody     int64         // bytes of a request body: 64 KiB
	StrangerIdle     time.Duration // without a request: 30 s
	StrangerLife     time.Duration // in all: 15 min

	// All connections.
	BodyStall     time.Duration // body without progress: 10 s
	WriteStall    time.Duration // write without progress: 30 s
	ControlFrames int           // RST_STREAM, PING, SETTINGS, PRIORITY in 10 s: 200
}

func (l Limits) withDefaults() Limits {
	def(&l.Handshakes, 2*runtime.GOMAXPROCS(0))
	def(&l.HandshakeWait, 10*time.Second)
	def(&l.HandshakeQueue, 16384)
	def(&l.Setup, 10*time.Second)
	def(&l.SourceRate, 20)
	def(&l.SourceBurst, 200)
	def(&l.StrangerRequests, 8)
	def(&l.StrangerBody, 64<<10)
	def(&l.StrangerIdle, 30*time.Second)
	def(&l.StrangerLife, 15*time.Minute)
	def(&l.BodyStall, 10*time.Second)
	def(&l.WriteStall, 30*time.Second)
	def(&l.ControlFrames, 200)
	return l
}

func def[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

// Conn says who is at the other end of a Noise connection.
type Conn struct {
	Machine key.MachinePublic // proven by the handshake
	Version int               // tailcfg.CapabilityVersion of the handshake
	Remote  netip.AddrPort    // as Config.Source saw it; port 0 when unknown
	ID      uint64            // unique in this process
}

type peerKey struct{}

// Peer returns the Noise connection that carries a request, from its context.
// It is false for requests that did not come through Noise.
func Peer(ctx context.Context) (Conn, bool) {
	c, ok := ctx.Value(peerKey{}).(*Conn)
	if !ok {
		return Conn{}, false
	}
	return *c, true
}

// WithPeer returns a context as requests inside Noise have it, for callers
// that answer such requests without a connection.
func WithPeer(ctx context.Context, c Conn) context.Context {
	return context.WithValue(ctx, peerKey{}, &c)
}

// Counts are totals since the start, but for Open and Waiting.
type Counts struct {
	Open       int64 // connections
	Waiting    int64 // handshakes at the gate
	Handshakes int64 // completed
	Malformed  int64 // refused: not a handshake for this server
	Limited    int64 // refused: source bucket empty, or overloaded
	Busy       int64 // refused: gate full or waited too long
	Flooded    int64 // connections closed for too many control frames
}

// Server accepts Noise connections. All methods may be called concurrently.
type Server struct {
	cfg     Config
	private *ecdh.PrivateKey // cfg.PrivateKey
	lim     Limits
	log     *slog.Logger
	keyJSON []byte

	gate    *semaphore.Weighted
	sources *limit.Table

	base context.Context // ends all connections
	stop context.CancelFunc

	lastID  atomic.Uint64
	waiting atomic.Int64
	counts  struct{ handshakes, malformed, limited, busy, flooded atomic.Int64 }

	// mu guards the following fields.
	mu       sync.Mutex
	live     map[*session]struct{}
	machines map[key.MachinePublic]*session // first of a list through session.next
	draining bool
	drained  chan struct{} // closed once draining and without connections
}

// New returns a server that is ready to be mounted. It starts nothing.
func New(cfg Config) (*Server, error) {
	if cfg.PrivateKey.IsZero() {
		return nil, errors.New("noise: no private key")
	}
	if cfg.Handler == nil {
		return nil, errors.New("noise: no handler")
	}
	if cfg.Known == nil {
		cfg.Known = func(key.MachinePublic) bool { return false }
	}
	if cfg.Source == nil {
		cfg.Source = func(r *http.Request) netip.AddrPort {
			a, _ := netip.ParseAddrPort(r.RemoteAddr)
			return a
		}
	}
	if cfg.MaxBody == nil {
		cfg.MaxBody = DefaultMaxBody
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Overloaded == nil {
		cfg.Overloaded = memoryTight(cfg.Now)
	}
	def(&cfg.MinVersion, 113)
	lim := cfg.Limits.withDefaults()

	keyJSON, err := json.Marshal(tailcfg.OverTLSPublicKeyResponse{PublicKey: cfg.PrivateKey.Public()})
	if err != nil {
		return nil, err
	}
	private, err := ecdh.X25519().NewPrivateKey(cfg.PrivateKey.UntypedBytes())
	if err != nil {
		return nil, err
	}
	s := &Server{
		cfg:      cfg,
		private:  private,
		lim:      lim,
		log:      cfg.Log,
		keyJSON:  keyJSON,
		gate:     semaphore.NewWeighted(int64(lim.Handshakes)),
		sources:  limit.New(lim.SourceRate, lim.SourceBurst),
		live:     make(map[*session]struct{}),
		machines: make(map[key.MachinePublic]*session),
		drained:  make(chan struct{}),
	}
	s.base, s.stop = context.WithCancel(context.Background())
	return s, nil
}

// PublicKey is the key that /key announces.
func (s *Server) PublicKey() key.MachinePublic { return s.cfg.PrivateKey.Public() }

// Counts returns the server's counters.
func (s *Server) Counts() Counts {
	s.mu.Lock()
	open := int64(len(s.live))
	s.mu.Unlock()
	return Counts{
		Open:       open,
		Waiting:    s.waiting.Load(),
		Handshakes: s.counts.handshakes.Load(),
		Malformed:  s.counts.malformed.Load(),
		Limited:    s.counts.limited.Load(),
		Busy:       s.counts.busy.Load(),
		Flooded:    s.counts.flooded.Load(),
	}
}

// ServeKey answers GET /key with tailcfg.OverTLSPublicKeyResponse. Clients ask
// before each registration; the v parameter changes nothing, and the legacy
// key stays zero, or they would stop asking.
func (s *Server) ServeKey(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Write(s.keyJSON)
}

// CloseMachine closes every connection of a machine key at once.
func (s *Server) CloseMachine(m key.MachinePublic) {
	s.mu.Lock()
	var close []*session
	for c := s.machines[m]; c != nil; c = c.next {
		close = append(close, c)
	}
	s.mu.Unlock()
	for _, c := range close {
		c.close()
	}
}

// Shutdown refuses new connections, sends GOAWAY on the open ones and waits
// for their requests to end. Long polls end only when their handlers do; what
// is left when ctx ends is cut off, and ctx's error returned.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.draining = true
	var proven, unproven []*session
	for c := range s.live {
		if c.listed {
			proven = append(proven, c)
		} else {
			unproven = append(unproven, c)
		}
	}
	s.checkDrained()
	s.mu.Unlock()
	for _, c := range unproven {
		c.close()
	}
	// Each may have to wait for a peer that does not read; closing the connection ends that.
	var told sync.WaitGroup
	defer told.Wait()
	for _, c := range proven {
		told.Go(c.h2.GoAway)
	}
	select {
	case <-s.drained:
		s.stop()
		return nil
	case <-ctx.Done():
	}
	s.stop()
	s.mu.Lock()
	rest := make([]*session, 0, len(s.live))
	for c := range s.live {
		rest = append(rest, c)
	}
	s.mu.Unlock()
	for _, c := range rest {
		c.close()
	}
	<-s.drained
	return ctx.Err()
}

// add takes in a connection whose handshake is done. It is false once the
// server drains.
func (s *Server) add(c *session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return false
	}
	s.live[c] = struct{}{}
	return true
}

// list makes a proven connection known by its machine key.
func (s *Server) list(c *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.live[c]; !ok || c.listed {
		return
	}
	c.listed = true
	c.next = s.machines[c.peer.Machine]
	s.machines[c.peer.Machine] = c
}

func (s *Server) remove(c *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.live, c)
	if c.listed {
		s.unlist(c)
	}
	// A map keeps the size of its busiest moment; after a storm of strangers
	// the empty one is exchanged.
	if len(s.live) == 0 {
		s.live = make(map[*session]struct{})
		s.machines = make(map[key.MachinePublic]*session)
	}
	s.checkDrained()
}

func (s *Server) unlist(c *session) {
	m := c.peer.Machine
	if s.machines[m] == c {
		if c.next == nil {
			delete(s.machines, m)
		} else {
			s.machines[m] = c.next
		}
		return
	}
	for p := s.machines[m]; p != nil; p = p.next {
		if p.next == c {
			p.next = c.next
			return
		}
	}
}

// checkDrained is called with mu held.
func (s *Server) checkDrained() {
	if !s.draining || len(s.live) > 0 {
		return
	}
	select {
	case <-s.drained:
	default:
		close(s.drained)
	}
}
