// Package tailnet holds the picture of a tailnet that everything else reads.
//
// A Snapshot is a tailnet at one Revision and never changes. A Replica follows the change log of the database and replaces its current
// Snapshot; it is the only publisher. A Ledger is the only door for writes: it commits to the database and never touches a Snapshot, so
// memory cannot run ahead of what is durable, and a change made by another server arrives in the very same way as one made here.
//
// One flow as an example. A client reports new endpoints: poll calls Ledger.Report, the Ledger commits a batch of reports as one revision,
// the Replica reads the rows that moved, copies the node slice, keeps the Access pointer since no fact a policy can see has moved, and
// announces the new Snapshot. Every session then asks Diff for what lies between the Snapshot it last sent and the new one.
//
// The package never encodes, never speaks HTTP and holds no state that is not in a row.
package tailnet

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/db"
)

// TaggedUser owns every tagged node in the eyes of its peers. It is Headscale's number, kept so that a move from there changes nothing.
const TaggedUser tailcfg.UserID = 2147455555

// selfUserBase lifts the user of a tagged node's own view out of the range of people: clients compare raw user ids, and a tagged node
// whose own user equalled that of its tagged peers would get their Taildrop and peerapi rights.
const selfUserBase tailcfg.UserID = 1 << 52

// TaggedSelfUser is the user that a tagged node sees as its own.
func TaggedSelfUser(id tailcfg.NodeID) tailcfg.UserID { return selfUserBase + tailcfg.UserID(id) }

// A Node is one node in one Snapshot. It is never modified after the Snapshot is published.
type Node struct {
	*db.Node
	Slot int    // index in Snapshot.Nodes, ascending with ID
	FQDN string // MagicDNS name with the trailing dot

	// Wire is a place where package netmap keeps this node's encoded form. It can be dropped at any time.
	Wire sync.Map
}

// Tagged reports whether the node is owned by its tags and not by a person.
func (n *Node) Tagged() bool { return len(n.Tags) > 0 }

// PeerUser is the owner that peers see.
func (n *Node) PeerUser() tailcfg.UserID {
	if n.Tagged() {
		return TaggedUser
	}
	return n.User
}

// SelfUser is the owner that the node itself sees.
func (n *Node) SelfUser() tailcfg.UserID {
	if n.Tagged() {
		return TaggedSelfUser(n.ID)
	}
	return n.User
}

// Dead reports whether the node's key no longer opens anything: it expired or its user logged out.
func (n *Node) Dead() bool { return n.Expired || n.LoggedOut }

// Routes are the approved routes that the node advertises now.
func (n *Node) Routes() []netip.Prefix { return effectiveRoutes(n.Node) }

// A Snapshot is a tailnet at one Revision. Nothing reachable from it changes, apart from caches and what is
// measured of its delivery.
type Snapshot struct {
	rev    db.Revision
	layout uint64 // slots of two snapshots are comparable when their layouts are equal
	nodes  []*Node
	ids    []tailcfg.NodeID // slot to id, also of removed nodes; ascending
	index  *index
	users  map[tailcfg.UserID]*db.User

	policy   *PolicyState
	facts    *acl.Tailnet
	access   *acl.Access
	settings *Settings
	derp     *tailcfg.DERPMap
	seen     Bits // slots that peers may be told of
	tiles    []*Tile

	announced time.Time    // when sessions were first told of it; set before any is, zero for the first snapshot of all
	spread    atomic.Int64 // nanoseconds from then until the latest session was done with it

	mu      sync.Mutex // guards the following fields, which are caches
	deltas  map[*Snapshot]*Delta
	retired bool // see retire
	owners  map[tailcfg.UserID]Bits
	Memo    sync.Map // for netmap: encoded answers that belong to this snapshot
}

// A PolicyState is the stored policy together with its parsed form.
type PolicyState struct {
	Version *db.PolicyVersion // nil when no policy is stored: everything is denied
	Parsed  *acl.Policy       // nil when the stored text is not valid for this binary
	Err     error             // why Parsed is nil or does not compile; then everything is denied
	Stale   error             // names in it that the tailnet has come to refute, which denote nobody; nil when there are none
}

