package main

import (
	"encoding/json"
	"fmt"
	"math/bits"
	"slices"
	"strings"
)

// scenario is a policy together with who owns the nodes, and a small model of
// its meaning to check the server's answer against.
type scenario struct {
	name  string
	users []string
	tags  []string
	acls  []acl
	// groups by name without "group:", as indexes of users.
	groups map[string][]int
	owners []owner // by node
	self   bool    // everyone reaches the own devices, and nothing else
	// extra is the rule that the policy edit adds.
	extra acl
}

// owner of a node: a user, or a tag when tag is not -1.
type owner struct{ user, tag int }

type acl struct {
	src  string
	dst  string
	port string // "*" or a number
}

const (
	groupCount = 20
	tagCount   = 30
	groupUsers = 40
	selfUsers  = 20
	aclCount   = 60
)

func newScenario(name string, nodes int) (*scenario, error) {
	s := &scenario{name: name, groups: map[string][]int{}, owners: make([]owner, nodes)}
	switch name {
	case "allow-all":
		s.addUsers(1)
		s.acls = []acl{{"*", "*", "*"}}
		s.extra = acl{"*", "*", ""}
	case "acls":
		s.sixtyACLs()
	case "self":
		s.addUsers(selfUsers)
		s.self = true
		s.acls = []acl{{"autogroup:member", "autogroup:self", "*"}}
		s.extra = acl{"autogroup:member", "autogroup:self", ""}
	default:
		return nil, fmt.Errorf("scenario %q: want allow-all, acls or self", name)
	}
	for i := range s.owners {
		s.owners[i] = s.ownerOf(i)
	}
	return s, nil
}

func (s *scenario) addUsers(n int) {
	for i := range n {
		s.users = append(s.users, fmt.Sprintf("load%02d", i))
	}
}

// ownerOf gives each user every len(users)-th node; with tags, three nodes of
// ten are tagged.
func (s *scenario) ownerOf(i int) owner {
	if len(s.tags) > 0 && i%10 >= 7 {
		return owner{-1, (i/10*3 + i%10 - 7) % len(s.tags)}
	}
	if len(s.tags) > 0 {
		i = i/10*7 + i%10
	}
	return owner{i % len(s.users), -1}
}

// sixtyACLs is a policy of the size that companies have: 20 groups of five
// out of 40 people, 30 tags, 60 rules.
func (s *scenario) sixtyACLs() {
	s.addUsers(groupUsers)
	for g := range groupCount {
		s.groups[fmt.Sprintf("g%02d", g)] = []int{2 * g, 2*g + 1, (2*g + 9) % groupUsers, (2*g + 18) % groupUsers, (2*g + 27) % groupUsers}
	}
	for t := range tagCount {
		s.tags = append(s.tags, fmt.Sprintf("t%02d", t))
	}
	for k := range aclCount {
		var a acl
		group, tag := fmt.Sprintf("group:g%02d", k%groupCount), fmt.Sprintf("tag:t%02d", (k*7+3)%tagCount)
		switch {
		case k < 20:
			a = acl{group, fmt.Sprintf("tag:t%02d", k), "22"}
		case k < 40:
			a = acl{group, tag, "5432"}
		case k < 50:
			a = acl{fmt.Sprintf("tag:t%02d", k%tagCount), tag, "8080"}
		default:
			a = acl{group, fmt.Sprintf("group:g%02d", (k*3+1)%groupCount), "3389"}
		}
		s.acls = append(s.acls, a)
	}
	last := s.acls[aclCount-1]
	s.extra = acl{last.src, last.dst, ""}
}

// policy returns the text. With a port, the extra rule for that port is added;
// it opens a port between nodes that see each other anyhow, so that an edit
// changes filters and no visibility.
func (s *scenario) policy(port uint16) string {
	type rule struct {
		Action string   `json:"action"`
		Src    []string `json:"src"`
		Dst    []string `json:"dst"`
	}
	doc := struct {
		Groups    map[string][]string `json:"groups,omitempty"`
		TagOwners map[string][]string `json:"tagOwners,omitempty"`
		ACLs      []rule              `json:"acls"`
	}{Groups: map[string][]string{}, TagOwners: map[string][]string{}}
	for name, members := range s.groups {
		for _, u := range members {
			doc.Groups["group:"+name] = append(doc.Groups["group:"+name], s.users[u]+"@")
		}
	}
	for _, t := range s.tags {
		doc.TagOwners["tag:"+t] = []string{"group:g00"}
	}
	for _, a := range s.rules(port) {
		doc.ACLs = append(doc.ACLs, rule{"accept", []string{a.src}, []string{a.dst + ":" + a.port}})
	}
	text, err := json.MarshalIndent(doc, "", "\t")
	if err != nil {
		panic(err) // strings only
	}
	return string(text)
}

func (s *scenario) rules(port uint16) []acl {
	rules := slices.Clone(s.acls)
	if port != 0 {
		a := s.extra
		a.port = fmt.Sprint(port)
		rules = append(rules, a)
	}
	return rules
}

// matches reports whether a selector means node i.
func (s *scenario) matches(selector string, i int) bool {
	o := s.owners[i]
	if name, ok := strings.CutPrefix(selector, "group:"); ok {
		return o.tag < 0 && slices.Contains(s.groups[name], o.user)
	}
	if name, ok := strings.CutPrefix(selector, "tag:"); ok {
		return o.tag >= 0 && s.tags[o.tag] == name
	}
	return true // "*" and autogroup:member where nothing is tagged
}

// allows reports whether node i may open port on node j.
func (s *scenario) allows(i, j int, port string) bool {
	if s.self {
		return s.owners[i] == s.owners[j]
	}
	for _, a := range s.acls {
		if (a.port == "*" || a.port == port) && s.matches(a.src, i) && s.matches(a.dst, j) {
			return true
		}
	}
	return false
}

// ports are the ports that the rules name, and one that none does.
func (s *scenario) ports() []string {
	ports := []string{"9"}
	for _, a := range s.acls {
		if a.port != "*" && !slices.Contains(ports, a.port) {
			ports = append(ports, a.port)
		}
	}
	return ports
}

// visibility computes which nodes see each other: those of which one may open
// some port on the other.
func (s *scenario) visibility() []bitset {
	n := len(s.owners)
	sees := make([]bitset, n)
	for i := range sees {
		sees[i] = newBitset(n)
	}
	// Nodes of one owner are alike to every rule, so owners are compared, not
	// nodes.
	byOwner := map[owner][]int{}
	for i, o := range s.owners {
		byOwner[o] = append(byOwner[o], i)
	}
	for _, from := range byOwner {
		for _, to := range byOwner {
			if !s.anyPort(from[0], to[0]) {
				continue
			}
			for _, i := range from {
				for _, j := range to {
					if i != j {
						sees[i].set(j)
						sees[j].set(i)
					}
				}
			}
		}
	}
	return sees
}

func (s *scenario) anyPort(i, j int) bool {
	for _, p := range s.ports() {
		if s.allows(i, j, p) {
			return true
		}
	}
	return false
}

// edited reports whether the extra rule is in node i's filter.
func (s *scenario) edited(i int) bool { return s.matches(s.extra.dst, i) }

type bitset []uint64

func newBitset(n int) bitset { return make(bitset, (n+63)/64) }

func (b bitset) set(i int)      { b[i/64] |= 1 << (i % 64) }
func (b bitset) has(i int) bool { return i < len(b)*64 && b[i/64]&(1<<(i%64)) != 0 }

func (b bitset) count() int {
	n := 0
	for _, w := range b {
		n += bits.OnesCount64(w)
	}
	return n
}
