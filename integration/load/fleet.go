package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// fleet is all simulated clients of a run and what they found.
type fleet struct {
	scenario *scenario
	sees     []bitset
	clients  []*client
	sample   int // clients with a smaller index keep a view
	book     *book
	dialer   *dialer
	derp     int
	prefix   string

	ctx    context.Context
	cancel context.CancelFunc
	runs   sync.WaitGroup

	faults   tally // the server's mistakes: each fails the run
	warnings tally
	frames   atomic.Int64
	maps     atomic.Int64 // first maps of sessions
	facts    atomic.Uint64

	// epoch counts the kills of the server: a stream of an earlier epoch was
	// broken by us. While down is set, nobody can connect, and that is our
	// doing too.
	epoch atomic.Int64
	down  atomic.Bool

	decoding  chan struct{} // bounds how many big messages are decoded at once
	watches   []atomic.Pointer[watch]
	portWatch atomic.Pointer[watch]
	// offline collects, while it is set, the slots that somebody was told are
	// not online.
	offline atomic.Pointer[slotSet]

	mapMu   sync.Mutex
	mapWait map[*client]chan struct{} // closed at the first map of the session
}

type fleetConfig struct {
	nodes, sample int
	sources       int // loopback addresses that the clients come from
	scenario      *scenario
	addr          string
	serverKey     key.MachinePublic
	keys          map[owner]string // auth key of an owner
	derp          int
	prefix        string // of host names: makes runs against one server distinct
}

func newFleet(ctx context.Context, c fleetConfig) *fleet {
	f := &fleet{
		scenario: c.scenario,
		sees:     c.scenario.visibility(),
		sample:   c.sample,
		dialer:   &dialer{addr: c.addr, serverKey: c.serverKey, transport: &http2.Transport{DisableCompression: true}},
		derp:     c.derp,
		prefix:   c.prefix,
		decoding: make(chan struct{}, 2*runtime.GOMAXPROCS(0)),
		watches:  make([]atomic.Pointer[watch], 2*c.nodes+1024),
		mapWait:  map[*client]chan struct{}{},
	}
	f.ctx, f.cancel = context.WithCancel(ctx)
	keys := make([]key.NodePublic, c.nodes)
	for i := range c.nodes {
		cl := &client{
			index: i, fleet: f, session: -1,
			hostname: fmt.Sprintf("%s%05d", c.prefix, i),
			authKey:  c.keys[c.scenario.owners[i]],
			machine:  key.NewMachine(), node: key.NewNode(), disco: key.NewDisco(),
			resume: make(chan struct{}, 1),
		}
		if host := i % c.sources; host > 0 {
			cl.local = &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(1+host))}
		}
		cl.fact.Store(&fact{
			version: f.facts.Add(1), key: cl.node.Public(), disco: cl.disco.Public(),
			endpoints: f.endpoints(i, 0), derp: c.derp, hostname: cl.hostname,
		})
		f.clients = append(f.clients, cl)
		keys[i] = cl.node.Public()
	}
	f.book = newBook(keys)
	return f
}

// endpoints invents the addresses of a client, different in each turn.
func (f *fleet) endpoints(i, turn int) []netip.AddrPort {
	public := netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)})
	private := netip.AddrFrom4([4]byte{192, 168, byte(i >> 8), byte(i)})
	return []netip.AddrPort{
		netip.AddrPortFrom(public, uint16(10000+turn)),
		netip.AddrPortFrom(private, 41641),
	}
}

// close ends every client and waits for them.
func (f *fleet) close() {
	f.cancel()
	for _, c := range f.clients {
		c.kill()
	}
	f.runs.Wait()
}

// joinTimes is how long one join took.
type joinTimes struct {
	register time.Duration // the request alone
	join     time.Duration // from sending it to the full map in hand
}

// join registers a client, opens its map stream, reports its endpoints and
// waits for the full map.
func (f *fleet) join(ctx context.Context, c *client) (joinTimes, error) {
	var t joinTimes
	for {
		var err error
		if t, err = f.tryJoin(ctx, c); err == nil {
			return t, nil
		}
		if ctx.Err() != nil {
			return t, ctx.Err()
		}
		f.refused(c, err)
		if !pause(ctx, backoff()) {
			return t, ctx.Err()
		}
	}
}

