package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// fact is what is true of a node: what its client reported, and what the
// server gave it. It is replaced, never changed.
type fact struct {
	version   uint64 // unique over all facts of a run
	key       key.NodePublic
	disco     key.DiscoPublic
	endpoints []netip.AddrPort
	derp      int
	online    bool
	hostname  string
	// self is the node as its own map shows it, nil while unknown (clients
	// whose maps are not decoded never know).
	self *tailcfg.Node
}

// client is one simulated machine.
type client struct {
	index    int
	fleet    *fleet
	hostname string
	authKey  string
	local    net.Addr
	machine  key.MachinePrivate
	node     key.NodePrivate
	disco    key.DiscoPrivate

	traffic traffic
	halted  atomic.Bool   // our own kill: its broken stream is not the server's doing
	resume  chan struct{} // one slot: reconnect now

	fact atomic.Pointer[fact]

	// mu serialises changes of fact and guards link.
	mu   sync.Mutex
	link *link

	// viewMu guards the following fields.
	viewMu    sync.Mutex
	view      *view // nil for clients whose maps are not decoded
	session   int   // epoch of the fleet in which the map stream began; -1 = none
	full      bool  // this session has had its full map
	wasFull   bool  // the session that ended last had it
	changedAt time.Time
	firstMap  time.Time // when this session had its full map
	firstZ    []byte    // its KeepAlive frame
}

// decodes reports whether the client keeps a view.
func (c *client) decodes() bool { return c.index < c.fleet.sample }

// update changes the client's fact.
func (c *client) update(f func(*fact)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	next := *c.fact.Load()
	f(&next)
	next.version = c.fleet.facts.Add(1)
	c.fact.Store(&next)
}

func (c *client) hostinfo() *tailcfg.Hostinfo {
	return &tailcfg.Hostinfo{
		IPNVersion:    "1.102.5-load",
		BackendLogID:  fmt.Sprintf("%064x", c.index+1),
		OS:            "linux",
		OSVersion:     "6.1.0",
		Distro:        "debian",
		DistroVersion: "12.0",
		Hostname:      c.hostname,
		GoArch:        "amd64",
		GoVersion:     "go1.26.8",
		Machine:       "x86_64",
		Services: []tailcfg.Service{
			{Proto: tailcfg.PeerAPI4, Port: uint16(40000 + c.index%20000)},
			{Proto: tailcfg.PeerAPI6, Port: uint16(40000 + c.index%20000)},
		},
	}
}

func (c *client) dial(ctx context.Context) (*link, error) {
	l, err := c.fleet.dialer.dial(ctx, c.machine, c.local, &c.traffic)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.link = l
	c.mu.Unlock()
	return l, nil
}

// from is the address that the client last connected from, as it is in the
// server's log.
func (c *client) from() net.Addr {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link == nil {
		return nil
	}
	return c.link.tcp.LocalAddr()
}

// post sends one request inside Noise and returns the open answer.
func (c *client) post(ctx context.Context, l *link, path string, body any) (*http.Response, error) {
	text, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, "POST", "https://"+c.fleet.dialer.addr+path, bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Ts-Lb", c.node.Public().String())
	res, err := l.h2.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		defer res.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(res.Body, 200))
		return nil, &refusal{what: path, status: res.StatusCode, body: string(text)}
	}
	return res, nil
}

func (c *client) register(ctx context.Context, l *link) error {
	res, err := c.post(ctx, l, "/machine/register", &tailcfg.RegisterRequest{
		Version:  capability,
		NodeKey:  c.node.Public(),
		Auth:     &tailcfg.RegisterResponseAuth{AuthKey: c.authKey},
		Hostinfo: c.hostinfo(),
	})
	if err != nil {
		return err
	}
	defer res.Body.Close()
	var answer tailcfg.RegisterResponse
	if err := json.NewDecoder(io.LimitReader(res.Body, 1<<20)).Decode(&answer); err != nil {
		return fmt.Errorf("register: %w", err)
	}
	if answer.Error != "" || answer.AuthURL != "" || answer.NodeKeyExpired {
		return &refusal{what: "register", status: 200, body: fmt.Sprintf("error %q, auth URL %q, expired %v", answer.Error, answer.AuthURL, answer.NodeKeyExpired)}
	}
	return nil
}

