// Package poll serves /machine/map: the stream of map responses that every client holds open, and the short requests by which it reports
// on itself.
//
// A stream is a Session, and a Session is a cursor: the snapshot that the client was last brought to. When something is announced, the
// session asks netmap for what lies between that snapshot and the current one, writes it and moves on. It has no queue: a reader that is
// slow, or stuck, is brought from its old snapshot straight to the newest one later, and nobody waits for it.
//
// The package is the only one that writes to a client's stream. It decides nothing about what a client may see.
package poll

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control/limit"
	"github.com/signalbox-net/signalbox/control/netmap"
	"github.com/signalbox-net/signalbox/control/noise"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// MinVersion is the oldest client that is served: 1.80.
const MinVersion tailcfg.CapabilityVersion = 113

// Config configures a Server.
type Config struct {
	Store   *db.Store        // required: tombstones are looked up there
	Replica *tailnet.Replica // required
	Ledger  *tailnet.Ledger  // required
	Log     *slog.Logger     // nil discards
	Now     func() time.Time // nil means time.Now

	// KeepAlive is the time between KeepAlive frames on a quiet stream; 0 means 50 s. Clients give up after 120 s. Up to a fifth is added
	// at random.
	KeepAlive time.Duration
	// Grace is how long after the end of a node's last stream its peers are told that it is offline; 0 means 2 s.
	Grace time.Duration
	// Stall is how long a write may make no progress before its stream is dropped; 0 means 30 s.
	Stall time.Duration
	// InFlight bounds the bytes of full maps being made and handed over at one time; 0 means 16 MiB. More does not make a storm shorter, since
	// the processor is what it waits for, but lets the maps crowd out the handshakes of those who have none yet.
	InFlight int64
}

// A Server holds the sessions of one server.
type Server struct {
	cfg  Config
	log  *slog.Logger
	gate *semaphore.Weighted // bytes of full maps in flight
	gone *limit.Table        // looks for the tombstone of a pair of machine and node key
	late *limit.Table        // looks for news of a pair that is not known
	Stats

	mu    sync.Mutex // guards the following fields
	nodes map[tailcfg.NodeID]*attendance
	down  bool // the server is stopping: streams end without the nodes going offline
}

// Stats are counters of a Server; they only grow, but for Sessions, Waiting and InFlight.
type Stats struct {
	Sessions  atomic.Int64 // open streams
	Waiting   atomic.Int64 // sessions that wait to send their full map
	InFlight  atomic.Int64 // bytes of full maps, as estimated, that have passed the gate; see Config.InFlight
	FullMaps  atomic.Int64
	Deltas    atomic.Int64
	Bytes     atomic.Int64
	Stalled   atomic.Int64 // streams dropped because the reader made no progress
	Replaced  atomic.Int64 // streams ended by a newer one of the same node
	Updates   atomic.Int64 // reports taken
	Farewells atomic.Int64
}

// Room is the bound of Stats.InFlight.
func (s *Server) Room() int64 { return s.cfg.InFlight }

// attendance is what the server remembers of a node while it has a stream or had one a moment ago.
type attendance struct {
	session  *Session
	onlooker *Session // a read-only stream, of which there may be one more
	leave    *time.Timer
	reports  *rate.Limiter
	waiting  *report // the report that waits for the limiter; newer words take its place
	once     bool    // a map without a stream is being sent
}

// A report waits for its turn. update is guarded by Server.mu until it is handed to the ledger; err is valid once done is closed.
type report struct {
	update tailnet.Update
	done   chan struct{}
	err    error
}

// stream is where x has its place.
func (a *attendance) stream(x *Session) **Session {
	if x.readOnly {
		return &a.onlooker
	}
	return &a.session
}

// New returns a Server. It starts nothing.
func New(cfg Config) *Server {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.KeepAlive == 0 {
		cfg.KeepAlive = 50 * time.Second
	}
	if cfg.Grace == 0 {
		cfg.Grace = 2 * time.Second
	}
	if cfg.Stall == 0 {
		cfg.Stall = 30 * time.Second
	}
	if cfg.InFlight == 0 {
		cfg.InFlight = 16 << 20
	}
	s := &Server{cfg: cfg, log: cfg.Log, gate: semaphore.NewWeighted(cfg.InFlight), nodes: map[tailcfg.NodeID]*attendance{}, gone: limit.New(1/farewellEvery.Seconds(), 1), late: limit.New(0.1, 2)}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s
}

// maxBody is the largest map request that is read.
const maxBody = 1 << 20

