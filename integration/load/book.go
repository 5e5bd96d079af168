package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// peer is one state of one node as some viewer was told of it. It is
// immutable, and viewers that were told the same share it.
type peer struct {
	node *tailcfg.Node
	slot int

	// right is the version of the fact that this state was last found equal
	// to, so that N viewers of one state cost one comparison and N loads.
	right atomic.Uint64
}

// patch is one tailcfg.PeerChange. Slot is -1 when no viewer at all was ever
// told of the node.
type patch struct {
	change *tailcfg.PeerChange
	slot   int
}

// derivation names a state that followed from an older one.
type derivation struct {
	base  *peer
	patch *patch
	next  *peer
}

// book interns what the server sends: the parsed form of a peer's JSON text,
// of a patch, of a packet filter is made once however many viewers get it.
// A view is then one pointer a peer, and N viewers of N peers cost N parses.
type book struct {
	owners map[key.NodePublic]int // client of a node key; fixed after newBook

	mu           sync.RWMutex
	peers        map[string]*peer
	patches      map[string]*patch
	derived      map[derivation]*peer
	filters      map[string]*filter
	profiles     map[string][]tailcfg.UserID
	messages     map[string]*message // by compressed bytes, of which
	messageBytes int                 // is the sum
	slots        map[tailcfg.NodeID]int
	slotIDs      []tailcfg.NodeID // by slot; 0 = free
}

// maxInterned bounds each table of a book. Forgetting is harmless: views keep
// their pointers, and the next text is parsed again.
const maxInterned = 1 << 17

// newBook makes a book in which the node with keys[i] has slot i. Nodes with
// keys that nobody here made get slots after those.
func newBook(keys []key.NodePublic) *book {
	b := &book{
		owners:  make(map[key.NodePublic]int, len(keys)),
		slots:   map[tailcfg.NodeID]int{},
		slotIDs: make([]tailcfg.NodeID, len(keys)),
	}
	for i, k := range keys {
		b.owners[k] = i
	}
	b.forget()
	return b
}

// forget empties the interned texts; the slots stay. Caller holds b.mu or is
// the only user.
func (b *book) forget() {
	b.peers = map[string]*peer{}
	b.patches = map[string]*patch{}
	b.derived = map[derivation]*peer{}
	b.filters = map[string]*filter{}
	b.profiles = map[string][]tailcfg.UserID{}
	b.messages, b.messageBytes = map[string]*message{}, 0
}

// slot returns the slot of a node ID. A node is filed under the client whose
// node key it shows, unless another node ID is filed there already: two IDs
// with one key must not hide each other.
func (b *book) slot(id tailcfg.NodeID, k key.NodePublic) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.slotLocked(id, k)
}

func (b *book) slotLocked(id tailcfg.NodeID, k key.NodePublic) int {
	if s, ok := b.slots[id]; ok {
		return s
	}
	s, ok := b.owners[k]
	if !ok || b.slotIDs[s] != 0 {
		s = len(b.slotIDs)
		b.slotIDs = append(b.slotIDs, 0)
	}
	b.slotIDs[s] = id
	b.slots[id] = s
	return s
}

// known returns the slot of a node ID that some viewer was told of.
func (b *book) known(id tailcfg.NodeID) (int, bool) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	s, ok := b.slots[id]
	return s, ok
}

