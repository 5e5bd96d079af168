package acl

import (
	"fmt"
	"net/netip"
	"strings"

	"go4.org/netipx"
)

// selKind is what a selector denotes.
type selKind uint8

const (
	selNone       selKind = iota
	selAll                // *
	selUser               // alice@example.com, or name@
	selUserDomain         // user:*@example.com
	selGroup              // group:x
	selTag                // tag:x
	selPrefix             // an address or CIDR, directly or by a host name
	selRange              // a-b
	selIPSet              // ipset:x
	selService            // svc:x
	selMember             // autogroup:member
	selTagged             // autogroup:tagged
	selRole               // autogroup:admin and the other roles
	selSelf               // autogroup:self
	selInternet           // autogroup:internet
	selDangerAll          // autogroup:danger-all
	selShared             // autogroup:shared
	selNonroot            // autogroup:nonroot
)

// selector is one entry of a src, dst, target or owner list.
type selector struct {
	text
	kind selKind
	name string // user login in folded form, domain, role, or name with its prefix

	prefix netip.Prefix // selPrefix
	single bool         // selPrefix written without a mask
	set    *netipx.IPSet
	rng    netipx.IPRange
}

// byUser reports whether the selector can only name people's devices.
func (s *selector) byUser() bool {
	switch s.kind {
	case selUser, selUserDomain, selGroup, selMember, selRole:
		return true
	}
	return false
}

var autogroups = map[string]struct {
	kind selKind
	role string
}{
	"member":         {selMember, ""},
	"members":        {selMember, ""},
	"tagged":         {selTagged, ""},
	"self":           {selSelf, ""},
	"internet":       {selInternet, ""},
	"danger-all":     {selDangerAll, ""},
	"shared":         {selShared, ""},
	"nonroot":        {selNonroot, ""},
	"owner":          {selRole, "owner"},
	"owners":         {selRole, "owner"},
	"admin":          {selRole, "admin"},
	"admins":         {selRole, "admin"},
	"network-admin":  {selRole, "network-admin"},
	"network-admins": {selRole, "network-admin"},
	"it-admin":       {selRole, "it-admin"},
	"it-admins":      {selRole, "it-admin"},
	"billing-admin":  {selRole, "billing-admin"},
	"billing-admins": {selRole, "billing-admin"},
	"auditor":        {selRole, "auditor"},
	"auditors":       {selRole, "auditor"},
}

// use notes that a definition is referred to.
func (r *reader) use(name string) {
	if r.used != nil {
		r.used[name] = true
	}
}

// selector resolves a name against the document. The error has the hosted
// service's wording without the side that it puts in front.
func (r *reader) selector(t text) (selector, error) {
	s := selector{text: t, name: t.s}
	r.use(t.s)
	switch {
	case t.s == "*":
		s.kind = selAll
	case strings.HasPrefix(t.s, "group:"):
		s.kind = selGroup
		if r.p.groups[t.s] == nil {
			return s, fmt.Errorf("group not found: %q", t.s)
		}
	case strings.HasPrefix(t.s, "tag:"):
		s.kind = selTag
		if r.p.tagOwners[t.s] == nil {
			return s, fmt.Errorf("tag not found: %q", t.s)
		}
	case strings.HasPrefix(t.s, "ipset:"):
		s.kind = selIPSet
		set := r.p.ipsets[t.s]
		if set == nil {
			return s, fmt.Errorf("ipset not found: %q", t.s)
		}
		s.set = set.set
	case strings.HasPrefix(t.s, "svc:"):
		s.kind = selService
		if len(t.s) == len("svc:") {
			return s, fmt.Errorf("%q: invalid service name", t.s)
		}
	case strings.HasPrefix(t.s, "autogroup:"):
		g, ok := autogroups[strings.TrimPrefix(t.s, "autogroup:")]
		if !ok {
			return s, fmt.Errorf("autogroup not found: %q", t.s)
		}
		s.kind, s.name = g.kind, g.role
	case strings.HasPrefix(t.s, "user:*@"):
		s.kind, s.name = selUserDomain, strings.TrimPrefix(t.s, "user:*@")
	default:
		return r.addressOrUser(s)
	}
	return s, nil
}

func (r *reader) addressOrUser(s selector) (selector, error) {
	if h := r.p.hosts[s.s]; h != nil {
		s.kind, s.prefix, s.single = selPrefix, h.prefix, h.single
		return s, nil
	}
	if p, single, ok := parsePrefix(s.s); ok {
		s.kind, s.prefix, s.single = selPrefix, p, single
		return s, nil
	}
	if strings.Contains(s.s, "@") {
		s.kind, s.name = selUser, fold(s.s)
		return s, nil
	}
	if rng, err := netipx.ParseIPRange(s.s); err == nil {
		s.kind, s.rng = selRange, rng
		return s, nil
	}
	return s, fmt.Errorf("%q: invalid address", s.s)
}
