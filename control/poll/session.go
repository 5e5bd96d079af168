package poll

import (
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control/netmap"
	"github.com/signalbox-net/signalbox/control/tailnet"
)

// A Session is one open stream.
type Session struct {
	srv     *Server
	node    tailcfg.NodeID
	key     key.NodePublic // as the client knows itself; another key of the node means that this stream is over
	raw     bool
	host    string // by which the client calls this server
	words   chan Word
	w       http.ResponseWriter
	ctl     *http.ResponseController
	cancel  context.CancelCauseFunc
	Started time.Time

	readOnly bool // a tool looks on: the node is not online by it

	at      *tailnet.Snapshot // what the client was last brought to; owned by run
	rev     atomic.Int64      // revision of at
	told    atomic.Bool       // the first map was handed over
	busy    atomic.Int64      // unix nanoseconds at which the write under way last made progress; 0 when none is
	written atomic.Int64      // bytes
	stalled atomic.Bool       // dropped for its reader

	mu   sync.Mutex // guards the following field
	over bool       // the handler returns: w and ctl must not be touched any more
}

// abort ends x also while a write waits for the reader's windows, which its context does not reach. One that waits for the connection itself ends
// with it, when the time for that (noise.Limits.WriteStall) is up.
func (x *Session) abort(cause error) {
	x.cancel(cause)
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.over {
		_ = x.ctl.SetWriteDeadline(time.Unix(1, 0))
	}
}

func (x *Session) finish() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.over = true
}

var (
	errReplaced = errors.New("a newer stream of the same node began")
	errStopping = errors.New("the server is stopping")
	errStalled  = errors.New("the reader makes no progress")
	errMoved    = errors.New("the node was deleted or has another key")
)

func (s *Server) serveStream(w http.ResponseWriter, r *http.Request, n *tailnet.Node, req *tailcfg.MapRequest) {
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	x := &Session{
		srv: s, node: n.ID, key: req.NodeKey, raw: req.Compress == "", w: w, ctl: http.NewResponseController(w), cancel: cancel, Started: s.cfg.Now(),
		readOnly: req.ReadOnly, host: r.Host, words: make(chan Word, maxWords),
	}
	defer x.finish()
	// Content-Length and sniffing would make net/http hold the first bytes back.
	w.Header().Set("Content-Type", "application/octet-stream")
	if !s.enter(x) {
		w.Header().Set("Retry-After", "1")
		http.Error(w, errStopping.Error(), http.StatusServiceUnavailable)
		return
	}
	defer s.leave(x)
	if !x.readOnly {
		s.fill(n, req)
	}
	err := x.run(ctx)
	if cause := context.Cause(ctx); cause != nil && err == nil {
		err = cause
	}
	s.log.Debug("stream ended", "node", n.ID, "err", err)
}

// fill takes what the server lacks from the stream's own request, which otherwise changes nothing: after a restore of an old database a
// client would not say it again.
func (s *Server) fill(n *tailnet.Node, req *tailcfg.MapRequest) {
	if !n.State.DiscoKey.IsZero() || req.DiscoKey.IsZero() {
		return
	}
	u := tailnet.Update{
		Fill: true, DiscoKey: req.DiscoKey, Cap: req.Version, Hostinfo: tailnet.CleanHostinfo(req.Hostinfo),
		Endpoints: tailnet.CleanEndpoints(req.Endpoints, req.EndpointTypes),
	}
	if u.Hostinfo != nil && u.Hostinfo.NetInfo != nil {
		u.HomeDERP = u.Hostinfo.NetInfo.PreferredDERP
	}
	s.cfg.Ledger.Report(n.ID, u)
}

// replacedAfter is how long a stream that a newer one replaced has to end by itself.
const replacedAfter = time.Second

// enter makes x the stream of its node; an older one ends.
func (s *Server) enter(x *Session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return false
	}
	a := s.attend(x.node)
	place := a.stream(x)
	if old := *place; old != nil {
		s.Replaced.Add(1)
		old.cancel(errReplaced)
		time.AfterFunc(replacedAfter, func() { old.abort(errReplaced) })
	}
	*place = x
	s.Sessions.Add(1)
	if x.readOnly {
		return true
	}
	if a.leave != nil {
		a.leave.Stop()
		a.leave = nil
	}
	s.cfg.Ledger.Attach(x.node, s.cfg.Now())
	return true
}

// leave begins the grace after which the node is offline, unless a newer stream has taken over. When the server itself stops nobody goes
// offline: the clients come back to it.
func (s *Server) leave(x *Session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Sessions.Add(-1)
	a := s.nodes[x.node]
	if a == nil || *a.stream(x) != x {
		return
	}
	*a.stream(x) = nil
	if s.down || x.readOnly {
		return
	}
	ended := s.cfg.Now()
	var t *time.Timer
	t = time.AfterFunc(s.cfg.Grace, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.down || a.leave != t {
			return
		}
		a.leave = nil
		s.cfg.Ledger.Detach(x.node, ended)
	})
	a.leave = t
}

