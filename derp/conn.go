package derp

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"

	"go4.org/mem"
	tsderp "tailscale.com/derp"
	"tailscale.com/types/key"
)

// claimLen is how much of the client's first frame holds its key: one byte
// of type, four of length, the key.
const claimLen = tsderp.FrameHeaderLen + tsderp.KeyLen

// maxPerKey is how many admitted connections one key may hold. A client that
// lost its network leaves dead ones behind, so the newest wins.
const maxPerKey = 4

// conn is one relay connection. It watches the first frame go by to learn the
// key that the client claims, which is good enough to close by, never to
// grant by.
type conn struct {
	net.Conn // what derpserver reads and writes
	srv      *Server
	r        io.Reader // Conn, after what was read ahead of the upgrade
	hard     io.Closer // the transport below TLS and WebSocket
	req      *http.Request
	remote   netip.AddrPort
	release  func(failed bool) // gives the place among unadmitted ones back; the first call counts

	head  [claimLen]byte // owned by the reading goroutine
	nhead int

	once sync.Once // closes hard

	// Guarded by srv.mu.
	claimed  key.NodePublic
	admitted bool
	serial   uint64 // order of admission
	gone     bool
}

// Read implements net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if c.nhead < claimLen && n > 0 {
		c.nhead += copy(c.head[c.nhead:], p[:n])
		if c.nhead == claimLen {
			c.claim()
		}
	}
	return n, err
}

// claim files c under the key in its first frame.
func (c *conn) claim() {
	if tsderp.FrameType(c.head[0]) != tsderp.FrameClientInfo ||
		binary.BigEndian.Uint32(c.head[1:]) < tsderp.KeyLen {
		return
	}
	k := key.NodePublicFromRaw32(mem.B(c.head[tsderp.FrameHeaderLen:]))
	s := c.srv
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.gone {
		return
	}
	c.claimed = k
	set := s.byKey[k]
	if set == nil {
		set = map[*conn]struct{}{}
		s.byKey[k] = set
	}
	set[c] = struct{}{}
}

// Close implements net.Conn. It closes the transport at once: a TLS or
// WebSocket farewell would wait for a client that may not read.
func (c *conn) Close() error {
	var err error
	c.once.Do(func() { err = c.hard.Close() })
	return err
}

// forget takes c out of the books when its relay loop has ended.
func (c *conn) forget() {
	s := c.srv
	s.mu.Lock()
	c.gone = true
	wasAdmitted := c.admitted
	delete(s.conns, c)
	if set := s.byKey[c.claimed]; set != nil {
		delete(set, c)
		if len(set) == 0 {
			delete(s.byKey, c.claimed)
		}
	}
	s.mu.Unlock()
	if wasAdmitted {
		s.stats.connections.Add(-1)
		return
	}
	s.stats.failed.Add(1)
	c.release(true)
}

// admit decides on c once its client has proved k.
func (s *Server) admit(c *conn, k key.NodePublic) bool {
	s.mu.Lock()
	filed := c.claimed == k && !c.gone && !s.closed
	s.mu.Unlock()
	if !filed {
		return false
	}
	if s.cfg.Admit == nil || !s.cfg.Admit(k) {
		s.stats.denied.Add(1)
		c.release(true) // before the client learns of it and comes again
		return false
	}
	others, ok := s.markAdmitted(c)
	if !ok {
		return false
	}
	c.release(false)
	if len(others) >= maxPerKey {
		s.stats.evicted.Add(1)
		others[0].Close()
	}
	if n := len(others); n > 0 {
		s.stats.duplicates.Add(1)
		if s.cfg.OnDuplicate != nil {
			s.cfg.OnDuplicate(Duplicate{Key: k, Connections: n + 1, New: c.remote, Old: others[n-1].remote})
		}
	}
	if s.cfg.Identified != nil {
		s.cfg.Identified(c.req)
	}
	return true
}

// markAdmitted notes that c is admitted and returns the other admitted
// connections of its key, oldest first. It fails when c is over already.
func (s *Server) markAdmitted(c *conn) (others []*conn, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.gone || s.closed {
		return nil, false
	}
	for o := range s.byKey[c.claimed] {
		if o.admitted {
			others = append(others, o)
		}
	}
	slices.SortFunc(others, func(a, b *conn) int { return cmp.Compare(a.serial, b.serial) })
	c.admitted = true
	c.serial = s.stats.admitted.Add(1)
	s.stats.connections.Add(1)
	return others, true
}

// Revoke closes every connection of k at once, also those that have not
// proved the key yet. Call it after Config.Admit has begun to refuse k, else
// the client is back a moment later.
func (s *Server) Revoke(k key.NodePublic) {
	s.mu.Lock()
	conns := make([]*conn, 0, len(s.byKey[k]))
	for c := range s.byKey[k] {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		s.stats.revoked.Add(1)
		c.Close()
	}
}

// serve runs the relay loop of c and returns when the connection is over.
func (s *Server) serve(ctx context.Context, c *conn, bw *bufio.Writer) {
	s.mu.Lock()
	closed := s.closed
	if !closed {
		s.conns[c] = struct{}{}
		s.serving.Add(1)
	}
	s.mu.Unlock()
	if closed {
		c.Close()
		c.release(false)
		return
	}
	defer s.serving.Done()
	defer c.forget()
	ctx = context.WithValue(ctx, connContextKey{}, c)
	brw := bufio.NewReadWriter(bufio.NewReader(c), bw)
	s.relay.Accept(ctx, c, brw, c.remote.String())
}

// transport is what lies below TLS: closing it cannot block.
func transport(nc net.Conn) io.Closer {
	if t, ok := nc.(*tls.Conn); ok {
		return t.NetConn()
	}
	return nc
}
