package acl

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"tailscale.com/tailcfg"
)

// Effect is what changes for a fleet between two compiled policies: not the
// text of the policies but what they allow.
type Effect struct {
	Flows  []FlowChange  `json:"flows"`
	Peers  []PeerChange  `json:"peers"`
	Logins []LoginChange `json:"logins"`
	Caps   []CapChange   `json:"caps"`
}

// Empty reports whether nothing changes.
func (e *Effect) Empty() bool {
	return len(e.Flows)+len(e.Peers)+len(e.Logins)+len(e.Caps) == 0
}

// FlowChange says that every one of some senders may newly, or may no longer,
// open something on every one of some receivers other than itself.
type FlowChange struct {
	Opened bool     `json:"opened"`
	From   []string `json:"from"` // hostnames and address ranges
	To     []string `json:"to"`
	// Allow is "tcp:443", "udp:1-100", "icmp", another protocol's name, or
	// "app:" with a capability and its values.
	Allow string `json:"allow"`

	from, to []int // points
	span     span
}

// PeerChange says that some nodes newly see, or no longer see, some others.
// Both directions are listed.
type PeerChange struct {
	Appear  bool     `json:"appear"`
	Viewers []string `json:"viewers"`
	Peers   []string `json:"peers"`
}

// LoginChange says what becomes of SSH logins.
type LoginChange struct {
	From []string `json:"from"`
	To   []string `json:"to"`
	User string   `json:"user"` // login name; "*" is every name but root that no rule mentions
	Was  string   `json:"was"`  // accept, check or deny
	Now  string   `json:"now"`
}

// CapChange says that some nodes gain or lose a capability or one of its values.
type CapChange struct {
	Gained bool     `json:"gained"`
	Nodes  []string `json:"nodes"`
	Cap    string   `json:"cap"`
	Values []string `json:"values,omitempty"`
}

// Diff compares two compiled policies, whose tailnets may differ too; nodes
// are the same when their ids are.
func Diff(old, new *Access) *Effect {
	d := &differ{sides: [2]*side{newSide(old), newSide(new)}}
	d.collectNodes()
	// Empty lists, not nil ones, so that they are lists in JSON too.
	return &Effect{
		Flows:  append([]FlowChange{}, d.flows()...),
		Peers:  append([]PeerChange{}, d.peers()...),
		Logins: append([]LoginChange{}, d.logins()...),
		Caps:   append([]CapChange{}, d.caps()...),
	}
}

// side is one of the two policies.
type side struct {
	a    *Access
	g    *program
	slot []int // by common node index; -1 when the node is missing on this side
	back []int // by slot: common node index

	digests map[int]*hasher // of sources, by id
}

func newSide(a *Access) *side { return &side{a: a, g: a.prog} }

// differ numbers the nodes of both sides in common.
type differ struct {
	sides [2]*side
	ids   []tailcfg.NodeID // ascending
	names []string

	points *pointSet
}

func (d *differ) collectNodes() {
	for _, s := range d.sides {
		for slot := range s.g.live.all {
			d.ids = append(d.ids, s.g.t.Nodes[slot].ID)
		}
	}
	slices.Sort(d.ids)
	d.ids = slices.Compact(d.ids)
	d.names = make([]string, len(d.ids))
	for _, s := range d.sides {
		s.slot, s.back = make([]int, len(d.ids)), make([]int, s.g.n)
		for i := range s.slot {
			s.slot[i] = -1
		}
		for slot := range s.g.live.all {
			i, _ := slices.BinarySearch(d.ids, s.g.t.Nodes[slot].ID)
			s.slot[i], s.back[slot] = slot, i
			d.names[i] = s.g.name(slot)
		}
	}
	// Hostnames are labels and may repeat; the id keeps them apart.
	count := map[string]int{}
	for _, n := range d.names {
		count[n]++
	}
	for i, n := range d.names {
		if count[n] > 1 {
			d.names[i] = fmt.Sprintf("%s (id %d)", n, d.ids[i])
		}
	}
}

func (d *differ) nodeNames(nodes set) []string {
	out := []string{}
	for i := range nodes.all {
		out = append(out, d.names[i])
	}
	return out
}

// row translates a row into common node indexes.
func (d *differ) row(s *side, node int) set {
	out := newSet(len(d.ids))
	if s.slot[node] >= 0 {
		for slot := range s.a.rows[s.slot[node]].all {
			out.add(s.back[slot])
		}
	}
	return out
}

// peers compares the rows. Nodes with the same rows on both sides are compared
// once.
func (d *differ) peers() []PeerChange {
	type pair struct{ old, new *Row }
	type change struct{ appear, vanish set }
	seen := map[pair]change{}
	g := newGrouping(len(d.ids))
	rowOf := func(s *side, node int) *Row {
		if s.slot[node] < 0 {
			return nil
		}
		return s.a.rows[s.slot[node]]
	}
	for node := range d.ids {
		k := pair{rowOf(d.sides[0], node), rowOf(d.sides[1], node)}
		c, ok := seen[k]
		if !ok {
			was, now := d.row(d.sides[0], node), d.row(d.sides[1], node)
			c = change{appear: now.clone(), vanish: was.clone()}
			c.appear.without(was)
			c.vanish.without(now)
			seen[k] = c
		}
		for i, s := range [...]set{c.vanish, c.appear} {
			if s.empty() || s.count() == 1 && s.has(node) {
				continue
			}
			g.add(fmt.Sprint(i), s, node)
		}
	}
	var out []PeerChange
	for _, e := range g.list {
		out = append(out, PeerChange{Appear: e.key == "1", Viewers: d.nodeNames(e.members), Peers: d.nodeNames(e.set)})
	}
	return out
}

