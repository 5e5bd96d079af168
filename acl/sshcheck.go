package acl

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

func (k *checker) sshTest(x *sshTest) {
	switch {
	case len(x.accept) == 0 && len(x.deny) == 0 && len(x.check) == 0:
		k.fail(x.at, "an SSH test needs accept, deny or check")
		return
	case len(x.dst) == 0:
		k.fail(x.at, "an SSH test needs dst")
		return
	}
	senders, err := k.senders(x.at, x.src, x.posture != nil)
	if err == nil && len(senders) == 0 {
		err = fmt.Errorf("src %q: no device is meant", x.src.s)
	}
	if err != nil {
		k.fail(orAt(x.src.at, x.at), "%v", err)
		return
	}
	for _, d := range x.dst {
		slots, err := k.sshReceivers(d)
		if err != nil {
			k.fail(d.at, "dst %q: %v", d.s, err)
			continue
		}
		k.sshLogins(x, x.accept, d, senders, slots, "accept")
		k.sshLogins(x, x.check, d, senders, slots, "check")
		k.sshLogins(x, x.deny, d, senders, slots, "deny")
	}
}

// sshReceivers resolves a dst: a tag, a user, or the address of a node.
func (k *checker) sshReceivers(d text) ([]int, error) {
	s, err := (&reader{p: k.p}).selector(d)
	if err != nil {
		return nil, err
	}
	var out []int
	switch s.kind {
	case selPrefix:
		if !s.prefix.IsSingleIP() {
			return nil, fmt.Errorf("must be one host")
		}
		slot, ok := k.a.prog.owner(s.prefix.Addr())
		if !ok {
			return nil, fmt.Errorf("no device has this address")
		}
		return []int{slot}, nil
	case selUser:
		if err := k.r.somebody(&s); err != nil {
			return nil, err
		}
	case selTag, selMember, selTagged:
	default:
		return nil, fmt.Errorf("must be a tag, a user or a host")
	}
	for slot := range k.r.nodes(k.p, &s).all {
		if !k.isPosed(slot) {
			out = append(out, slot)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no device is meant")
	}
	return out, nil
}

// sshLogins compares what each sender gets on each receiver with the wanted
// verdict: accept, check or deny.
func (k *checker) sshLogins(x *sshTest, users []text, d text, senders []sender, slots []int, want string) {
	for _, u := range users {
		if u.s == "" || u.s == "*" {
			k.fail(u.at, "%q is no login name", u.s)
			continue
		}
		for _, slot := range slots {
			i := slices.IndexFunc(senders, func(from sender) bool {
				// Between two families there is no connection to judge.
				n := &k.t.Nodes[slot]
				if from.addr.Is4() && !n.IPv4.IsValid() || from.addr.Is6() && !n.IPv6.IsValid() {
					return false
				}
				return sshVerdict(k.a.SSH(slot), from.addr, u.s, want) != want
			})
			if i < 0 {
				continue
			}
			got := sshVerdict(k.a.SSH(slot), senders[i].addr, u.s, want)
			k.fail(u.at, "expected %s for %s logging in as %q on %s, got %s from %v",
				want, x.src.s, u.s, d.s, got, senders[i].addr)
			break
		}
	}
}

// sshVerdict is what the policy says to a login: accept, check or deny. Where
// both an accept and a check rule match, the wanted one counts.
func sshVerdict(s *SSH, from netip.Addr, user, want string) string {
	got := "deny"
	for i := range s.Rules {
		r := &s.Rules[i]
		if !sshRuleMatches(r, from, user) {
			continue
		}
		verdict := "accept"
		if r.Check {
			verdict = "check"
		}
		if verdict == want || got == "deny" {
			got = verdict
		}
	}
	return got
}

// sshRuleMatches follows the client: the user's own entry counts before *, and
// an empty local user is no match.
func sshRuleMatches(r *SSHRule, from netip.Addr, user string) bool {
	local, ok := r.SSHUsers[user]
	if !ok {
		local = r.SSHUsers["*"]
	}
	if local == "" {
		return false
	}
	ip := from.String()
	for _, p := range r.Principals {
		if strings.EqualFold(p.NodeIP, ip) {
			return true
		}
	}
	return false
}
