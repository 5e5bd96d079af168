package tailnet

import (
	"reflect"
	"slices"
	"sync"

	"tailscale.com/tailcfg"
	"tailscale.com/types/opt"

	"github.com/signalbox-net/signalbox/acl"
)

// A Move says how a node differs, to its peers, between two snapshots.
type Move uint8

// Moves. The patch moves can be said by a tailcfg.PeerChange that stock clients apply without rebuilding their network map.
const (
	MoveEndpoints Move = 1 << iota
	MoveDERP
	MoveOnline
	MoveDisco
	MoveFull // anything that only a whole node can say
)

// A Delta is what lies between two snapshots of one layout, for all viewers. Which part of it a viewer is told depends on what the viewer
// saw and sees. It is read-only but for its caches.
type Delta struct {
	From, To *Snapshot
	Reset    bool   // the layouts differ: viewers need a full map
	Slots    []int  // ascending: slots whose node, or its look to peers, differs
	Moves    []Move // parallel to Slots; of a node that came or went, MoveFull
	Users    []tailcfg.UserID
	Rows     bool // the policy was compiled again: what a viewer sees may differ in other slots too
	Settings bool // DNS, DERP map or options differ

	Memo sync.Map // for netmap: encoded answers, by what they contain
}

// maxDeltas bounds the memory of old snapshots that one snapshot keeps alive by its cache of deltas.
const maxDeltas = 64

// Diff computes what lies between from and to. The result is shared by all sessions that ask for the same pair.
func Diff(from, to *Snapshot) *Delta {
	to.mu.Lock()
	defer to.mu.Unlock()
	if d := to.deltas[from]; d != nil {
		return d
	}
	d := diff(from, to)
	if to.retired {
		return d
	}
	if to.deltas == nil {
		to.deltas = make(map[*Snapshot]*Delta)
	}
	if len(to.deltas) >= maxDeltas {
		clear(to.deltas)
	}
	to.deltas[from] = d
	return d
}

// retire drops the deltas that lead to s, and keeps none from now on. Each holds the snapshot that it leads from: kept any longer than sessions
// go this way, they would chain every snapshot there ever was to the newest.
func (s *Snapshot) retire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deltas, s.retired = nil, true
}

func diff(from, to *Snapshot) *Delta {
	d := &Delta{From: from, To: to, Reset: from.layout != to.layout, Rows: from.access != to.access, Settings: from.settings != to.settings}
	if d.Reset {
		return d
	}
	for _, i := range movedSlots(from.tiles, to.tiles) {
		if m := d.move(i, from.NodeAt(i), to.NodeAt(i)); m != 0 {
			d.Slots, d.Moves = append(d.Slots, i), append(d.Moves, m)
		}
	}
	d.users()
	return d
}

// movedSlots lists, ascending, the slots of all tiles that only one of the lists has.
func movedSlots(from, to []*Tile) (out []int) {
	for len(from) > 0 || len(to) > 0 {
		switch {
		case len(from) > 0 && len(to) > 0 && from[0] == to[0]:
			from, to = from[1:], to[1:]
		case len(to) == 0 || len(from) > 0 && from[0].Slots[0] < to[0].Slots[0]:
			out = append(out, from[0].Slots...)
			from = from[1:]
		default:
			out = append(out, to[0].Slots...)
			to = to[1:]
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (d *Delta) move(slot int, old, now *Node) Move {
	switch {
	case old == nil && now == nil:
		return 0
	case old == nil || now == nil, d.From.seen.Has(slot) != d.To.seen.Has(slot):
		return MoveFull
	}
	var m Move
	if old.Node != now.Node {
		m = peerMove(old, now)
	}
	if d.Rows && !d.From.access.Base(slot).Equal(d.To.access.Base(slot)) {
		m |= MoveFull
	}
	return m
}

// peerMove compares what peers are told of a node.
func peerMove(old, now *Node) Move {
	var m Move
	a, b := &old.State, &now.State
	if a.DiscoKey != b.DiscoKey {
		m |= MoveDisco
	}
	dead := old.Dead() && now.Dead() // peers are told neither where it is nor that it is there
	if !dead && !slices.Equal(a.Endpoints, b.Endpoints) {
		m |= MoveEndpoints
		if len(b.Endpoints) == 0 {
			m |= MoveFull // a patch cannot say "none"
		}
	}
	if !dead && a.HomeDERP != b.HomeDERP {
		m |= MoveDERP
		if b.HomeDERP == 0 {
			m |= MoveFull
		}
	}
	if !dead && a.Online != b.Online || (dead || !b.Online) && !a.LastSeen.Equal(b.LastSeen) {
		m |= MoveOnline
	}
	if old.NodeKey != now.NodeKey || old.FQDN != now.FQDN || old.User != now.User || old.IPv4 != now.IPv4 || old.IPv6 != now.IPv6 ||
		old.Dead() != now.Dead() || !old.Expiry.Equal(now.Expiry) || a.Cap != b.Cap || old.StableID != now.StableID || !slices.Equal(old.Tags, now.Tags) ||
		!sameHostinfo(a.Hostinfo, b.Hostinfo) {
		m |= MoveFull
	}
	return m
}

// sameHostinfo compares the parts of Hostinfo that peers are told: see PeerHostinfo.
func sameHostinfo(a, b *tailcfg.Hostinfo) bool {
	if a == b {
		return true
	}
	return reflect.DeepEqual(PeerHostinfo(a), PeerHostinfo(b))
}

// PeerHostinfo is the part of a node's Hostinfo that its peers need: what it runs, its peerapi services, SSH host keys, location and relay. Log ids, versions, hardware addresses and the rest stay here.
func PeerHostinfo(h *tailcfg.Hostinfo) *tailcfg.Hostinfo {
	if h == nil {
		return &tailcfg.Hostinfo{}
	}
	p := &tailcfg.Hostinfo{
		OS: h.OS, Hostname: h.Hostname, ShareeNode: h.ShareeNode, SSH_HostKeys: h.SSH_HostKeys, Location: h.Location, PeerRelay: h.PeerRelay,
	}
	if h.AppConnector.EqualBool(true) {
		p.AppConnector = opt.NewBool(true)
	}
	p.Services = peerServices(h.Services)
	return p
}

func (d *Delta) users() {
	for id, u := range d.To.users {
		if old := d.From.users[id]; old != nil && old != u && *old != *u {
			d.Users = append(d.Users, id)
		}
	}
	slices.Sort(d.Users)
}

// Look is how the node in slot peer looks to the node in slot viewer, whose rows and views are those of this snapshot.
func (s *Snapshot) Look(viewer *acl.PeerViews, peer int) *acl.PeerView {
	if viewer != nil {
		if k, ok := slices.BinarySearch(viewer.Slots, peer); ok {
			return viewer.Peers[k]
		}
	}
	return s.access.Base(peer)
}