// report sends the client's present state, as the stock client does when
// something of it changed (a "lite update").
func (c *client) report(ctx context.Context) error {
	c.mu.Lock()
	l := c.link
	c.mu.Unlock()
	f := c.fact.Load()
	if l == nil {
		return errors.New("report: not connected")
	}
	hi := c.hostinfo()
	hi.NetInfo = &tailcfg.NetInfo{PreferredDERP: f.derp, WorkingUDP: "true", WorkingIPv6: "false", MappingVariesByDestIP: "false"}
	types := make([]tailcfg.EndpointType, len(f.endpoints))
	for i := range types {
		types[i] = tailcfg.EndpointLocal
	}
	res, err := c.post(ctx, l, "/machine/map", &tailcfg.MapRequest{
		Version: capability, KeepAlive: true, Compress: "zstd", OmitPeers: true,
		NodeKey: f.key, DiscoKey: f.disco, Endpoints: f.endpoints, EndpointTypes: types, Hostinfo: hi,
	})
	if err != nil {
		return err
	}
	defer res.Body.Close()
	_, err = io.Copy(io.Discard, res.Body)
	return err
}

// poll holds one map stream until it ends; it always returns an error.
// Opened is called once when the server has answered the request.
func (c *client) poll(ctx context.Context, l *link, opened func()) error {
	f := c.fact.Load()
	res, err := c.post(ctx, l, "/machine/map", &tailcfg.MapRequest{
		Version: capability, KeepAlive: true, Compress: "zstd", Stream: true,
		NodeKey: f.key, DiscoKey: f.disco, Hostinfo: c.hostinfo(),
	})
	if err != nil {
		return err
	}
	defer res.Body.Close()
	c.beginView()
	defer c.endView()
	opened()
	var head [4]byte
	for {
		if _, err := io.ReadFull(res.Body, head[:]); err != nil {
			return err
		}
		if err := c.receive(res.Body, int(binary.LittleEndian.Uint32(head[:]))); err != nil {
			return err
		}
	}
}

func (c *client) beginView() {
	c.viewMu.Lock()
	defer c.viewMu.Unlock()
	c.session, c.full, c.wasFull, c.firstZ = int(c.fleet.epoch.Load()), false, false, nil
	if c.decodes() {
		c.view = newView(c.fleet.book)
		c.view.fault = c.fleet.faults.add
	}
}

func (c *client) endView() {
	c.viewMu.Lock()
	defer c.viewMu.Unlock()
	c.session, c.full, c.wasFull = -1, false, c.full
}

// maxSmall is the longest message that a client without a view still reads:
// deltas are below it, full maps of many peers above.
const maxSmall = maxShared

// receive reads and applies one message of the stream.
func (c *client) receive(r io.Reader, size int) error {
	c.fleet.frames.Add(1)
	if size > maxDecoded {
		return fmt.Errorf("message of %d bytes", size)
	}
	if !c.decodes() && size > maxSmall {
		if _, err := io.CopyN(io.Discard, r, int64(size)); err != nil {
			return err
		}
		c.noteMap(time.Now())
		return nil
	}
	buf := buffers.get()
	defer buffers.put(buf)
	if cap(*buf) < size {
		*buf = make([]byte, size)
	}
	z := (*buf)[:size]
	if _, err := io.ReadFull(r, z); err != nil {
		return err
	}
	at := time.Now()
	c.fleet.decoding <- struct{}{}
	defer func() { <-c.fleet.decoding }()
	m, err := c.fleet.book.message(z)
	if err != nil {
		c.fleet.faults.add("undecodable message", "client %d: %v", c.index, err)
		return err
	}
	if c.index < strictClients {
		if err := strict(z, m); err != nil {
			c.fleet.faults.add("message unlike encoding/json", "client %d: %v", c.index, err)
		}
	}
	return c.take(m, z, at)
}

// strictClients is how many clients also decode every message as the stock
// client does, whole and by encoding/json.
const strictClients = 2

