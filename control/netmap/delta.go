package netmap

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"slices"
	"sync"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/control/tailnet"
)

// Between is what a viewer that was last sent d.From must be sent to arrive at d.To: none, one or several messages, in order. A cheap patch
// is never in one message with anything that makes a client rebuild its map.
func Between(d *tailnet.Delta, v Viewer) []Message {
	if d.Reset || d.From.NodeAt(v.Slot) == nil {
		return reset(d, v)
	}
	var out []Message
	c := changesFor(d, v.Slot)
	if f := peersMessage(d, v.Slot, c); f != nil {
		out = append(out, Message{Frames: f})
	}
	if f := selfMessage(d, v); f != nil {
		out = append(out, Message{Frames: f})
	}
	if len(c.patches) > 0 {
		out = append(out, Message{Frames: []Frame{patchFrame(d, c.patches)}})
	}
	return out
}

// reset is a full map in the middle of a session. A client takes an absent peer list for "unchanged", so when nothing is left to see, what
// may have been seen is removed by name first.
func reset(d *tailnet.Delta, v Viewer) []Message {
	full := Full(d.To, v)
	if nonEmpty(d.To.Visible(v.Slot, nil)) {
		return []Message{full}
	}
	gone := []tailcfg.NodeID{}
	for _, n := range d.From.Nodes() {
		if n != nil && n.ID != d.To.NodeAt(v.Slot).ID {
			gone = append(gone, n.ID)
		}
	}
	removal := append(append([]byte(`{"PeersRemoved":`), must(gone)...), '}')
	return []Message{{Frames: []Frame{frame(removal)}}, full}
}

// changes is the part of a delta that one viewer is told.
type changes struct {
	removed []int // slots that the viewer saw and does not see
	changed []int // slots to send whole
	patches []patch
	users   []tailcfg.UserID // profiles to send, ascending
	views   *acl.PeerViews
}

type patch struct {
	slot int
	move tailnet.Move
}

func changesFor(d *tailnet.Delta, viewer int) *changes {
	c := &changes{views: d.To.Access().Views(viewer)}
	if d.Rows || d.From.NodeAt(viewer).Dead() != d.To.NodeAt(viewer).Dead() {
		c.byRows(d, viewer)
	} else {
		c.bySlots(d, viewer)
	}
	return c
}

// bySlots serves the usual delta, in which the policy was not compiled again: only slots that moved can matter.
func (c *changes) bySlots(d *tailnet.Delta, viewer int) {
	if d.To.NodeAt(viewer).Dead() {
		return
	}
	row := d.To.Access().Row(viewer)
	for i, slot := range d.Slots {
		if slot == viewer || !row.Has(slot) {
			continue
		}
		was, is := d.From.Seen(slot), d.To.Seen(slot)
		c.add(slot, d.Moves[i], was, is)
	}
	c.profiles(d, viewer)
}

// rowBits are the scratch sets of byRows.
type rowBits struct{ from, to tailnet.Bits }

var rowPool = sync.Pool{New: func() interface{} { return new(rowBits) }}

// byRows compares all that the viewer saw with all that it sees.
func (c *changes) byRows(d *tailnet.Delta, viewer int) {
	b := rowPool.Get().(*rowBits)
	defer rowPool.Put(b)
	b.from, b.to = d.From.Visible(viewer, b.from), d.To.Visible(viewer, b.to)
	next := 0
	oldViews := d.From.Access().Views(viewer)
	sameViews := oldViews.Equal(c.views)
	for t := range max(len(b.from), len(b.to)) {
		from, to := b.from.Word(t), b.to.Word(t)
		moved := from ^ to
		for next < len(d.Slots) && d.Slots[next] < (t+1)*64 {
			moved |= 1 << (d.Slots[next] & 63)
			next++
		}
		if !sameViews {
			moved |= lookChanges(d, oldViews, c.views, t)
		}
		for moved &= from | to; moved != 0; moved &= moved - 1 {
			bit := bits.TrailingZeros64(moved)
			slot := t*64 + bit
			was, is := from&(1<<bit) != 0, to&(1<<bit) != 0
			move := tailnet.MoveFull
			if k, ok := slices.BinarySearch(d.Slots, slot); ok && was && is && sameLookFor(d, oldViews, c.views, slot) {
				move = d.Moves[k]
			}
			c.add(slot, move, was, is)
		}
	}
	c.profiles(d, viewer)
}

func sameLookFor(d *tailnet.Delta, old, now *acl.PeerViews, slot int) bool {
	return old.NoIPv4 == now.NoIPv4 && d.From.Look(old, slot).Equal(d.To.Look(now, slot))
}

