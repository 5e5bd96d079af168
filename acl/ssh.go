package acl

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"tailscale.com/tailcfg"
)

// SSH is the SSH policy of one node, first match first.
type SSH struct {
	Rules []SSHRule
	hash  uint64
}

// SSHRule is one rule of a node's SSH policy together with what only the
// server needs to know.
type SSHRule struct {
	tailcfg.SSHRule

	// CheckPeriod is how long a passed check stays good. The server enforces
	// it; it is not on the wire. Zero with CheckAlways unset and a check
	// action means that the policy said "0s".
	CheckPeriod time.Duration
	CheckAlways bool // every connection is checked
	Check       bool // the action is check, not accept

	// Accepted is the action once a check has passed; for a rule without
	// check it is the action itself.
	Accepted *tailcfg.SSHAction

	Line int // of the rule in the policy; not part of equality
}

// Wire is the policy as the client gets it (tailcfg.MapResponse.SSHPolicy).
func (s *SSH) Wire() *tailcfg.SSHPolicy {
	p := &tailcfg.SSHPolicy{Rules: make([]*tailcfg.SSHRule, len(s.Rules))}
	for i := range s.Rules {
		p.Rules[i] = &s.Rules[i].SSHRule
	}
	return p
}

// sshBuilder compiles the ssh section.
type sshBuilder struct {
	c     *compiler
	rules []SSHRule
	nodes [][]int32 // by slot: indexes in rules

	shared map[uint64][]sshSource
}

// sshPolicies compiles the ssh section. The client takes the first rule that
// matches, and the stricter action is to win: rules that check come before
// those that accept, otherwise in document order.
func (c *compiler) sshPolicies() []*SSH {
	b := &sshBuilder{c: c, nodes: make([][]int32, c.n), shared: map[uint64][]sshSource{}}
	for _, check := range [...]bool{true, false} {
		for _, ru := range c.p.ssh {
			if ru.check == check {
				b.rule(ru)
			}
		}
	}
	index := map[uint64][]int{}
	out := make([]*SSH, c.n)
	for slot := range c.n {
		h := newHash()
		for _, i := range b.nodes[slot] {
			h.word(uint64(i))
		}
		for _, o := range index[h.sum()] {
			if slices.Equal(b.nodes[o], b.nodes[slot]) {
				out[slot] = out[o]
				break
			}
		}
		if out[slot] != nil {
			continue
		}
		s := &SSH{Rules: make([]SSHRule, len(b.nodes[slot]))}
		for k, i := range b.nodes[slot] {
			s.Rules[k] = b.rules[i]
		}
		s.hash = hashSSH(s)
		out[slot] = s
		index[h.sum()] = append(index[h.sum()], slot)
	}
	return out
}

// rule compiles one ssh rule. With localpart users the rule splits up by
// source user, and the hosted service then delivers each part to that user's
// own devices too; tagged sources likewise get their part.
func (b *sshBuilder) rule(ru *sshRule) {
	c := b.c
	src := newSet(c.n)
	for i := range ru.src {
		if nodes := c.nodes(c.p, &ru.src[i]); nodes != nil {
			src.or(nodes)
		}
	}
	if len(ru.where) > 0 {
		src.and(c.satisfying(ru.where))
	}
	dst, self := newSet(c.n), false
	for i := range ru.dst {
		if ru.dst[i].kind == selSelf {
			self = true
		} else if nodes := c.nodes(c.p, &ru.dst[i]); nodes != nil {
			dst.or(nodes)
		}
	}
	if len(ru.localparts) > 0 {
		b.splitRule(ru, src, dst, self)
		return
	}
	users := sshUsers(ru)
	if len(ru.dst) > 0 && !src.empty() && !dst.empty() {
		b.deliver(b.add(ru, src, users), dst)
	}
	if !self {
		return
	}
	b.eachUser(src, func(u *User, from, own set) {
		own = own.clone()
		for slot := range dst.all {
			own.del(slot)
		}
		b.deliver(b.add(ru, from, users), own)
	})
}

// splitRule compiles a rule with localpart users.
func (b *sshBuilder) splitRule(ru *sshRule, src, dst set, self bool) {
	if len(ru.dst) == 0 {
		return
	}
	users := sshUsers(ru)
	b.eachUser(src, func(u *User, from, own set) {
		to := dst.clone()
		to.or(from)
		if self {
			to.or(own)
		}
		b.deliver(b.add(ru, from, users), to)
		for _, d := range ru.localparts {
			if emailDomain(u) == d.s {
				local, _, _ := strings.Cut(u.Email, "@")
				b.deliver(b.add(ru, from, map[string]string{local: local}), to)
			}
		}
	})
	from := src.clone()
	from.and(b.c.tagged)
	if !from.empty() {
		to := dst.clone()
		to.or(from)
		b.deliver(b.add(ru, from, users), to)
	}
}

