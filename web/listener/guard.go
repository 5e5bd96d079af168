package listener

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// GuardConfig are the numbers of a Guard. A zero field means its default.
type GuardConfig struct {
	// Total is the number of connections of all listeners together. Beyond
	// it, new ones wait in the kernel. 0 means MaxConnections().
	Total int

	// PerSource is the number of connections without an identity from one
	// IPv4 address or IPv6 /64: 512.
	PerSource int

	// Grace is how long a connection may stay without an identity while
	// others of its source wait: 10 s.
	Grace time.Duration

	// Waiting is the number of accepted connections of one source that may
	// wait for a place: 16,384, and at most half of Total.
	Waiting int
}

// Guard counts connections over all listeners that share it. Connections that
// Identify has named count only in the total.
//
// When a source has all its places taken by strangers, its next connection
// takes the place of the oldest one if that had its Grace, and otherwise waits
// unserved. Other sources do not notice.
type Guard struct {
	cfg    GuardConfig
	places chan struct{} // one element for each connection and waiting accept
	open   atomic.Int64
	closed atomic.Int64

	// mu guards the following fields.
	mu      sync.Mutex
	sources map[netip.Addr]*source
}

// A source exists while it has connections without an identity.
type source struct {
	addr    netip.Addr
	open    list.List // of *Conn without an identity, oldest first
	waiting list.List // of *Conn, oldest first
	timer   *time.Timer
}

// NewGuard returns a guard without connections.
func NewGuard(cfg GuardConfig) *Guard {
	if cfg.Total <= 0 {
		cfg.Total = MaxConnections()
	}
	def(&cfg.PerSource, 512)
	def(&cfg.Grace, 10*time.Second)
	def(&cfg.Waiting, min(16384, cfg.Total/2))
	return &Guard{
		cfg:     cfg,
		places:  make(chan struct{}, cfg.Total),
		sources: make(map[netip.Addr]*source),
	}
}

// MaxConnections raises the limit of open files as far as the system allows
// and returns how many connections that leaves room for: all but 1,024 files,
// or half of them where there are fewer than 2,048.
func MaxConnections() int {
	const atMost = 1 << 20
	var lim syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil {
		return 512
	}
	if lim.Cur < lim.Max {
		raised := syscall.Rlimit{Cur: lim.Max, Max: lim.Max}
		if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &raised) == nil {
			lim = raised
		}
	}
	files := int(min(lim.Cur, atMost))
	return max(files-1024, files/2)
}

// Open is the number of connections, served or waiting.
func (g *Guard) Open() int { return int(g.open.Load()) }

// Closed is how many connections have been closed to make room for another of
// their source, or because too many of it waited.
func (g *Guard) Closed() int64 { return g.closed.Load() }

// Strangers is the number of connections of a source without an identity.
func (g *Guard) Strangers(a netip.Addr) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if s := g.sources[site(a)]; s != nil {
		return s.open.Len() + s.waiting.Len()
	}
	return 0
}

// Wrap returns a listener whose connections g counts. Closing it closes l.
func (g *Guard) Wrap(l net.Listener) net.Listener {
	return &guarded{Listener: l, g: g, ready: make(chan accepted), closed: make(chan struct{})}
}

type accepted struct {
	c   net.Conn
	err error
}

// guarded accepts in a goroutine of its own, since a connection that waits
// for a place is delivered when another ends.
type guarded struct {
	net.Listener
	g      *Guard
	start  sync.Once
	ready  chan accepted
	closed chan struct{}
	stop   sync.Once
}