// lookChanges are the nodes of word t that look different to the viewer, as far as its own views say so.
func lookChanges(d *tailnet.Delta, old, now *acl.PeerViews, t int) uint64 {
	if old.NoIPv4 != now.NoIPv4 {
		return ^uint64(0)
	}
	var w uint64
	for _, v := range []*acl.PeerViews{old, now} {
		from, _ := slices.BinarySearch(v.Slots, t*64)
		for i := from; i < len(v.Slots) && v.Slots[i] < (t+1)*64; i++ {
			slot := v.Slots[i]
			if d.From.NodeAt(slot) != nil && d.To.NodeAt(slot) != nil && !d.From.Look(old, slot).Equal(d.To.Look(now, slot)) {
				w |= 1 << (slot & 63)
			}
		}
	}
	return w
}

func (c *changes) add(slot int, move tailnet.Move, was, is bool) {
	switch {
	case was && !is:
		c.removed = append(c.removed, slot)
	case !is:
	case !was || move&tailnet.MoveFull != 0:
		c.changed = append(c.changed, slot)
	default:
		c.patches = append(c.patches, patch{slot, move})
	}
}

// profiles collects the owners of sent nodes of whom the viewer saw nothing before, and the owners it sees whose profile moved.
func (c *changes) profiles(d *tailnet.Delta, viewer int) {
	own := d.From.NodeAt(viewer).SelfUser()
	for _, slot := range c.changed {
		id := d.To.NodeAt(slot).PeerUser()
		if i, ok := slices.BinarySearch(c.users, id); !ok && id != own && !d.From.Sees(viewer, d.From.OwnedBy(id)) {
			c.users = slices.Insert(c.users, i, id)
		}
	}
	for _, id := range d.Users {
		if id != d.To.NodeAt(viewer).SelfUser() && !d.To.Sees(viewer, d.To.OwnedBy(id)) {
			continue
		}
		if i, ok := slices.BinarySearch(c.users, id); !ok {
			c.users = slices.Insert(c.users, i, id)
		}
	}
}

// maxKeyed is how many nodes a message may change and still be cached as a whole.
const maxKeyed = 64

// peersMessage says which peers went, came and changed; nil when none did.
func peersMessage(d *tailnet.Delta, viewer int, c *changes) []Frame {
	if len(c.removed) == 0 && len(c.changed) == 0 && len(c.users) == 0 {
		return nil
	}
	if len(c.changed) > maxKeyed {
		return bigPeersMessage(d, viewer, c)
	}
	key := peersKey(d, c)
	return []Frame{deltaCache(d).get(key, func() Frame {
		var text bytes.Buffer
		text.WriteByte('{')
		c.writeHead(d, &text)
		if len(c.changed) > 0 {
			sep(&text)
			text.WriteString(`"PeersChanged":[`)
			for i, slot := range c.changed {
				if i > 0 {
					text.WriteByte(',')
				}
				text.Write(peerJSON(d.To, c.views, slot))
			}
			text.WriteByte(']')
		}
		text.WriteByte('}')
		return frame(text.Bytes())
	})}
}

// writeHead writes what is short: removals and profiles.
func (c *changes) writeHead(d *tailnet.Delta, text *bytes.Buffer) {
	if len(c.removed) > 0 {
		ids := make([]tailcfg.NodeID, len(c.removed))
		for i, slot := range c.removed {
			ids[i] = d.From.NodeAt(slot).ID
		}
		sep(text)
		text.WriteString(`"PeersRemoved":`)
		text.Write(must(ids))
	}
	if len(c.users) > 0 {
		list := make([]tailcfg.UserProfile, len(c.users))
		for i, id := range c.users {
			list[i] = userProfile(d.To, id)
		}
		sep(text)
		text.WriteString(`"UserProfiles":`)
		text.Write(must(list))
	}
}

// sep writes the comma between two members of an object that text has begun.
func sep(text *bytes.Buffer) {
	if b := text.Bytes(); len(b) > 0 && b[len(b)-1] != '{' {
		text.WriteByte(',')
	}
}

// bigPeersMessage uses the frames of full maps.
func bigPeersMessage(d *tailnet.Delta, viewer int, c *changes) []Frame {
	var w writer
	w.text("{")
	c.writeHead(d, &w.own)
	sep(&w.own)
	w.text(`"PeersChanged":[`)
	seen := tailnet.NewBits(len(d.To.Nodes()))
	for _, slot := range c.changed {
		seen.Set(slot)
	}
	w.peers(d.To, viewer, seen)
	w.text("]}")
	return w.done()
}

// peersKey names the content of a small peers message.
func peersKey(d *tailnet.Delta, c *changes) string {
	b := []byte{'p'}
	for _, list := range [][]int{c.removed, c.changed} {
		b = binary.AppendUvarint(b, uint64(len(list)))
		for _, slot := range list {
			b = binary.AppendUvarint(b, uint64(slot))
		}
	}
	for _, id := range c.users {
		b = binary.AppendUvarint(b, uint64(id))
	}
	if c.views.NoIPv4 || len(c.views.Slots) > 0 {
		for _, slot := range c.changed {
			if c.views.NoIPv4 {
				b = append(b, '6')
			}
			if look := d.To.Look(c.views, slot); look != d.To.Access().Base(slot) {
				b = append(b, lookKey(look)...)
			}
		}
	}
	return string(b)
}