// Attached reports whether the node has a stream here, or had one a moment ago.
func (s *Server) Attached(id tailcfg.NodeID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.nodes[id]
	return a != nil && (a.session != nil || a.leave != nil)
}

// Run watches for stalled readers until ctx ends, and then ends all streams.
func (s *Server) Run(ctx context.Context) error {
	t := time.NewTicker(s.cfg.Stall / 6)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			s.stop()
			return nil
		case now := <-t.C:
			s.watch(now)
		}
	}
}

// watch drops stalled readers and forgets the nodes that have been quiet.
func (s *Server) watch(now time.Time) {
	for _, x := range s.streams() {
		if busy := x.busy.Load(); busy != 0 && now.UnixNano()-busy > int64(s.cfg.Stall) {
			if !x.stalled.Swap(true) {
				s.Stalled.Add(1)
			}
			x.abort(errStalled)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, a := range s.nodes {
		if a.session == nil && a.onlooker == nil && a.leave == nil && a.waiting == nil && !a.once && a.reports.TokensAt(now) >= reportBurst {
			delete(s.nodes, id)
		}
	}
}

// streams are all open streams that no newer one replaced, read-only ones included.
func (s *Server) streams() []*Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*Session
	for _, a := range s.nodes {
		for _, x := range []*Session{a.session, a.onlooker} {
			if x != nil {
				out = append(out, x)
			}
		}
	}
	return out
}

func (s *Server) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = true
	for _, a := range s.nodes {
		if a.leave != nil {
			a.leave.Stop()
		}
		for _, x := range []*Session{a.session, a.onlooker} {
			if x != nil {
				x.cancel(errStopping)
			}
		}
	}
}

// List is the sessions that are open now, in no order.
func (s *Server) List() []*Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*Session, 0, len(s.nodes))
	for _, a := range s.nodes {
		if a.session != nil {
			out = append(out, a.session)
		}
	}
	return out
}

// Node is the node whose stream it is.
func (x *Session) Node() tailcfg.NodeID { return x.node }

// Revision is the last revision that the client was brought to; 0 before its first map.
func (x *Session) Revision() int64 { return x.rev.Load() }

// Written is the number of bytes written to the stream.
func (x *Session) Written() int64 { return x.written.Load() }

// run is the life of a session: a KeepAlive, everything, and then whatever changes.
func (x *Session) run(ctx context.Context) error {
	// The KeepAlive is first so that a client that waits its turn in a storm does not give up, and because a client that meets its first
	// KeepAlive after a big map mistakes later messages of equal length for it.
	if err := x.keepAlive(); err != nil {
		return err
	}
	if err := x.full(ctx); err != nil {
		return err
	}
	x.told.Store(true)
	alive := time.NewTimer(x.pause())
	defer alive.Stop()
	rep := x.srv.cfg.Replica
	for {
		told, news := rep.News()
		sent, over, err := x.advance(told)
		if err != nil || over {
			return err
		}
		if sent {
			alive.Reset(x.pause())
		}
		select {
		case <-news:
		case word := <-x.words:
			if p := word(x.host); p != nil {
				if err := x.write(netmap.Pieces(netmap.Ping(p), x.raw)); err != nil {
					return err
				}
				alive.Reset(x.pause())
			}
		case <-alive.C:
			if err := x.keepAlive(); err != nil {
				return err
			}
			alive.Reset(x.pause())
		case <-ctx.Done():
			return nil
		}
	}
}

// maxWords is how many pings wait for one stream to say them. There are more only when its reader makes no progress.
const maxWords = 8

// A Word makes a ping request in the moment in which the stream says it; nil when nobody waits for the answer any more. authority is the host
// by which the client calls this server: a client reaches it through the connection that it has, at another one it may reach nothing.
type Word = func(authority string) *tailcfg.PingRequest

// Say has the stream of a node say word, after its first map. held is whether the node has a stream here, said whether that has taken the word:
// one that cannot keep up takes no more than a few.
func (s *Server) Say(id tailcfg.NodeID, word Word) (held, said bool) {
	s.mu.Lock()
	a := s.nodes[id]
	var x *Session
	if a != nil {
		x = a.session
	}
	s.mu.Unlock()
	if x == nil {
		return false, false
	}
	select {
	case x.words <- word:
		return true, true
	default:
		return true, false
	}
}

