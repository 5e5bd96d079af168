package netmap

import (
	"bytes"
	"math/bits"
	"slices"
	"strings"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/control/tailnet"
)

// Full is the message that begins a session: everything that the node in v.Slot may know, in the order in which the client needs it.
//
// MapResponse.ClientVersion is left out: without it a client says nothing of updates, and this server knows of no releases, so that neither
// "you run the latest" nor a newer version would be true.
func Full(s *tailnet.Snapshot, v Viewer) Message {
	n := s.NodeAt(v.Slot)
	seen := s.Visible(v.Slot, nil)
	var w writer
	w.text(`{"Node":`)
	self := selfNode(s, v.Slot)
	w.json(self)
	// Clients before capability version 131 read this field, newer ones the capability of the same meaning.
	if update := self.CapMap[tailcfg.NodeAttrDefaultAutoUpdate]; len(update) == 1 {
		w.text(`,"DefaultAutoUpdate":` + string(update[0]))
	}
	w.text(`,"Domain":`)
	w.json(s.Settings().DNS.BaseDomain)
	w.text(`,"CollectServices":`)
	w.json(s.Settings().Options.CollectServices)
	if !v.Now.IsZero() {
		w.text(`,"ControlTime":`)
		w.json(v.Now.UTC().Truncate(time.Second))
	}
	if !s.Settings().Options.LogTail {
		w.text(`,"Debug":{"DisableLogTail":true}`)
	}
	if s.Settings().DialPlan != nil {
		w.own.Write(dialPlanText(s))
	}
	w.frame(derpFrame(s))
	w.frame(dnsFrame(s, v.Slot))
	w.frame(filterFrame(s, v.Slot))
	w.frame(sshFrame(s, v.Slot))
	w.frame(profilesFrame(s, n, seen))
	if nonEmpty(seen) {
		w.text(`,"Peers":[`)
		w.peers(s, v.Slot, seen)
		w.text(`]`)
	}
	w.text(`}`)
	return Message{Frames: w.done(), Full: true}
}

func nonEmpty(b tailnet.Bits) bool {
	return slices.ContainsFunc(b, func(w uint64) bool { return w != 0 })
}

// writer collects frames, and text that is not shared into frames of its own.
type writer struct {
	frames []Frame
	own    bytes.Buffer
}

func (w *writer) text(s string) { w.own.WriteString(s) }

func (w *writer) json(v interface{}) { w.own.Write(must(v)) }

func (w *writer) frame(f Frame) {
	w.flush()
	w.frames = append(w.frames, f)
}

func (w *writer) flush() {
	if w.own.Len() > 0 {
		w.frames = append(w.frames, frame(w.own.Bytes()))
		w.own.Reset()
	}
}

func (w *writer) done() []Frame {
	w.flush()
	return w.frames
}

// peers writes the nodes of seen as JSON objects with commas between them, out of shared frames.
func (w *writer) peers(s *tailnet.Snapshot, viewer int, seen tailnet.Bits) {
	views := s.Access().Views(viewer)
	first := true
	add := func(t *tailnet.Tile, word uint64) {
		if !first {
			w.frame(commaFrame)
		}
		first = false
		w.frame(tileFrame(s, views, t, word))
	}
	for _, t := range s.Tiles() {
		word := t.Word(seen)
		own, in := slices.BinarySearch(t.Slots, viewer)
		if !in {
			if word != 0 {
				add(t, word)
			}
			continue
		}
		// The viewer's own tile misses the viewer, so nobody else has it. It is sent as eighths, of which only the one around the viewer is
		// sent node by node.
		for shift := 0; shift < tailnet.TileNodes; shift += 8 {
			part := word & (0xff << shift)
			if own/8 != shift/8 && part != 0 {
				add(t, part)
				continue
			}
			for ; part != 0; part &= part - 1 {
				add(t, part&-part)
			}
		}
	}
}

// tileKey names the bytes made of the nodes of a tile that are in word, where views changes how some of them look.
type tileKey struct {
	word  uint64
	looks string
}

func tileFrame(s *tailnet.Snapshot, views *acl.PeerViews, t *tailnet.Tile, word uint64) Frame {
	key := tileKey{word, looks(views, t, word)}
	return tileCache(t).get(key, func() Frame {
		var text bytes.Buffer
		for b := word; b != 0; b &= b - 1 {
			if text.Len() > 0 {
				text.WriteByte(',')
			}
			text.Write(peerJSON(s, views, t.Slots[bits.TrailingZeros64(b)]))
		}
		return frame(text.Bytes())
	})
}

// looks is a digest of what views changes about the nodes of word in t; empty in tailnets without routes and attributes.
func looks(views *acl.PeerViews, t *tailnet.Tile, word uint64) string {
	if views == nil || (!views.NoIPv4 && len(views.Slots) == 0) {
		return ""
	}
	var out strings.Builder
	if views.NoIPv4 {
		out.WriteString("6")
	}
	last := t.Slots[len(t.Slots)-1]
	from, _ := slices.BinarySearch(views.Slots, t.Slots[0])
	for i := from; i < len(views.Slots) && views.Slots[i] <= last; i++ {
		if k, in := slices.BinarySearch(t.Slots, views.Slots[i]); in && word&(1<<k) != 0 {
			out.WriteByte(byte('A' + k))
			out.WriteString(lookKey(views.Peers[i]))
		}
	}
	return out.String()
}

