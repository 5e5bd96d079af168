package tailnet

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/db"
)

// Build makes the snapshot that follows prev by what moved in b; prev is nil for the first one, for which b must be Full. prev is not
// modified. A stored policy that does not compile denies everything and says so in PolicyState.Err.
func Build(prev *Snapshot, b *db.Batch) (*Snapshot, error) {
	if prev == nil && !b.Full {
		return nil, errors.New("the first snapshot needs everything")
	}
	s := &Snapshot{rev: b.To}
	m := s.take(prev, b)
	var err error
	if m.settings {
		var old *Settings
		if !b.Full && prev != nil {
			old = prev.settings
		}
		s.settings, err = parseSettings(old, b.Settings)
	} else {
		s.settings = prev.settings
	}
	s.takeNodes(prev, b, m)
	s.takeAccess(prev, b, m)
	s.takeDERPMap(prev, m)
	s.takeSeen()
	s.takeTiles(prev, m)
	return s, err
}

// moved says which derived parts of a snapshot have to be made again.
type moved struct {
	settings, suffix, keys, facts, policy bool
	members                               bool         // nodes came or went
	touched                               map[int]bool // slots whose node was replaced
}

func (s *Snapshot) take(prev *Snapshot, b *db.Batch) *moved {
	m := &moved{touched: make(map[int]bool)}
	m.settings = b.Full || len(b.Settings) > 0
	m.policy = b.Full || b.Policy != nil
	m.facts = b.Full || b.PrimariesChanged || len(b.Users) > 0
	switch {
	case b.Full:
		s.users = b.Users
	case len(b.Users) == 0:
		s.users = prev.users
	default:
		s.users = maps.Clone(prev.users)
		for id, u := range b.Users {
			if u == nil {
				delete(s.users, id)
			} else {
				s.users[id] = u
			}
		}
	}
	return m
}

func (s *Snapshot) takeNodes(prev *Snapshot, b *db.Batch, m *moved) {
	m.suffix = prev == nil || prev.settings.Suffix() != s.settings.Suffix()
	if b.Full || m.suffix || prev.sparse() || !appends(prev.ids, b) {
		s.relayout(prev, b)
		m.keys, m.facts = true, true
		for i := range s.nodes {
			m.touched[i] = true
		}
		return
	}
	s.layout, s.index, s.ids = prev.layout, prev.index, prev.ids
	if len(b.Nodes) == 0 {
		s.nodes = prev.nodes
		return
	}
	s.nodes = slices.Clone(prev.nodes)
	for _, id := range slices.Sorted(maps.Keys(b.Nodes)) {
		rec := b.Nodes[id]
		i, ok := slices.BinarySearch(s.ids, id)
		if !ok {
			if rec == nil {
				continue
			}
			i = len(s.ids)
			s.ids = append(s.ids, id)
			s.nodes = append(s.nodes, nil)
		}
		old := s.nodes[i]
		s.nodes[i] = s.newNode(rec, i)
		m.touched[i] = true
		m.members = m.members || (old == nil) != (rec == nil)
		m.keys = m.keys || keysMoved(old, s.nodes[i])
		m.facts = m.facts || factsMoved(old, s.nodes[i])
	}
	if m.keys {
		s.index = newIndex(s.nodes)
	}
}

// relayout gives every node a new slot. Sessions that hold an older layout are sent a full map.
func (s *Snapshot) relayout(prev *Snapshot, b *db.Batch) {
	recs := make(map[tailcfg.NodeID]*db.Node)
	if !b.Full {
		for _, n := range prev.nodes {
			if n != nil {
				recs[n.ID] = n.Node
			}
		}
	}
	for id, rec := range b.Nodes {
		if rec == nil {
			delete(recs, id)
		} else {
			recs[id] = rec
		}
	}
	s.layout = 1
	if prev != nil {
		s.layout = prev.layout + 1
	}
	s.ids = slices.Sorted(maps.Keys(recs))
	s.nodes = make([]*Node, len(s.ids))
	for i, id := range s.ids {
		s.nodes[i] = s.newNode(recs[id], i)
	}
	s.index = newIndex(s.nodes)
}

func (s *Snapshot) newNode(rec *db.Node, slot int) *Node {
	if rec == nil {
		return nil
	}
	return &Node{Node: rec, Slot: slot, FQDN: rec.GivenName + "." + s.settings.Suffix()}
}

