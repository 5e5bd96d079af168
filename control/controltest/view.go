package controltest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// A View is what a client believes of its tailnet. Apply changes it as the stock client's map session does.
type View struct {
	Node     *tailcfg.Node
	Peers    map[tailcfg.NodeID]*tailcfg.Node
	Profiles map[tailcfg.UserID]tailcfg.UserProfile
	DERPMap  *tailcfg.DERPMap
	DNS      *tailcfg.DNSConfig
	Filters  map[string][]tailcfg.FilterRule
	SSH      *tailcfg.SSHPolicy
	Domain   string
	DialPlan *tailcfg.ControlDialPlan // nil: none was sent

	// Faults are what a client would have dropped without a word, such as a patch for a peer that it does not have.
	Faults []string
}

// Apply takes one message into the view, in the order of the stock client.
func (v *View) Apply(m *tailcfg.MapResponse) {
	if m.KeepAlive {
		return
	}
	if v.Node == nil && m.Node == nil {
		v.fault("the first message lacks the node")
	}
	v.applyPeers(m)
	if m.Node != nil {
		v.Node = m.Node
	}
	for _, p := range m.UserProfiles {
		if v.Profiles == nil {
			v.Profiles = map[tailcfg.UserID]tailcfg.UserProfile{}
		}
		v.Profiles[p.ID] = p
	}
	if m.DERPMap != nil {
		v.DERPMap = m.DERPMap
	}
	if m.PacketFilter != nil {
		v.fault("the message has the unnamed packet filter")
	}
	for name, rules := range m.PacketFilters {
		if v.Filters == nil {
			v.Filters = map[string][]tailcfg.FilterRule{}
		}
		if rules == nil {
			delete(v.Filters, name)
		} else {
			v.Filters[name] = rules
		}
	}
	if m.DNSConfig != nil {
		v.DNS = m.DNSConfig
	}
	if m.SSHPolicy != nil {
		v.SSH = m.SSHPolicy
	}
	if m.Domain != "" {
		v.Domain = m.Domain
	}
	if m.ControlDialPlan != nil {
		v.DialPlan = m.ControlDialPlan
	}
	v.checkProfiles(m.UserProfiles)
}

func (v *View) applyPeers(m *tailcfg.MapResponse) {
	if v.Peers == nil {
		v.Peers = map[tailcfg.NodeID]*tailcfg.Node{}
	}
	if len(m.Peers) > 0 {
		if len(m.PeersChanged)+len(m.PeersRemoved)+len(m.PeersChangedPatch) > 0 {
			v.fault("a full peer list comes with changes")
		}
		clear(v.Peers)
		v.upsert(m.Peers)
		return
	}
	for _, id := range m.PeersRemoved {
		delete(v.Peers, id)
	}
	v.upsert(m.PeersChanged)
	for _, p := range m.PeersChangedPatch {
		old := v.Peers[p.NodeID]
		if old == nil {
			v.fault("patch for the unknown peer %d", p.NodeID)
			continue
		}
		v.Peers[p.NodeID] = patched(old, p)
	}
}

func (v *View) upsert(list []*tailcfg.Node) {
	if !slices.IsSortedFunc(list, func(a, b *tailcfg.Node) int { return int(a.ID - b.ID) }) {
		v.fault("peers are not in order of their ids")
	}
	for _, n := range list {
		v.Peers[n.ID] = n
	}
}

func patched(old *tailcfg.Node, p *tailcfg.PeerChange) *tailcfg.Node {
	n := old.Clone()
	if p.DERPRegion != 0 {
		n.HomeDERP = int(p.DERPRegion)
	}
	if p.Endpoints != nil {
		n.Endpoints = p.Endpoints
	}
	if p.DiscoKey != nil {
		n.DiscoKey = *p.DiscoKey
	}
	if p.Online != nil {
		online := *p.Online
		n.Online = &online
	}
	if p.LastSeen != nil {
		at := *p.LastSeen
		n.LastSeen = &at
	}
	if p.Cap != 0 {
		n.Cap = p.Cap
	}
	if p.Key != nil {
		n.Key = *p.Key
	}
	if p.KeyExpiry != nil {
		n.KeyExpiry = *p.KeyExpiry
	}
	if p.CapMap != nil {
		n.CapMap = p.CapMap
	}
	return n
}

// checkProfiles holds that every owner in view has a profile, and that nobody else's was sent.
func (v *View) checkProfiles(sent []tailcfg.UserProfile) {
	if v.Node == nil {
		return
	}
	owners := map[tailcfg.UserID]bool{}
	for _, n := range append(slices.Collect(maps.Values(v.Peers)), v.Node) {
		owners[n.User] = true
		if _, ok := v.Profiles[n.User]; !ok && !n.Expired {
			v.fault("node %d has the user %d, who has no profile", n.ID, n.User)
		}
	}
	for _, p := range sent {
		if !owners[p.ID] {
			v.fault("the profile of %s was sent, of whom nothing can be seen", p.LoginName)
		}
	}
}

func (v *View) fault(format string, args ...any) {
	v.Faults = append(v.Faults, fmt.Sprintf(format, args...))
}

// Peer finds a peer by the first label of its name; nil when there is none.
func (v *View) Peer(label string) *tailcfg.Node {
	for _, n := range v.Peers {
		if strings.HasPrefix(n.Name, label+".") {
			return n
		}
	}
	return nil
}

// Names lists the first labels of the peers' names, sorted.
func (v *View) Names() []string {
	var out []string
	for _, n := range v.Peers {
		label, _, _ := strings.Cut(n.Name, ".")
		out = append(out, label)
	}
	slices.Sort(out)
	return out
}

// Text renders what two views of the same moment must agree on. Left out are profiles of users whom the view no longer needs, LastSeen of
// peers that are online, and what a node knows of itself without being told.
func (v *View) Text() string {
	self := v.Node.Clone()
	self.DiscoKey, self.Endpoints, self.HomeDERP, self.Hostinfo = key.DiscoPublic{}, nil, 0, tailcfg.HostinfoView{}
	var b bytes.Buffer
	line := func(name string, x any) {
		text, err := json.Marshal(x)
		if err != nil {
			text = []byte(err.Error())
		}
		fmt.Fprintf(&b, "%s %s\n", name, text)
	}
	line("self", self)
	needed := map[tailcfg.UserID]bool{v.Node.User: true}
	for _, id := range slices.Sorted(maps.Keys(v.Peers)) {
		n := v.Peers[id].Clone()
		if n.Online != nil && *n.Online {
			n.LastSeen = nil
		}
		needed[n.User] = true
		line("peer", n)
	}
	for _, id := range slices.Sorted(maps.Keys(needed)) {
		line("profile", v.Profiles[id])
	}
	line("derp", v.DERPMap)
	line("dns", v.DNS)
	line("filters", v.Filters)
	line("ssh", v.SSH)
	line("domain", v.Domain)
	line("dial plan", v.DialPlan)
	return b.String()
}