// unknown is the one answer for a node that does not exist, is somebody else's or was deleted, so that it tells nothing.
const unknown = "node not found"

// ServeHTTP serves POST /machine/map.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	conn, ok := noise.Peer(r.Context())
	if !ok {
		http.Error(w, "not a Noise connection", http.StatusBadRequest)
		return
	}
	req := new(tailcfg.MapRequest)
	if err := decode(w, r, req); err != nil {
		return
	}
	if req.Version < MinVersion {
		http.Error(w, "this client is too old: 1.80 or newer is needed", http.StatusBadRequest)
		return
	}
	snap := s.cfg.Replica.Current()
	n := snap.ByNodeKey(req.NodeKey)
	if n == nil && s.late.Allow(limit.Bytes(req.NodeKey.AppendTo(conn.Machine.UntypedBytes())), s.cfg.Now()) {
		// It may have joined at another server a moment ago.
		var err error
		if snap, err = s.cfg.Replica.CatchUp(r.Context()); err != nil {
			w.Header().Set("Retry-After", "2")
			http.Error(w, "the database is not available", http.StatusServiceUnavailable)
			return
		}
		n = snap.ByNodeKey(req.NodeKey)
	}
	if n == nil || n.MachineKey != conn.Machine {
		s.serveUnknown(w, r, conn.Machine, req)
		return
	}
	switch {
	case req.Stream:
		s.serveStream(w, r, n, req)
	case req.OmitPeers:
		s.serveReport(w, r, n, req)
	default:
		s.serveOnce(w, r, n, req)
	}
}

// decode reads the request to its end: what is left unread would be kept in memory as long as the stream.
func decode(w http.ResponseWriter, r *http.Request, req *tailcfg.MapRequest) error {
	body := http.MaxBytesReader(w, r.Body, maxBody)
	err := json.NewDecoder(body).Decode(req)
	if err == nil {
		_, err = io.Copy(io.Discard, body)
	}
	if err == nil {
		return nil
	}
	if tooBig := (*http.MaxBytesError)(nil); errors.As(err, &tooBig) {
		http.Error(w, "map request is larger than 1 MiB", http.StatusRequestEntityTooLarge)
	} else {
		http.Error(w, "map request is not valid JSON", http.StatusBadRequest)
	}
	return err
}

// farewellEvery is the least time between two farewells to one pair of keys.
const farewellEvery = time.Minute

// serveUnknown tells the client of a deleted node that it is no longer a member, so that it asks its user to log in; all others get 401.
func (s *Server) serveUnknown(w http.ResponseWriter, r *http.Request, m key.MachinePublic, req *tailcfg.MapRequest) {
	if !req.Stream || !s.mayAsk(m, req.NodeKey) {
		http.Error(w, unknown, http.StatusUnauthorized)
		return
	}
	var t *db.Tombstone
	err := s.cfg.Store.View(r.Context(), func(rd *db.Reader) error {
		var err error
		t, err = rd.In(s.cfg.Ledger.Tailnet()).Tombstone(m, req.NodeKey)
		return err
	})
	if err != nil {
		if errors.Is(err, db.ErrUnavailable) {
			w.Header().Set("Retry-After", "5")
			http.Error(w, "the database is not available", http.StatusServiceUnavailable)
			return
		}
		http.Error(w, unknown, http.StatusUnauthorized)
		return
	}
	snap := s.cfg.Replica.Current()
	settings := snap.Settings()
	gone := &tailnet.Node{FQDN: t.Name + "." + settings.Suffix(), Node: &db.Node{
		ID: t.Node, StableID: t.StableID, MachineKey: m, NodeKey: req.NodeKey, Tags: []string{"tag:deleted"},
	}}
	s.Farewells.Add(1)
	raw := req.Compress == ""
	_, _ = w.Write(netmap.KeepAliveWire(raw))
	_, _ = w.Write(netmap.Wire(netmap.Farewell(gone, settings.DNS.BaseDomain, snap.DERPMap()), raw))
}

// mayAsk admits one look for a tombstone a minute and pair of keys, and so bounds what strangers can make the database do.
func (s *Server) mayAsk(m key.MachinePublic, n key.NodePublic) bool {
	return s.gone.Allow(pairKey(m, n), s.cfg.Now())
}

// FarewellDue reports whether the next map request of a pair of keys would be answered with a farewell, if its node was deleted.
func (s *Server) FarewellDue(m key.MachinePublic, n key.NodePublic) bool {
	return !s.gone.Empty(pairKey(m, n), s.cfg.Now())
}