// Told reports whether the node has a stream here that has taken its first map.
func (s *Server) Told(id tailcfg.NodeID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.nodes[id]
	return a != nil && a.session != nil && a.session.told.Load()
}

// pause is the time to the next KeepAlive, every for a quiet stream and up to a fifth more. Streams wait for moments that are the same for many of
// them: a process that wakes for each stream by itself spends as much on waking as on writing.
func pause(now time.Time, every time.Duration) time.Duration {
	grid := max(every/50, 1)
	return now.Add(every + rand.N(max(every/5-grid, 1)) + grid).Truncate(grid).Sub(now)
}

// pause is the time to the stream's next KeepAlive.
func (x *Session) pause() time.Duration { return pause(time.Now(), x.srv.cfg.KeepAlive) }

// bytesPerPeer is what a peer adds to a full map, for the gate's estimate.
const bytesPerPeer = 256

// gateTime is how long one full map may hold its place at the gate.
const gateTime = time.Second

// full sends the first map. A gate on the bytes under way keeps a storm of reconnects from filling the memory.
func (x *Session) full(ctx context.Context) error {
	s := x.srv
	leave, err := s.admit(ctx)
	if err != nil {
		return err
	}
	defer leave()
	snap := s.cfg.Replica.Current()
	n := snap.Node(x.node)
	if n == nil || n.NodeKey != x.key {
		return errMoved // since the request was looked at; the client comes back and is told
	}
	m := netmap.Full(snap, netmap.Viewer{Slot: n.Slot, Raw: x.raw, Now: s.cfg.Now()})
	s.FullMaps.Add(1)
	x.moved(snap)
	return x.write(netmap.Pieces(m, x.raw))
}

// admit waits at the gate for a place in which to make and hand over a full map, and takes it. A reader behind a slow link takes longer than the
// place lasts, and must not hold up the rest.
func (s *Server) admit(ctx context.Context) (leave func(), err error) {
	weight := min(int64(len(s.cfg.Replica.Current().Nodes()))*bytesPerPeer+8192, s.cfg.InFlight)
	s.Waiting.Add(1)
	err = s.gate.Acquire(ctx, weight)
	s.Waiting.Add(-1)
	if err != nil {
		return nil, err
	}
	s.InFlight.Add(weight)
	release := sync.OnceFunc(func() {
		s.InFlight.Add(-weight)
		s.gate.Release(weight)
	})
	t := time.AfterFunc(gateTime, release)
	return func() {
		t.Stop()
		release()
	}, nil
}

func (x *Session) moved(s *tailnet.Snapshot) {
	x.at = s
	x.rev.Store(int64(s.Revision()))
}

// advance brings the client to snap. over says that the stream has nothing more to say: its node is gone, logged out or has another key.
func (x *Session) advance(snap *tailnet.Snapshot) (sent, over bool, err error) {
	if snap.Revision() <= x.at.Revision() {
		return false, false, nil
	}
	n := snap.Node(x.node)
	if n == nil {
		old := x.at.Node(x.node)
		x.srv.Farewells.Add(1)
		return true, true, x.write(netmap.Pieces(netmap.Farewell(old, snap.Settings().DNS.BaseDomain, nil), x.raw))
	}
	if n.NodeKey != x.key {
		return false, true, nil
	}
	messages := netmap.Between(tailnet.Diff(x.at, snap), netmap.Viewer{Slot: n.Slot, Raw: x.raw, Now: x.srv.cfg.Now()})
	loggedOut := n.LoggedOut && !x.at.Node(x.node).LoggedOut
	x.moved(snap)
	for _, m := range messages {
		x.srv.Deltas.Add(1)
		if err := x.write(netmap.Pieces(m, x.raw)); err != nil {
			return true, false, err
		}
	}
	if len(messages) > 0 {
		snap.Delivered()
	}
	return len(messages) > 0, loggedOut, nil
}

// pieceSize is how much is written between two notes of progress: about a frame of HTTP/2.
const pieceSize = 16 << 10

// write sends a message and notes progress for the watch on stalled readers.
func (x *Session) write(message iter.Seq[[]byte]) error {
	sent := 0
	defer func() {
		x.busy.Store(0)
		x.written.Add(int64(sent))
		x.srv.Bytes.Add(int64(sent))
	}()
	for b := range message {
		for len(b) > 0 {
			x.busy.Store(time.Now().UnixNano())
			n := min(len(b), pieceSize)
			if _, err := x.w.Write(b[:n]); err != nil {
				return err
			}
			sent += n
			b = b[n:]
		}
	}
	x.busy.Store(time.Now().UnixNano())
	return x.ctl.Flush()
}

func (x *Session) keepAlive() error {
	return x.write(func(yield func([]byte) bool) { yield(netmap.KeepAliveWire(x.raw)) })
}