// index finds slots. It is shared by snapshots between which no key has moved.
type index struct {
	nodeKey map[key.NodePublic]int
	machine map[key.MachinePublic][]int
	names   map[string]int
}

// Delivered takes note that a session has written what leads to s, which it was told by Replica.News.
func (s *Snapshot) Delivered() {
	if s.announced.IsZero() {
		return
	}
	took := int64(time.Since(s.announced))
	for was := s.spread.Load(); took > was && !s.spread.CompareAndSwap(was, took); was = s.spread.Load() {
	}
}

// Deltas lists the kept ways that lead to s, in no order.
func (s *Snapshot) Deltas() []*Delta {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.deltas))
}

// Revision is the last revision that the snapshot includes.
func (s *Snapshot) Revision() db.Revision { return s.rev }

// Nodes lists the nodes by slot; removed nodes are nil. The caller must not modify it.
func (s *Snapshot) Nodes() []*Node { return s.nodes }

// NodeAt is the node in a slot, nil for a removed one or a slot that does not exist.
func (s *Snapshot) NodeAt(slot int) *Node {
	if slot < 0 || slot >= len(s.nodes) {
		return nil
	}
	return s.nodes[slot]
}

// Node finds a node by id; nil when there is none.
func (s *Snapshot) Node(id tailcfg.NodeID) *Node {
	i, ok := slices.BinarySearch(s.ids, id)
	if !ok {
		return nil
	}
	return s.nodes[i]
}

// ByNodeKey finds the node that holds a node key; nil when there is none.
func (s *Snapshot) ByNodeKey(k key.NodePublic) *Node {
	if i, ok := s.index.nodeKey[k]; ok {
		return s.nodes[i]
	}
	return nil
}

// ByMachineKey lists the nodes of one machine, in order of their ids: one for each user that logged in there.
func (s *Snapshot) ByMachineKey(m key.MachinePublic) []*Node {
	var out []*Node
	for _, i := range s.index.machine[m] {
		out = append(out, s.nodes[i])
	}
	return out
}

// HasMachine reports whether a machine key belongs to a node.
func (s *Snapshot) HasMachine(m key.MachinePublic) bool { return len(s.index.machine[m]) > 0 }

// ByName finds a node by its MagicDNS label.
func (s *Snapshot) ByName(label string) *Node {
	if i, ok := s.index.names[strings.ToLower(label)]; ok {
		return s.nodes[i]
	}
	return nil
}

// User finds a person by id; nil when there is none.
func (s *Snapshot) User(id tailcfg.UserID) *db.User { return s.users[id] }

// UserByName finds a person by name or, failing that, by e-mail address.
func (s *Snapshot) UserByName(name string) *db.User {
	for _, u := range s.users {
		if u.Name == name {
			return u
		}
	}
	for _, u := range s.users {
		if u.Email != "" && strings.EqualFold(u.Email, name) {
			return u
		}
	}
	return nil
}