// patchFrame says the cheap changes. Its order follows the slots.
func patchFrame(d *tailnet.Delta, list []patch) Frame {
	b := []byte{'c'}
	for _, p := range list {
		b = binary.AppendUvarint(b, uint64(p.slot))
		b = append(b, byte(p.move))
	}
	return deltaCache(d).get(string(b), func() Frame {
		out := make([]*tailcfg.PeerChange, 0, len(list))
		for _, p := range list {
			out = append(out, peerChange(d.To.NodeAt(p.slot), p.move))
		}
		return frame(append(append([]byte(`{"PeersChangedPatch":`), must(out)...), '}'))
	})
}

func peerChange(n *tailnet.Node, m tailnet.Move) *tailcfg.PeerChange {
	p := &tailcfg.PeerChange{NodeID: n.ID}
	if m&tailnet.MoveEndpoints != 0 {
		p.Endpoints = endpoints(n)
	}
	if m&tailnet.MoveDERP != 0 {
		p.DERPRegion = n.State.HomeDERP
	}
	if m&tailnet.MoveDisco != 0 {
		p.DiscoKey = &n.State.DiscoKey
	}
	if m&tailnet.MoveOnline != 0 {
		online := n.State.Online && !n.Dead()
		p.Online = &online
		if !online {
			p.LastSeen = lastSeen(n)
		}
	}
	return p
}

// selfMessage says what moved about the viewer itself and its tailnet; nil when nothing did.
func selfMessage(d *tailnet.Delta, v Viewer) []Frame {
	var w writer
	w.text("{")
	if selfMoved(d, v.Slot) {
		w.text(`"Node":`)
		w.json(selfNode(d.To, v.Slot))
		if n := d.To.NodeAt(v.Slot); n.Tagged() || d.From.NodeAt(v.Slot).User != n.User {
			w.own.Write(profilesText([]tailcfg.UserProfile{selfProfile(d.To, n)}))
		}
	}
	dead := d.From.NodeAt(v.Slot).Dead() != d.To.NodeAt(v.Slot).Dead()
	if d.Rows || dead {
		a, b := d.From.Access(), d.To.Access()
		if dead || !a.Filter(v.Slot).Equal(b.Filter(v.Slot)) {
			w.member(filterText(rulesOf(d.To, v.Slot)))
		}
		if dead || !a.SSH(v.Slot).Equal(b.SSH(v.Slot)) {
			w.member(sshText(d.To, v.Slot))
		}
	}
	if d.From.DERPMap() != d.To.DERPMap() {
		w.member(append([]byte(`,"DERPMap":`), must(d.To.DERPMap())...))
	}
	if d.Settings {
		a, b := d.From.Settings(), d.To.Settings()
		if a.DNS.BaseDomain != b.DNS.BaseDomain {
			w.member(append([]byte(`,"Domain":`), must(b.DNS.BaseDomain)...))
		}
		if a.Key(tailnet.SettingDialPlan) != b.Key(tailnet.SettingDialPlan) && b.DialPlan != nil {
			w.member(dialPlanText(d.To))
		}
	}
	if dnsMoved(d, v.Slot) {
		w.member(append([]byte(`,"DNSConfig":`), must(dnsConfig(d.To, v.Slot))...))
	}
	if w.own.Len() == 1 {
		return nil
	}
	w.text("}")
	return shared(d, w.own.Bytes())
}

// shared compresses a message once for all viewers who are sent the same text.
func shared(d *tailnet.Delta, text []byte) []Frame {
	return []Frame{deltaCache(d).get("s"+string(text), func() Frame { return frame(text) })}
}

// member writes a member that begins with a comma, which the first one of an object goes without.
func (w *writer) member(text []byte) {
	if w.own.Len() == 1 {
		text = text[1:]
	}
	w.own.Write(text)
}

func dnsMoved(d *tailnet.Delta, slot int) bool {
	if d.Settings {
		a, b := d.From.Settings(), d.To.Settings()
		if a.Key(tailnet.SettingDNS) != b.Key(tailnet.SettingDNS) || a.Key(tailnet.SettingExtraRecords) != b.Key(tailnet.SettingExtraRecords) {
			return true
		}
	}
	if personalDNS(d.To, slot) && deviceMoved(d.From.NodeAt(slot), d.To.NodeAt(slot)) {
		return true
	}
	if d.From.Access() == d.To.Access() {
		return false
	}
	p, x := nextDNSAttrs(d.From, slot)
	q, y := nextDNSAttrs(d.To, slot)
	return p != q || x != y
}
