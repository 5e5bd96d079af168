package acl

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"go4.org/netipx"
	"tailscale.com/tailcfg"
)

// resolver answers which nodes a selector denotes in one tailnet.
type resolver struct {
	t *Tailnet
	n int

	live, untagged, tagged set

	users   map[string][]int           // folded e-mail, and folded name + "@", to indexes in t.Users
	byUser  map[tailcfg.UserID][]int32 // untagged nodes
	byTag   map[string]set
	byAddr  []addrSlot // sorted by address
	svc     map[string]*Service
	text4   []string // rendered addresses by slot, "" when missing
	text6   []string
	subnets []subnet               // approved non-exit routes, one per node and prefix
	overlay []int                  // indexes of subnets that contain node addresses
	exits   set                    // nodes with an approved exit route
	byID    map[tailcfg.NodeID]int // made when first needed
	cache   map[string]set         // node selectors by name
	posture map[*posture]set       // nodes that satisfy it
}

type addrSlot struct {
	addr netip.Addr
	slot int32
}

type subnet struct {
	prefix  netip.Prefix
	slot    int32
	service bool // an address of a service that the node hosts
	inside  set  // nodes with an address in it; nil when none
}

func newResolver(t *Tailnet) *resolver {
	n := len(t.Nodes)
	r := &resolver{
		t: t, n: n,
		live: newSet(n), untagged: newSet(n), tagged: newSet(n), exits: newSet(n),
		users:  make(map[string][]int, 2*len(t.Users)),
		byUser: make(map[tailcfg.UserID][]int32, len(t.Users)),
		byTag:  map[string]set{}, svc: map[string]*Service{},
		text4: make([]string, n), text6: make([]string, n),
		cache: map[string]set{}, posture: map[*posture]set{},
	}
	for i := range t.Users {
		u := &t.Users[i]
		if login := u.LoginName(); strings.Contains(login, "@") {
			r.users[fold(login)] = append(r.users[fold(login)], i)
		}
		if u.Name != "" {
			r.users[fold(u.Name)+"@"] = append(r.users[fold(u.Name)+"@"], i)
		}
	}
	r.byAddr = make([]addrSlot, 0, 2*n)
	for slot := range t.Nodes {
		if t.Nodes[slot].ID != 0 {
			r.addNode(slot)
		}
	}
	r.addServices()
	slices.SortFunc(r.byAddr, func(a, b addrSlot) int {
		return cmp.Or(a.addr.Compare(b.addr), cmp.Compare(a.slot, b.slot))
	})
	for i := range r.subnets {
		s := &r.subnets[i]
		r.within(netipx.RangeOfPrefix(s.prefix), func(slot int) {
			if s.inside == nil {
				s.inside = newSet(n)
				r.overlay = append(r.overlay, i)
			}
			s.inside.add(slot)
		})
	}
	return r
}

func (r *resolver) addNode(slot int) {
	n := &r.t.Nodes[slot]
	r.live.add(slot)
	if n.Tagged() {
		r.tagged.add(slot)
		for _, tag := range n.Tags {
			if r.byTag[tag] == nil {
				r.byTag[tag] = newSet(r.n)
			}
			r.byTag[tag].add(slot)
		}
	} else {
		r.untagged.add(slot)
		r.byUser[n.User] = append(r.byUser[n.User], int32(slot))
	}
	if n.IPv4.IsValid() {
		r.text4[slot] = n.IPv4.String()
		r.byAddr = append(r.byAddr, addrSlot{n.IPv4, int32(slot)})
	}
	if n.IPv6.IsValid() {
		r.text6[slot] = n.IPv6.String()
		r.byAddr = append(r.byAddr, addrSlot{n.IPv6, int32(slot)})
	}
	for i, p := range n.ApprovedRoutes {
		switch {
		case p.Bits() == 0:
			r.exits.add(slot)
		case !slices.Contains(n.ApprovedRoutes[:i], p):
			r.subnets = append(r.subnets, subnet{prefix: p, slot: int32(slot)})
		}
	}
}

// addServices treats the addresses of a service as routes of its hosts.
func (r *resolver) addServices() {
	for i := range r.t.Services {
		s := &r.t.Services[i]
		r.svc[s.Name] = s
		for _, id := range s.Hosts {
			slot, ok := r.slotByID(id)
			if !ok {
				continue
			}
			for _, a := range s.addrs() {
				r.subnets = append(r.subnets, subnet{prefix: singlePrefix(a), slot: int32(slot), service: true})
			}
		}
	}
}

func (s *Service) addrs() []netip.Addr {
	var out []netip.Addr
	for _, a := range [...]netip.Addr{s.IPv4, s.IPv6} {
		if a.IsValid() {
			out = append(out, a)
		}
	}
	return out
}

func singlePrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func (r *resolver) slotByID(id tailcfg.NodeID) (int, bool) {
	if r.byID == nil {
		r.byID = make(map[tailcfg.NodeID]int, r.n)
		for slot := range r.live.all {
			r.byID[r.t.Nodes[slot].ID] = slot
		}
	}
	slot, ok := r.byID[id]
	return slot, ok
}

// within calls each for every node address in the range.
func (r *resolver) within(rng netipx.IPRange, each func(slot int)) {
	i, _ := slices.BinarySearchFunc(r.byAddr, rng.From(), func(a addrSlot, t netip.Addr) int { return a.addr.Compare(t) })
	for ; i < len(r.byAddr) && !rng.To().Less(r.byAddr[i].addr); i++ {
		each(int(r.byAddr[i].slot))
	}
}