func (f *fleet) tryJoin(ctx context.Context, c *client) (t joinTimes, err error) {
	l, err := c.dial(ctx)
	if err != nil {
		return t, fmt.Errorf("dial: %w", err)
	}
	start := time.Now()
	if err := c.register(ctx, l); err != nil {
		l.close()
		return t, err
	}
	t.register = time.Since(start)
	mapped := f.awaitMap(c)
	f.runs.Add(1)
	go func() {
		defer f.runs.Done()
		c.run(f.ctx, l)
	}()
	// The stock client sends both requests at the same time.
	if err := f.reportUntilDone(ctx, c); err != nil {
		return t, err
	}
	select {
	case <-mapped:
	case <-ctx.Done():
		return t, ctx.Err()
	}
	c.viewMu.Lock()
	t.join = c.firstMap.Sub(start)
	c.viewMu.Unlock()
	return t, nil
}

// reportUntilDone repeats a report until the server took it, as clients do.
func (f *fleet) reportUntilDone(ctx context.Context, c *client) error {
	for {
		err := c.report(ctx)
		if err == nil || ctx.Err() != nil {
			return err
		}
		f.refused(c, fmt.Errorf("report: %w", err))
		if !pause(ctx, backoff()) {
			return ctx.Err()
		}
	}
}

// awaitMap returns a channel that is closed when the client next gets the
// first map of a session.
func (f *fleet) awaitMap(c *client) <-chan struct{} {
	f.mapMu.Lock()
	defer f.mapMu.Unlock()
	ch := make(chan struct{})
	f.mapWait[c] = ch
	return ch
}

func (f *fleet) mapped(c *client) {
	f.mapMu.Lock()
	defer f.mapMu.Unlock()
	if ch := f.mapWait[c]; ch != nil {
		close(ch)
		delete(f.mapWait, c)
	}
}

// refused counts what kept a client from joining.
func (f *fleet) refused(c *client, err error) {
	if f.down.Load() {
		return
	}
	kind := "request failed"
	if r := (*refusal)(nil); errors.As(err, &r) {
		kind = "refused"
	}
	f.faults.add(kind, "client %d: %v", c.index, err)
}

// broken counts a map stream that ended, unless we ended it.
func (f *fleet) broken(c *client, epoch int, err error) {
	if f.down.Load() || epoch < int(f.epoch.Load()) {
		return
	}
	if r := (*refusal)(nil); errors.As(err, &r) {
		f.faults.add("refused", "client %d: %v", c.index, err)
		return
	}
	c.viewMu.Lock()
	had := time.Since(c.firstMap).Round(time.Millisecond)
	if !c.wasFull {
		had = 0
	}
	c.viewMu.Unlock()
	f.faults.add("session broken", "client %d from %v, %v after its first map (0 = before): %v", c.index, c.from(), had, err)
}

// brokenSessions returns how many were counted so far.
func (f *fleet) brokenSessions() int { return f.faults.snapshot()["session broken"].Count }

func (f *fleet) received() int64 {
	var n int64
	for _, c := range f.clients {
		n += c.traffic.in.Load()
	}
	return n
}

// noteState tells the watch of a slot that client c now holds state n.
func (f *fleet) noteState(c *client, slot int, n *tailcfg.Node, at time.Time) {
	if slot >= len(f.watches) {
		return
	}
	if w := f.watches[slot].Load(); w != nil && w.node(n) {
		w.note(c.index, at)
	}
	if set := f.offline.Load(); set != nil && n.Online != nil && !*n.Online {
		set.add(slot)
	}
}

// slotSet is a set of slots that many goroutines add to.
type slotSet struct {
	mu    sync.Mutex
	slots map[int]bool
}

func (s *slotSet) add(slot int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slots[slot] = true
}

func (s *slotSet) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.slots)
}

// noteDelta is noteState for clients without a view: only what the message
// itself says can be looked at.
func (f *fleet) noteDelta(c *client, m *message, at time.Time) {
	for _, p := range m.changed {
		f.noteState(c, p.slot, p.node, at)
	}
	for _, p := range m.peers {
		f.noteState(c, p.slot, p.node, at)
	}
	for _, p := range m.patches {
		if p.slot < 0 || p.slot >= len(f.watches) {
			continue
		}
		if w := f.watches[p.slot].Load(); w != nil && w.change(p.change) {
			w.note(c.index, at)
		}
		if set := f.offline.Load(); set != nil && p.change.Online != nil && !*p.change.Online {
			set.add(p.slot)
		}
	}
	for id, online := range m.online {
		if slot, ok := f.book.known(id); ok {
			f.noteState(c, slot, &tailcfg.Node{Online: &online}, at)
		}
	}
	if w := f.portWatch.Load(); w != nil {
		for _, part := range m.filters {
			if part != nil && part.namesPort(w.port) {
				w.note(c.index, at)
			}
		}
	}
}

// notePorts tells the port watch of a changed packet filter.
func (f *fleet) notePorts(c *client, v *view, at time.Time) {
	if w := f.portWatch.Load(); w != nil && v.namesPort(w.port) {
		w.note(c.index, at)
	}
}