func (c *client) take(m *message, z []byte, at time.Time) error {
	c.viewMu.Lock()
	c.checkKeepAlive(m, z)
	if c.view == nil {
		c.viewMu.Unlock()
		c.fleet.noteDelta(c, m, at)
		if !m.keepAlive {
			c.noteMap(at)
		}
		return nil
	}
	c.view.touched = func(slot int, p *peer) {
		if p != nil {
			c.fleet.noteState(c, slot, p.node, at)
		}
	}
	err := c.view.apply(m, at)
	self := c.view.self
	ports := m.filters != nil && err == nil
	if ports {
		c.fleet.notePorts(c, c.view, at)
	}
	if !m.keepAlive {
		c.changedAt = at
	}
	c.viewMu.Unlock()
	if err != nil {
		c.fleet.faults.add("message not applicable", "client %d: %v", c.index, err)
		return err
	}
	if m.node != nil {
		c.update(func(f *fact) { f.self = self })
	}
	if !m.keepAlive {
		c.noteMap(at)
	}
	return nil
}

// noteMap records the first map of a session.
func (c *client) noteMap(at time.Time) {
	c.viewMu.Lock()
	first := !c.full && c.session >= 0
	if first {
		c.full, c.firstMap = true, at
	}
	c.viewMu.Unlock()
	if first {
		c.fleet.maps.Add(1)
		c.fleet.mapped(c)
	}
}

// checkKeepAlive holds the server to what keeps clients up to v1.104 from
// losing deltas: a KeepAlive before the first map, every later one the same
// bytes, and no other message of that length. Caller holds c.viewMu.
func (c *client) checkKeepAlive(m *message, z []byte) {
	switch {
	case m.keepAlive && c.firstZ == nil:
		if c.full {
			c.fleet.warnings.add("first message was not a KeepAlive", "client %d", c.index)
		}
		c.firstZ = bytes.Clone(z)
	case m.keepAlive && !bytes.Equal(z, c.firstZ):
		c.fleet.faults.add("KeepAlive frames differ", "client %d: %d and %d bytes", c.index, len(c.firstZ), len(z))
	case !m.keepAlive && c.firstZ == nil && !c.full:
		c.fleet.warnings.add("first message was not a KeepAlive", "client %d", c.index)
	case !m.keepAlive && c.firstZ != nil && len(z) == len(c.firstZ):
		c.fleet.faults.add("message as long as the KeepAlive", "client %d: %d bytes; clients up to v1.104 may drop it", c.index, len(z))
	}
}

// backoff is the pause before a reconnect.
func backoff() time.Duration {
	return 100*time.Millisecond + rand.N(1900*time.Millisecond)
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// run keeps a map stream open until ctx ends, beginning with link l.
func (c *client) run(ctx context.Context, l *link) {
	for {
		epoch, down := int(c.fleet.epoch.Load()), c.fleet.down.Load()
		err := c.hold(ctx, l)
		l = nil
		if ctx.Err() != nil {
			return
		}
		c.update(func(f *fact) { f.online = false })
		if c.halted.Load() {
			select {
			case <-ctx.Done():
				return
			case <-c.resume:
			}
			continue
		}
		// Nobody can connect to a server that we killed. A connection that it
		// took, it must also keep.
		if !down || !errors.Is(err, errDial) {
			c.fleet.broken(c, epoch, err)
		}
		if !pause(ctx, backoff()) {
			return
		}
	}
}

var errDial = errors.New("dial")

// hold dials when it has no link, and polls until something breaks.
func (c *client) hold(ctx context.Context, l *link) error {
	c.viewMu.Lock()
	c.wasFull = false
	c.viewMu.Unlock()
	if l == nil {
		var err error
		if l, err = c.dial(ctx); err != nil {
			return fmt.Errorf("%w: %w", errDial, err)
		}
	}
	defer l.close()
	return c.poll(ctx, l, func() { c.update(func(f *fact) { f.online = true }) })
}

// kill cuts the connection without a word and keeps the client away.
func (c *client) kill() {
	c.halted.Store(true)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link != nil {
		c.link.tcp.Close()
	}
}

func (c *client) revive() {
	c.halted.Store(false)
	c.resume <- struct{}{}
}