// sparse reports whether more than a quarter of the slots are holes, which makes a new layout worth a full map for everybody.
func (s *Snapshot) sparse() bool {
	if len(s.nodes) < 256 {
		return false
	}
	return s.Len() < len(s.nodes)*3/4
}

func keysMoved(old, now *Node) bool {
	if old == nil || now == nil {
		return old != now
	}
	return old.NodeKey != now.NodeKey || old.MachineKey != now.MachineKey || old.GivenName != now.GivenName
}

// factsMoved reports whether something that a policy can see differs.
func factsMoved(old, now *Node) bool {
	if old == nil || now == nil {
		return old != now
	}
	if old.Node == now.Node {
		return false
	}
	return !sameFacts(nodeFacts(old), nodeFacts(now))
}

func (s *Snapshot) takeAccess(prev *Snapshot, b *db.Batch, m *moved) {
	s.policy = &PolicyState{}
	if prev != nil {
		s.policy = prev.policy
	}
	if m.policy {
		s.policy = &PolicyState{Version: b.Policy}
		if b.Policy != nil {
			s.policy.Parsed, s.policy.Err = acl.Parse(b.Policy.Text)
		}
	}
	if prev != nil && !m.facts && !m.policy && !m.settings {
		s.facts, s.access = prev.facts, prev.access
		return
	}
	s.facts = s.makeFacts(prev, b, m)
	parsed := s.policy.Parsed
	if parsed == nil && s.policy.Version == nil {
		parsed = denyAll()
	}
	if parsed != nil {
		access, stale, err := acl.CompileStored(parsed, s.facts)
		if err == nil {
			s.access = access
			s.policy = s.policy.with(stale)
			return
		}
		s.policy = &PolicyState{Version: s.policy.Version, Parsed: s.policy.Parsed, Err: err}
	}
	// A newer server's policy, or one that has outgrown a limit. What the nodes might do before cannot be told for those that came since:
	// deny, and say so in health.
	access, err := acl.Compile(denyAll(), s.facts)
	if err != nil {
		panic("the empty policy does not compile: " + err.Error())
	}
	s.access = access
}

// with is p in force, with the names in it that are stale now. It is p itself while nothing about it has changed.
func (p *PolicyState) with(stale acl.Errors) *PolicyState {
	var now error
	if len(stale) > 0 {
		now = stale
	}
	if p.Err == nil && fmt.Sprint(p.Stale) == fmt.Sprint(now) {
		return p
	}
	return &PolicyState{Version: p.Version, Parsed: p.Parsed, Stale: now}
}

// takeDERPMap puts the policy's derpMap over the servers' relays: a region of it replaces theirs, a null one removes it. The pointer stays the
// same while the content does.
func (s *Snapshot) takeDERPMap(prev *Snapshot, m *moved) {
	if prev != nil && !m.settings && !m.policy {
		s.derp = prev.derp
		return
	}
	s.derp = s.settings.DERPMap
	if s.policy.Parsed != nil && s.policy.Parsed.DERPMap() != nil {
		own := s.policy.Parsed.DERPMap()
		out := &tailcfg.DERPMap{HomeParams: s.derp.HomeParams, Regions: map[int]*tailcfg.DERPRegion{}}
		if !own.OmitDefaultRegions {
			maps.Copy(out.Regions, s.derp.Regions)
		}
		for id, r := range own.Regions {
			if r == nil {
				delete(out.Regions, id)
			} else {
				out.Regions[id] = r
			}
		}
		s.derp = out
	}
	if prev != nil && reflect.DeepEqual(s.derp, prev.derp) {
		s.derp = prev.derp
	}
}

// takeSeen finds which nodes peers may be told of: a node without a disco key cannot be reached, and a client never repairs such a peer.
func (s *Snapshot) takeSeen() {
	s.seen = NewBits(len(s.nodes))
	for i, n := range s.nodes {
		if n != nil && !n.State.DiscoKey.IsZero() {
			s.seen.Set(i)
		}
	}
}

// appends reports whether every node that b adds has a higher id than all known ones, so that slots stay in order.
func appends(ids []tailcfg.NodeID, b *db.Batch) bool {
	if len(ids) == 0 {
		return true
	}
	last := ids[len(ids)-1]
	for id, rec := range b.Nodes {
		if rec == nil || id > last {
			continue
		}
		if _, ok := slices.BinarySearch(ids, id); !ok {
			return false
		}
	}
	return true
}