// interned looks text up in the table that get returns (which is replaced by
// forget, hence the function) and parses it when it is new.
func interned[V any](b *book, get func() map[string]V, text []byte, parse func() (V, error)) (V, error) {
	b.mu.RLock()
	v, ok := get()[string(text)]
	b.mu.RUnlock()
	if ok {
		return v, nil
	}
	v, err := parse()
	if err != nil {
		return v, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if old, ok := get()[string(text)]; ok {
		return old, nil
	}
	if len(get()) >= maxInterned {
		b.forget()
	}
	get()[string(text)] = v
	return v, nil
}

func (b *book) peer(text []byte) (*peer, error) {
	return interned(b, func() map[string]*peer { return b.peers }, text, func() (*peer, error) {
		n := new(tailcfg.Node)
		if err := json.Unmarshal(text, n); err != nil {
			return nil, fmt.Errorf("peer: %w", err)
		}
		if n.ID == 0 {
			return nil, fmt.Errorf("peer %q without ID", n.Name)
		}
		upgrade(n)
		return &peer{node: n, slot: b.slot(n.ID, n.Key)}, nil
	})
}

func (b *book) patch(text []byte) (*patch, error) {
	c := new(tailcfg.PeerChange)
	p, err := interned(b, func() map[string]*patch { return b.patches }, text, func() (*patch, error) {
		if err := json.Unmarshal(text, c); err != nil {
			return nil, fmt.Errorf("patch: %w", err)
		}
		s, ok := b.known(c.NodeID)
		if !ok {
			return nil, errUnknownNode
		}
		return &patch{change: c, slot: s}, nil
	})
	if err == errUnknownNode {
		return &patch{change: c, slot: -1}, nil
	}
	return p, err
}

// derive returns the state that follows from base by p, or by being told next,
// as the stock client computes it.
func (b *book) derive(base *peer, p *patch, next *peer) *peer {
	if base == next {
		return base
	}
	d := derivation{base, p, next}
	b.mu.RLock()
	v := b.derived[d]
	b.mu.RUnlock()
	if v != nil {
		return v
	}
	if p != nil {
		v = base
		if n := applyPatch(base.node, p.change); n != nil {
			v = &peer{node: n, slot: base.slot}
		}
	} else {
		v = next
		if n, ok := patchify(base.node, next.node); ok {
			v = &peer{node: n, slot: base.slot}
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if old := b.derived[d]; old != nil {
		return old
	}
	if len(b.derived) >= maxInterned {
		b.forget()
	}
	b.derived[d] = v
	return v
}

// filter is one named part of a packet filter.
type filter struct {
	rules []rule
}

type rule struct {
	srcs  []addrRange
	dsts  []dstRange
	proto []int
}

type addrRange struct{ from, to netip.Addr }

type dstRange struct {
	addrRange
	ports tailcfg.PortRange
}

func (b *book) filter(text []byte) (*filter, error) {
	return interned(b, func() map[string]*filter { return b.filters }, text, func() (*filter, error) {
		var rules []tailcfg.FilterRule
		if err := json.Unmarshal(text, &rules); err != nil {
			return nil, fmt.Errorf("packet filter: %w", err)
		}
		return compileFilter(rules)
	})
}

// compileFilter parses the forms that tailcfg.FilterRule allows: "*", an
// address, a prefix, or "from-to". Capability sources and CapGrant rules open
// no port and are left out.
func compileFilter(rules []tailcfg.FilterRule) (*filter, error) {
	f := new(filter)
	for _, r := range rules {
		if len(r.DstPorts) == 0 {
			continue
		}
		c := rule{proto: r.IPProto}
		for _, s := range r.SrcIPs {
			if strings.HasPrefix(s, "cap:") {
				continue
			}
			a, err := parseRanges(s)
			if err != nil {
				return nil, err
			}
			c.srcs = append(c.srcs, a...)
		}
		for _, d := range r.DstPorts {
			a, err := parseRanges(d.IP)
			if err != nil {
				return nil, err
			}
			for _, a := range a {
				c.dsts = append(c.dsts, dstRange{a, d.Ports})
			}
		}
		f.rules = append(f.rules, c)
	}
	return f, nil
}

var everywhere = []addrRange{
	{netip.IPv4Unspecified(), netip.AddrFrom4([4]byte{255, 255, 255, 255})},
	{netip.IPv6Unspecified(), netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")},
}

func parseRanges(s string) ([]addrRange, error) {
	if s == "*" {
		return everywhere, nil
	}
	if from, to, ok := strings.Cut(s, "-"); ok {
		a, err := netip.ParseAddr(from)
		if err != nil {
			return nil, err
		}
		z, err := netip.ParseAddr(to)
		return []addrRange{{a, z}}, err
	}
	if strings.Contains(s, "/") {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, err
		}
		if p != p.Masked() {
			return nil, fmt.Errorf("%s: host bits set; the stock client drops it", s)
		}
		return []addrRange{{p.Addr(), lastAddr(p)}}, nil
	}
	a, err := netip.ParseAddr(s)
	return []addrRange{{a, a}}, err
}

func lastAddr(p netip.Prefix) netip.Addr {
	raw := p.Addr().AsSlice()
	for i := p.Bits(); i < len(raw)*8; i++ {
		raw[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(raw)
	return a
}

// allows reports whether TCP from src to dst:port passes.
func (f *filter) allows(src, dst netip.Addr, port uint16) bool {
	for _, r := range f.rules {
		if !r.tcp() || !contains(r.srcs, src) {
			continue
		}
		for _, d := range r.dsts {
			if d.has(dst) && d.ports.First <= port && port <= d.ports.Last {
				return true
			}
		}
	}
	return false
}

// namesPort reports whether some rule names exactly this port.
func (f *filter) namesPort(port uint16) bool {
	for _, r := range f.rules {
		for _, d := range r.dsts {
			if d.ports.First == port && d.ports.Last == port {
				return true
			}
		}
	}
	return false
}

func (r rule) tcp() bool {
	if len(r.proto) == 0 {
		return true
	}
	for _, p := range r.proto {
		if p == 6 {
			return true
		}
	}
	return false
}

func contains(rs []addrRange, a netip.Addr) bool {
	for _, r := range rs {
		if r.has(a) {
			return true
		}
	}
	return false
}

func (r addrRange) has(a netip.Addr) bool {
	return r.from.BitLen() == a.BitLen() && r.from.Compare(a) <= 0 && a.Compare(r.to) <= 0
}

// profileIDs returns the IDs in a UserProfiles list.
func (b *book) profileIDs(text []byte) ([]tailcfg.UserID, error) {
	return interned(b, func() map[string][]tailcfg.UserID { return b.profiles }, text, func() ([]tailcfg.UserID, error) {
		var ps []tailcfg.UserProfile
		if err := json.Unmarshal(text, &ps); err != nil {
			return nil, fmt.Errorf("user profiles: %w", err)
		}
		ids := make([]tailcfg.UserID, len(ps))
		for i, p := range ps {
			if p.LoginName == "" {
				return nil, fmt.Errorf("user profile %d without login name", p.ID)
			}
			ids[i] = p.ID
		}
		return ids, nil
	})
}