// without removes the members of o.
func (s set) without(o set) {
	for i := range s {
		s[i] &^= o[i]
	}
}

// grouping collects members under equal keys and sets, in order of first
// appearance.
type grouping struct {
	n     int
	list  []*groupEntry
	index map[string]map[uint64][]*groupEntry
}

type groupEntry struct {
	key     string
	set     set
	members set
}

func newGrouping(n int) *grouping {
	return &grouping{n: n, index: map[string]map[uint64][]*groupEntry{}}
}

func (g *grouping) entry(key string, s set) *groupEntry {
	m := g.index[key]
	if m == nil {
		m = map[uint64][]*groupEntry{}
		g.index[key] = m
	}
	h := s.hash()
	for _, e := range m[h] {
		if e.set.equal(s) {
			return e
		}
	}
	e := &groupEntry{key: key, set: s.clone(), members: newSet(g.n)}
	m[h] = append(m[h], e)
	g.list = append(g.list, e)
	return e
}

func (g *grouping) add(key string, s set, member int) { g.entry(key, s).members.add(member) }

// logins compares what SSH allows. Only nodes whose SSH policy differs are
// looked at, and each distinct pair of policies once.
func (d *differ) logins() []LoginChange {
	type pair struct{ old, new *SSH }
	seen := map[pair]map[string]set{} // change to sources
	g := newGrouping(len(d.ids))
	none := &SSH{}
	sshOf := func(s *side, node int) *SSH {
		if s.slot[node] < 0 {
			return none
		}
		return s.a.ssh[s.slot[node]]
	}
	for node := range d.ids {
		k := pair{sshOf(d.sides[0], node), sshOf(d.sides[1], node)}
		changes, ok := seen[k]
		if !ok {
			changes = d.loginChanges(k.old, k.new)
			seen[k] = changes
		}
		for _, key := range sortedKeys(changes) {
			g.add(key, changes[key], node)
		}
	}
	var out []LoginChange
	for _, e := range g.list {
		f := strings.Split(e.key, "\x00")
		out = append(out, LoginChange{User: f[0], Was: f[1], Now: f[2], From: d.nodeNames(e.set), To: d.nodeNames(e.members)})
	}
	return out
}

// loginChanges maps user, old and new verdict to the sources concerned.
func (d *differ) loginChanges(old, new *SSH) map[string]set {
	users := []string{"*", "root"}
	sources := newSet(len(d.ids))
	var by [2]map[int][]*SSHRule
	for i, s := range [...]*SSH{old, new} {
		by[i] = map[int][]*SSHRule{}
		for k := range s.Rules {
			r := &s.Rules[k]
			users = append(users, sortedKeys(r.SSHUsers)...)
			last := -1
			for _, p := range r.Principals {
				slot, ok := d.sides[i].g.ownerText(p.NodeIP)
				if node := d.sides[i].back[max(slot, 0)]; ok && node != last {
					by[i][node] = append(by[i][node], r)
					sources.add(node)
					last = node
				}
			}
		}
	}
	slices.Sort(users)
	users = slices.Compact(users)
	out := map[string]set{}
	for node := range sources.all {
		for _, u := range users {
			was, now := firstVerdict(by[0][node], u), firstVerdict(by[1][node], u)
			if was == now {
				continue
			}
			key := u + "\x00" + was + "\x00" + now
			if out[key] == nil {
				out[key] = newSet(len(d.ids))
			}
			out[key].add(node)
		}
	}
	return out
}

// firstVerdict is what the client does: the first rule with a local user wins.
func firstVerdict(rules []*SSHRule, user string) string {
	for _, r := range rules {
		local, ok := r.SSHUsers[user]
		if !ok {
			local = r.SSHUsers["*"]
		}
		switch {
		case local == "":
		case r.Check:
			return "check"
		default:
			return "accept"
		}
	}
	return "deny"
}

func (d *differ) caps() []CapChange {
	g := newGrouping(len(d.ids))
	all := newSet(len(d.ids))
	none := &Caps{}
	capsOf := func(s *side, node int) *Caps {
		if s.slot[node] < 0 {
			return none
		}
		return s.a.caps[s.slot[node]]
	}
	for node := range d.ids {
		was, now := capsOf(d.sides[0], node), capsOf(d.sides[1], node)
		if was == none || now == none || was.Equal(now) {
			continue // what comes and goes with a node is not news
		}
		for i, pair := range [...][2]*Caps{{now, was}, {was, now}} {
			for name, values := range pair[1].Map {
				have, ok := pair[0].Map[name]
				var fresh []string
				for _, v := range values {
					if !slices.Contains(have, v) {
						fresh = append(fresh, string(v))
					}
				}
				if !ok || len(fresh) > 0 {
					g.add(fmt.Sprint(i, "\x00", name, "\x00", strings.Join(fresh, "\x00")), all, node)
				}
			}
		}
	}
	var out []CapChange
	for _, e := range g.list {
		f := strings.Split(e.key, "\x00")
		c := CapChange{Gained: f[0] == "1", Cap: f[1], Nodes: d.nodeNames(e.members)}
		if f[2] != "" {
			c.Values = f[2:]
		}
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b CapChange) int {
		return cmp.Or(cmp.Compare(a.Cap, b.Cap), slices.Compare(a.Nodes, b.Nodes), slices.Compare(a.Values, b.Values),
			cmp.Compare(fmt.Sprint(a.Gained), fmt.Sprint(b.Gained)))
	})
	return out
}