// owner is the node that has the address.
func (r *resolver) owner(a netip.Addr) (int, bool) {
	i, ok := slices.BinarySearchFunc(r.byAddr, a, func(x addrSlot, t netip.Addr) int { return x.addr.Compare(t) })
	if !ok {
		return 0, false
	}
	return int(r.byAddr[i].slot), true
}

// user finds the person that a selector names. Nobody is no error.
func (r *resolver) user(name string) (*User, error) {
	found := r.users[name]
	if len(found) == 0 {
		return nil, nil
	}
	if len(found) > 1 {
		a, b := &r.t.Users[found[0]], &r.t.Users[found[1]]
		return nil, fmt.Errorf("%q matches two users: %s (id %d) and %s (id %d)", name, a.LoginName(), a.ID, b.LoginName(), b.ID)
	}
	return &r.t.Users[found[0]], nil
}

// somebody is the error of a test that names a user who is nobody, or two.
func (r *resolver) somebody(s *selector) error {
	u, err := r.user(s.name)
	if err == nil && u == nil {
		err = errors.New("no such user")
	}
	return err
}

// nodes is the set of nodes that a selector of people, tags or autogroups
// denotes; nil when the selector is of another kind. The result is shared.
func (r *resolver) nodes(p *Policy, s *selector) set {
	switch s.kind {
	case selAll, selDangerAll:
		return r.live
	case selMember:
		return r.untagged
	case selTagged:
		return r.tagged
	case selUser, selUserDomain, selGroup, selTag, selRole, selShared:
	default:
		return nil
	}
	key := s.name
	if s.kind == selUserDomain || s.kind == selRole || s.kind == selShared {
		key = s.s
	}
	if got, ok := r.cache[key]; ok {
		return got
	}
	out := newSet(r.n)
	r.addNodes(p, s, out)
	r.cache[key] = out
	return out
}

func (r *resolver) addNodes(p *Policy, s *selector, out set) {
	switch s.kind {
	case selTag:
		if b := r.byTag[s.name]; b != nil {
			out.or(b)
		}
	case selUser:
		if u, _ := r.user(s.name); u != nil {
			r.addUser(out, u)
		}
	case selGroup:
		for i := range p.groups[s.name].members {
			r.addNodes(p, &p.groups[s.name].members[i], out)
		}
	case selUserDomain:
		for i := range r.t.Users {
			if u := &r.t.Users[i]; emailDomain(u) == s.name {
				r.addUser(out, u)
			}
		}
	case selRole:
		for i := range r.t.Users {
			if u := &r.t.Users[i]; u.Role == s.name {
				r.addUser(out, u)
			}
		}
	}
}

func (r *resolver) addUser(out set, u *User) {
	for _, slot := range r.byUser[u.ID] {
		out.add(int(slot))
	}
}

func emailDomain(u *User) string {
	_, domain, _ := strings.Cut(fold(u.Email), "@")
	return domain
}

// satisfying is the set of nodes for which one of the postures holds.
func (r *resolver) satisfying(list []*posture) set {
	out := newSet(r.n)
	for _, ps := range list {
		s, ok := r.posture[ps]
		if !ok {
			s = newSet(r.n)
			for slot := range r.live.all {
				if ok, _ := ps.holds(r.t.Nodes[slot].attribute); ok {
					s.add(slot)
				}
			}
			r.posture[ps] = s
		}
		out.or(s)
	}
	return out
}

// attribute looks up a posture attribute of the node.
func (n *Node) attribute(name string) (any, bool) {
	v, ok := n.Posture[name]
	if !ok && name == "node:os" && n.OS != "" {
		return n.OS, true
	}
	return v, ok
}

// checkNames reports selectors that only the tailnet can refute: domains that
// are not its own and names of more than one person.
func (r *resolver) checkNames(p *Policy) Errors {
	var errs Errors
	check := func(list []selector, section string) {
		for i := range list {
			s := &list[i]
			switch s.kind {
			case selUserDomain:
				if !slices.Contains(r.t.Domains, s.name) {
					errs = append(errs, p.errorAt(s.at, section+foreignDomain(s.name)))
				}
			case selUser:
				if _, err := r.user(s.name); err != nil {
					errs = append(errs, p.errorAt(s.at, err.Error()))
				}
			}
		}
	}
	for _, name := range sortedKeys(p.groups) {
		check(p.groups[name].members, "")
	}
	for _, name := range sortedKeys(p.tagOwners) {
		check(p.tagOwners[name].owners, "")
	}
	for _, ru := range p.rules {
		check(ru.src, "")
		for i := range ru.dst {
			check([]selector{ru.dst[i].selector}, "")
		}
	}
	for _, ru := range p.ssh {
		check(ru.src, "[ssh] ")
		check(ru.dst, "[ssh] ")
		for _, d := range ru.localparts {
			if !slices.Contains(r.t.Domains, d.s) {
				errs = append(errs, p.errorAt(d.at, foreignDomain(d.s)))
			}
		}
	}
	for _, a := range p.attrs {
		check(a.target, "")
	}
	for _, a := range p.approveRoutes {
		check(a.by, "")
	}
	check(p.approveExit, "")
	for _, a := range p.approveSvc {
		check(a.by, "")
	}
	return errs
}

func foreignDomain(domain string) string {
	return domain + " is not associated with this Tailnet and cannot be used in user:*@<domain> expressions"
}