func (l *guarded) Accept() (net.Conn, error) {
	l.start.Do(func() { go l.run() })
	select {
	case a := <-l.ready:
		return a.c, a.err
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *guarded) Close() error {
	err := l.Listener.Close()
	l.stop.Do(func() {
		close(l.closed)
		for _, c := range l.g.waitingOn(l) {
			c.Close()
		}
	})
	return err
}

func (l *guarded) run() {
	for {
		select {
		case l.g.places <- struct{}{}:
		case <-l.closed:
			return
		}
		raw, err := l.Listener.Accept()
		if err != nil {
			<-l.g.places
			if errors.Is(err, net.ErrClosed) {
				return
			}
			l.deliver(nil, err)
			continue
		}
		l.g.open.Add(1)
		c := &Conn{Conn: raw, g: l.g, l: l, since: time.Now()}
		if l.g.arrive(c) {
			l.deliver(c, nil)
		}
	}
}

func (l *guarded) deliver(c *Conn, err error) {
	a := accepted{err: err}
	if c != nil {
		a.c = c
	}
	select {
	case l.ready <- a:
	case <-l.closed:
		if c != nil {
			c.Close()
		}
	}
}

// Conn is a counted connection.
type Conn struct {
	net.Conn
	g     *Guard
	l     *guarded
	since time.Time
	gone  atomic.Bool

	// Guarded by Guard.mu. in is nil for a connection with an identity and
	// for one that is gone.
	in   *source
	elem *list.Element
	wait bool
}

// Close closes the connection and frees its place.
func (c *Conn) Close() error {
	err := c.Conn.Close()
	if !c.gone.Swap(true) {
		c.g.leave(c)
		c.g.open.Add(-1)
		<-c.g.places
	}
	return err
}

// arrive counts a new connection and reports whether it may be served now.
func (g *Guard) arrive(c *Conn) bool {
	addr := site(remoteIP(c.Conn))
	g.mu.Lock()
	select {
	case <-c.l.closed:
		// Nobody would come for it if it waited.
		g.mu.Unlock()
		c.Close()
		return false
	default:
	}
	s := g.sources[addr]
	if s == nil {
		s = &source{addr: addr}
		g.sources[addr] = s
	}
	c.in = s
	if s.open.Len() < g.cfg.PerSource && s.waiting.Len() == 0 {
		c.elem = s.open.PushBack(c)
		g.mu.Unlock()
		return true
	}
	if s.waiting.Len() >= g.cfg.Waiting {
		c.in = nil
		g.mu.Unlock()
		g.closed.Add(1)
		c.Close()
		return false
	}
	c.wait = true
	c.elem = s.waiting.PushBack(c)
	oldest := g.makeRoom(s)
	g.mu.Unlock()
	g.makeWay(oldest)
	return false
}

// makeRoom returns the oldest stranger of a full source when it had its
// grace, and otherwise makes sure that somebody comes back for it. It is
// called with mu held.
func (g *Guard) makeRoom(s *source) *Conn {
	if s.waiting.Len() == 0 || s.open.Len() == 0 {
		return nil
	}
	oldest := s.open.Front().Value.(*Conn)
	left := g.cfg.Grace - time.Since(oldest.since)
	if left <= 0 {
		return oldest
	}
	if s.timer == nil {
		s.timer = time.AfterFunc(left, func() { g.retry(s) })
	}
	return nil
}

func (g *Guard) retry(s *source) {
	g.mu.Lock()
	s.timer = nil
	oldest := g.makeRoom(s)
	g.mu.Unlock()
	g.makeWay(oldest)
}

// makeWay closes a connection, which lets a waiting one in.
func (g *Guard) makeWay(c *Conn) {
	if c != nil {
		g.closed.Add(1)
		c.Close()
	}
}

// leave takes a connection out of its source, because it ended or because it
// has an identity, and lets the next one in.
func (g *Guard) leave(c *Conn) {
	g.mu.Lock()
	s := c.in
	if s == nil {
		g.mu.Unlock()
		return
	}
	c.in = nil
	if c.wait {
		s.waiting.Remove(c.elem)
	} else {
		s.open.Remove(c.elem)
	}
	var next *Conn
	if s.open.Len() < g.cfg.PerSource && s.waiting.Len() > 0 {
		next = s.waiting.Remove(s.waiting.Front()).(*Conn)
		next.wait = false
		next.since = time.Now()
		next.elem = s.open.PushBack(next)
	}
	oldest := g.makeRoom(s)
	if s.open.Len() == 0 && s.waiting.Len() == 0 {
		delete(g.sources, s.addr)
	}
	g.mu.Unlock()
	if next != nil {
		// Whoever leaves must not wait for the server to accept.
		go next.l.deliver(next, nil)
	}
	if oldest != nil {
		go g.makeWay(oldest)
	}
}

func (g *Guard) waitingOn(l *guarded) []*Conn {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []*Conn
	for _, s := range g.sources {
		for e := s.waiting.Front(); e != nil; e = e.Next() {
			if c := e.Value.(*Conn); c.l == l {
				out = append(out, c)
			}
		}
	}
	return out
}

// site is what counts as one source.
func site(a netip.Addr) netip.Addr {
	a = a.Unmap().WithZone("")
	if a.Is6() {
		p, _ := a.Prefix(64)
		return p.Addr()
	}
	return a
}

func remoteIP(c net.Conn) netip.Addr {
	if t, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		return t.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

type connKey struct{}

// ConnContext gives the requests of a connection what Identify and PeerUID
// look for. It is the http.Server.ConnContext of every Server, and of a server
// elsewhere whose listener a Guard has wrapped.
func ConnContext(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	switch c := c.(type) {
	case *Conn:
		return context.WithValue(ctx, connKey{}, c)
	case *net.UnixConn:
		return withPeerUID(ctx, c)
	}
	return ctx
}

// Identify says that the connection of the request belongs to somebody whose
// identity is proven, so that it no longer counts among the strangers of its
// source. Calling it again does nothing.
func Identify(r *http.Request) { Identifier(r)() }

// Identifier returns the function that does what Identify does, for callers
// that find out later and do not want to keep the request.
func Identifier(r *http.Request) func() {
	c, ok := r.Context().Value(connKey{}).(*Conn)
	if !ok {
		return func() {}
	}
	return func() { c.g.leave(c) }
}