// Users lists the people in order of their ids.
func (s *Snapshot) Users() []*db.User {
	out := make([]*db.User, 0, len(s.users))
	for _, u := range s.users {
		out = append(out, u)
	}
	slices.SortFunc(out, func(a, b *db.User) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// LoginName is what the wire and policies call a person: the e-mail address, else the name.
func LoginName(u *db.User) string { return cmp.Or(u.Email, u.Name) }

// Access is the compiled policy. It is the same pointer while no fact that a policy can see has moved.
func (s *Snapshot) Access() *acl.Access { return s.access }

// ACLTailnet is the policy's view of the tailnet, with the slots of this snapshot. The caller must not modify it.
func (s *Snapshot) ACLTailnet() *acl.Tailnet { return s.facts }

// Policy is the stored policy and its state.
func (s *Snapshot) Policy() *PolicyState { return s.policy }

// Settings are the tailnet's stored settings.
func (s *Snapshot) Settings() *Settings { return s.settings }

// DERPMap is the relay map that clients get: that of the settings under the policy's. It is the same pointer while it stays the same.
func (s *Snapshot) DERPMap() *tailcfg.DERPMap { return s.derp }

// Tiles lists the tiles, ascending. Each node is in one.
func (s *Snapshot) Tiles() []*Tile { return s.tiles }

// Layout tells whether slots of two snapshots are comparable.
func (s *Snapshot) Layout() uint64 { return s.layout }

// Len is the number of nodes.
func (s *Snapshot) Len() int {
	n := 0
	for _, x := range s.nodes {
		if x != nil {
			n++
		}
	}
	return n
}

// Visible writes the peers of the node in slot into dst, which is grown as needed, and returns it: those the policy shows, less those
// not yet reachable, less itself. A dead node sees nobody.
func (s *Snapshot) Visible(slot int, dst Bits) Bits {
	dst = dst.resize(len(s.seen))
	n := s.NodeAt(slot)
	if n == nil || n.Dead() {
		clear(dst)
		return dst
	}
	row := s.access.Row(slot)
	words := row.Words()
	for i := range dst {
		if i < words {
			dst[i] = row.Word(i) & s.seen[i]
		} else {
			dst[i] = 0
		}
	}
	dst.Clear(slot)
	return dst
}

// OwnedBy is the set of slots whose nodes peers see as owned by u. The caller must not modify it.
func (s *Snapshot) OwnedBy(u tailcfg.UserID) Bits {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.owners == nil {
		s.owners = make(map[tailcfg.UserID]Bits)
		for _, n := range s.nodes {
			if n == nil {
				continue
			}
			b := s.owners[n.PeerUser()]
			if b == nil {
				b = make(Bits, len(s.seen))
				s.owners[n.PeerUser()] = b
			}
			b.Set(n.Slot)
		}
	}
	return s.owners[u]
}

// Bits is a set of slots.
type Bits []uint64

// NewBits is an empty set with room for so many slots.
func NewBits(slots int) Bits { return make(Bits, (slots+63)/64) }

// Has reports whether slot i is in the set.
func (b Bits) Has(i int) bool { return i>>6 < len(b) && b[i>>6]&(1<<(i&63)) != 0 }

// Set adds slot i, which must fit.
func (b Bits) Set(i int) { b[i>>6] |= 1 << (i & 63) }

// Clear removes slot i.
func (b Bits) Clear(i int) {
	if i >= 0 && i>>6 < len(b) {
		b[i>>6] &^= 1 << (i & 63)
	}
}

// Word is word i of the set, zero past its end.
func (b Bits) Word(i int) uint64 {
	if i < len(b) {
		return b[i]
	}
	return 0
}

func (b Bits) resize(n int) Bits {
	if cap(b) < n {
		return make(Bits, n)
	}
	return b[:n]
}

func newIndex(nodes []*Node) *index {
	x := &index{nodeKey: make(map[key.NodePublic]int, len(nodes)), machine: make(map[key.MachinePublic][]int, len(nodes)), names: make(map[string]int, len(nodes))}
	for i, n := range nodes {
		if n == nil {
			continue
		}
		x.nodeKey[n.NodeKey] = i
		x.machine[n.MachineKey] = append(x.machine[n.MachineKey], i)
		x.names[n.GivenName] = i
	}
	return x
}

// Seen reports whether peers may be told of the node in slot at all.
func (s *Snapshot) Seen(slot int) bool { return s.seen.Has(slot) }

// Sees reports whether the node in slot sees one of the nodes of b.
func (s *Snapshot) Sees(slot int, b Bits) bool {
	if n := s.NodeAt(slot); n == nil || n.Dead() {
		return false
	}
	row := s.access.Row(slot)
	for i, w := range b {
		if i == slot/64 {
			w &^= 1 << (slot % 64)
		}
		if w&row.Word(i)&s.seen.Word(i) != 0 {
			return true
		}
	}
	return false
}