// lookKey is the content of a look as text.
func lookKey(p *acl.PeerView) string {
	return string(must(p))
}

// peerJSON is the JSON object of the node in slot for a viewer with views. The usual look is made once per node.
func peerJSON(s *tailnet.Snapshot, views *acl.PeerViews, slot int) []byte {
	n := s.NodeAt(slot)
	look := s.Look(views, slot)
	noV4 := views != nil && views.NoIPv4
	if look != s.Access().Base(slot) || noV4 {
		return must(peerNode(n, look, noV4))
	}
	type kept struct {
		look *acl.PeerView
		text []byte
	}
	if k, ok := n.Wire.Load("peer"); ok && k.(kept).look.Equal(look) {
		return k.(kept).text
	}
	text := must(peerNode(n, look, false))
	n.Wire.Store("peer", kept{look, text})
	return text
}

// dialPlanText says where clients find the servers. A client keeps a plan for the life of its process, so one that is over is sent as well: it
// is an empty one (tailcfg.MapResponse.ControlDialPlan).
func dialPlanText(s *tailnet.Snapshot) []byte {
	return append([]byte(`,"ControlDialPlan":`), must(s.Settings().DialPlan)...)
}

// derpFrame is the relay map, the same for all viewers.
func derpFrame(s *tailnet.Snapshot) Frame {
	return memo(s, "derp", func() Frame { return frame(append([]byte(`,"DERPMap":`), must(s.DERPMap())...)) })
}

// dnsFrame is shared by all viewers unless resolvers are told which device asks.
func dnsFrame(s *tailnet.Snapshot, slot int) Frame {
	make := func() Frame { return frame(append([]byte(`,"DNSConfig":`), must(dnsConfig(s, slot))...)) }
	if personalDNS(s, slot) {
		return make()
	}
	return memo(s, "dns", make)
}

// personalDNS reports whether the node's DNS settings are for it alone.
func personalDNS(s *tailnet.Snapshot, slot int) bool {
	for _, a := range s.Settings().DNS.Global {
		if strings.HasPrefix(a, nextDNS) {
			return true
		}
	}
	profile, _ := nextDNSAttrs(s, slot)
	return profile != ""
}

// rulesOf is the node's packet filter; a dead node lets nothing in.
func rulesOf(s *tailnet.Snapshot, slot int) []tailcfg.FilterRule {
	if s.NodeAt(slot).Dead() {
		return nil
	}
	return s.Access().Filter(slot).Rules
}

// filterText is always the named form: an empty list of rules cannot be said by MapResponse.PacketFilter.
func filterText(rules []tailcfg.FilterRule) []byte {
	if rules == nil {
		rules = []tailcfg.FilterRule{}
	}
	return append(append([]byte(`,"PacketFilters":{"base":`), must(rules)...), '}')
}

func filterFrame(s *tailnet.Snapshot, slot int) Frame {
	if s.NodeAt(slot).Dead() {
		return frame(filterText(nil))
	}
	return memo(s, s.Access().Filter(slot), func() Frame { return frame(filterText(rulesOf(s, slot))) })
}

func sshText(s *tailnet.Snapshot, slot int) []byte {
	p := &tailcfg.SSHPolicy{Rules: []*tailcfg.SSHRule{}}
	if !s.NodeAt(slot).Dead() {
		if w := s.Access().SSH(slot).Wire(); w != nil && len(w.Rules) > 0 {
			p = w
		}
	}
	return append([]byte(`,"SSHPolicy":`), must(p)...)
}

func sshFrame(s *tailnet.Snapshot, slot int) Frame {
	if s.NodeAt(slot).Dead() {
		return frame(sshText(s, slot))
	}
	return memo(s, s.Access().SSH(slot), func() Frame { return frame(sshText(s, slot)) })
}

// profilesFrame names the owner of the node and of every node in seen: a peer without one breaks Tailscale SSH and WhoIs.
func profilesFrame(s *tailnet.Snapshot, n *tailnet.Node, seen tailnet.Bits) Frame {
	ids := owners(s, seen)
	own := selfProfile(s, n)
	if n.Tagged() {
		list := []tailcfg.UserProfile{own}
		for _, id := range ids {
			list = append(list, userProfile(s, id))
		}
		return frame(profilesText(list))
	}
	if i, ok := slices.BinarySearch(ids, n.User); !ok {
		ids = slices.Insert(ids, i, n.User)
	}
	return memo(s, profilesKey(string(must(ids))), func() Frame {
		var list []tailcfg.UserProfile
		for _, id := range ids {
			list = append(list, userProfile(s, id))
		}
		return frame(profilesText(list))
	})
}

type profilesKey string

func profilesText(list []tailcfg.UserProfile) []byte {
	return append([]byte(`,"UserProfiles":`), must(list)...)
}

// owners lists the users that peers see as owning the nodes of b, ascending.
func owners(s *tailnet.Snapshot, b tailnet.Bits) []tailcfg.UserID {
	set := make(map[tailcfg.UserID]bool)
	var last tailcfg.UserID = -1
	for t, w := range b {
		for ; w != 0; w &= w - 1 {
			id := s.NodeAt(t*64 + bits.TrailingZeros64(w)).PeerUser()
			if id != last {
				set[id] = true
				last = id
			}
		}
	}
	out := make([]tailcfg.UserID, 0, len(set))
	for id := range set {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}