func pairKey(m key.MachinePublic, n key.NodePublic) limit.Key {
	return limit.Bytes(n.AppendTo(m.UntypedBytes()))
}

// serveReport takes what a client says of itself. Its answer is empty, and sent after the report is on disk.
func (s *Server) serveReport(w http.ResponseWriter, r *http.Request, n *tailnet.Node, req *tailcfg.MapRequest) {
	if !req.ReadOnly {
		if err := s.report(r.Context(), n, req); err != nil {
			if r.Context().Err() == nil {
				w.Header().Set("Retry-After", "2")
				http.Error(w, "the report could not be stored", http.StatusServiceUnavailable)
			}
			return
		}
	}
	w.WriteHeader(http.StatusOK)
}

// report stores what a client says. One that talks too much is slowed down: of what it says while a report waits for its turn, the newest is
// kept, and all that asked get the same answer.
func (s *Server) report(ctx context.Context, n *tailnet.Node, req *tailcfg.MapRequest) error {
	s.Updates.Add(1)
	u := tailnet.Update{
		DiscoKey: req.DiscoKey, Endpoints: tailnet.CleanEndpoints(req.Endpoints, req.EndpointTypes),
		Hostinfo: tailnet.CleanHostinfo(req.Hostinfo), Cap: req.Version,
	}
	if u.Hostinfo != nil && u.Hostinfo.NetInfo != nil {
		u.HomeDERP = u.Hostinfo.NetInfo.PreferredDERP
	}
	s.mu.Lock()
	a := s.attend(n.ID)
	if a.waiting == nil && a.reports.Allow() {
		stored := s.cfg.Ledger.Report(n.ID, u) // under the lock: the ledger keeps the one that comes last
		s.mu.Unlock()
		return stored(ctx)
	}
	p := a.waiting
	if p == nil {
		p = &report{done: make(chan struct{})}
		a.waiting = p
		time.AfterFunc(a.reports.Reserve().Delay(), func() { s.hand(n.ID, a, p) })
	}
	p.update = u.After(&p.update)
	s.mu.Unlock()
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// hand gives a report that has waited to the ledger.
func (s *Server) hand(id tailcfg.NodeID, a *attendance, p *report) {
	s.mu.Lock()
	a.waiting = nil
	stored := s.cfg.Ledger.Report(id, p.update)
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), handIn)
	defer cancel()
	p.err = stored(ctx)
	close(p.done)
}

// handIn bounds the wait for a report's commit.
const handIn = 30 * time.Second

// Reports a node may make: a second, and at once.
const (
	reportRate  = 5
	reportBurst = 20
)

// attend finds or makes the attendance of a node. s.mu is held.
func (s *Server) attend(id tailcfg.NodeID) *attendance {
	a := s.nodes[id]
	if a == nil {
		a = &attendance{reports: rate.NewLimiter(reportRate, reportBurst)}
		s.nodes[id] = a
	}
	return a
}

// serveOnce answers tools that want one map and no stream. It touches no state.
func (s *Server) serveOnce(w http.ResponseWriter, r *http.Request, n *tailnet.Node, req *tailcfg.MapRequest) {
	if !s.enterOnce(n.ID) {
		w.Header().Set("Retry-After", "1")
		http.Error(w, "a map of this node is under way", http.StatusTooManyRequests)
		return
	}
	defer s.leaveOnce(n.ID)
	leave, err := s.admit(r.Context())
	if err != nil {
		return
	}
	defer leave()
	raw := req.Compress == ""
	snap := s.cfg.Replica.Current()
	if n = snap.Node(n.ID); n == nil {
		http.Error(w, unknown, http.StatusUnauthorized)
		return
	}
	ctl := http.NewResponseController(w)
	for b := range netmap.Pieces(netmap.Full(snap, netmap.Viewer{Slot: n.Slot, Raw: raw, Now: s.cfg.Now()}), raw) {
		for piece := range slices.Chunk(b, pieceSize) {
			// A reader that takes nothing for this long must not keep the map.
			_ = ctl.SetWriteDeadline(time.Now().Add(s.cfg.Stall))
			if _, err := w.Write(piece); err != nil {
				return
			}
		}
	}
	_ = ctl.Flush() // the node's place is taken until its reader has taken all
}

// enterOnce takes a node's one place for maps without a stream.
func (s *Server) enterOnce(id tailcfg.NodeID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.attend(id)
	if a.once {
		return false
	}
	a.once = true
	return true
}

func (s *Server) leaveOnce(id tailcfg.NodeID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.attend(id).once = false
}