// eachUser calls f for every user, in id order, who has untagged devices among
// the sources: these, and all of the user's devices.
func (b *sshBuilder) eachUser(src set, f func(u *User, from, own set)) {
	users := make([]int, len(b.c.t.Users))
	for i := range users {
		users[i] = i
	}
	slices.SortFunc(users, func(x, y int) int { return cmp.Compare(b.c.t.Users[x].ID, b.c.t.Users[y].ID) })
	for _, i := range users {
		u := &b.c.t.Users[i]
		if !slices.ContainsFunc(b.c.byUser[u.ID], func(slot int32) bool { return src.has(int(slot)) }) {
			continue
		}
		own := b.c.ownSet(i)
		from := own.clone()
		from.and(src)
		f(u, from, own)
	}
}

// sshUsers maps the requested user names, localparts aside. Unless root is
// named it has an empty entry, which keeps * from covering it.
func sshUsers(ru *sshRule) map[string]string {
	m := map[string]string{"root": ""}
	for _, t := range ru.users {
		switch {
		case strings.HasPrefix(t.s, localpartPrefix):
		case t.s == "autogroup:nonroot":
			m["*"] = "="
		default:
			m[t.s] = t.s
		}
	}
	return m
}

func (b *sshBuilder) add(ru *sshRule, from set, users map[string]string) int32 {
	c := b.c
	c.spend(1, sshRules)
	r := SSHRule{Check: ru.check, CheckPeriod: ru.period, CheckAlways: ru.always, Line: c.p.lineOf(ru.at)}
	if !ru.check {
		r.CheckPeriod = 0
	}
	r.Principals = b.principals(from)
	r.SSHUsers = users
	r.AcceptEnv = ru.acceptEnv
	r.Accepted = b.accepted(ru)
	r.Action = r.Accepted
	if ru.check {
		r.Action = &tailcfg.SSHAction{HoldAndDelegate: c.t.ControlURL +
			"/machine/ssh/action/$SRC_NODE_ID/to/$DST_NODE_ID?local_user=$LOCAL_USER"}
	}
	b.rules = append(b.rules, r)
	return int32(len(b.rules) - 1)
}

// principals lists the addresses of the nodes. Rules with equal sources share
// one list.
func (b *sshBuilder) principals(from set) []*tailcfg.SSHPrincipal {
	h := from.hash()
	for _, s := range b.shared[h] {
		if s.nodes.equal(from) {
			return s.list
		}
	}
	b.c.spend(2*from.count(), sshPrincipals)
	s := sshSource{nodes: from.clone()}
	for slot := range from.all {
		for _, ip := range [...]string{b.c.text4[slot], b.c.text6[slot]} {
			if ip != "" {
				s.list = append(s.list, &tailcfg.SSHPrincipal{NodeIP: ip})
			}
		}
	}
	b.shared[h] = append(b.shared[h], s)
	return s.list
}

type sshSource struct {
	nodes set
	list  []*tailcfg.SSHPrincipal
}

// recorderPort is where tsrecorder listens.
const recorderPort = 80

// accepted is the action that lets a session in, recorded where the rule
// wants that.
func (b *sshBuilder) accepted(ru *sshRule) *tailcfg.SSHAction {
	a := &tailcfg.SSHAction{
		Accept:                    true,
		AllowAgentForwarding:      true,
		AllowLocalPortForwarding:  true,
		AllowRemotePortForwarding: true,
	}
	for _, t := range ru.recorders {
		for slot := range b.c.byTag[t.s].all {
			n := &b.c.t.Nodes[slot]
			for _, ip := range [...]netip.Addr{n.IPv4, n.IPv6} {
				if ip.IsValid() {
					a.Recorders = append(a.Recorders, netip.AddrPortFrom(ip, recorderPort))
				}
			}
		}
	}
	if ru.enforce && len(ru.recorders) > 0 {
		a.OnRecordingFailure = &tailcfg.SSHRecorderFailureAction{
			RejectSessionWithMessage:    "this session must be recorded, and no recorder is reachable",
			TerminateSessionWithMessage: "the recording of this session failed",
		}
	}
	return a
}

func (b *sshBuilder) deliver(rule int32, to set) {
	b.c.spend(to.count(), sshNodeRules)
	for slot := range to.all {
		b.nodes[slot] = append(b.nodes[slot], rule)
	}
}

func hashSSH(s *SSH) uint64 {
	h := newHash()
	for i := range s.Rules {
		r := &s.Rules[i]
		h.word(uint64(len(r.Principals))<<8 | uint64(len(r.AcceptEnv)))
		h.word(uint64(r.CheckPeriod))
		for _, p := range r.Principals {
			h.text(p.NodeIP)
		}
		for _, u := range sortedKeys(r.SSHUsers) {
			h.text(u)
			h.text(r.SSHUsers[u])
		}
		h.text(r.Action.HoldAndDelegate)
	}
	return h.sum()
}
