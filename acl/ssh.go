package acl

import (
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
	Line        int  // of the rule in the policy; not part of equality
}

// Wire is the policy as the client gets it (tailcfg.MapResponse.SSHPolicy).
func (s *SSH) Wire() *tailcfg.SSHPolicy {
	p := &tailcfg.SSHPolicy{Rules: make([]*tailcfg.SSHRule, len(s.Rules))}
	for i := range s.Rules {
		p.Rules[i] = &s.Rules[i].SSHRule
	}
	return p
}
