package tailnet

import (
	"net/netip"
	"reflect"
	"slices"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/db"
)

// denyAll is the policy of a tailnet without a stored one.
func denyAll() *acl.Policy {
	p, err := acl.Parse([]byte(`{"acls": []}`))
	if err != nil {
		panic(err)
	}
	return p
}

// makeFacts is the policy's view of the tailnet. Facts of nodes that were not touched are taken from prev.
func (s *Snapshot) makeFacts(prev *Snapshot, b *db.Batch, m *moved) *acl.Tailnet {
	f := &acl.Tailnet{
		Domains:     s.settings.Options.Domains,
		ControlURL:  s.settings.Options.ControlURL,
		DisplayName: s.settings.Options.DisplayName,
		MagicDNS:    s.settings.DNS.MagicDNS,
		AutoUpdates: s.settings.Options.AutoUpdate,
	}
	if len(f.Domains) == 0 {
		f.Domains = s.mailDomains()
	}
	if prev != nil && prev.layout == s.layout {
		f.Nodes = append(slices.Clone(prev.facts.Nodes), make([]acl.Node, len(s.nodes)-len(prev.nodes))...)
		f.Primaries = prev.facts.Primaries
		for i := range m.touched {
			f.Nodes[i] = nodeFacts(s.nodes[i])
		}
	} else {
		f.Nodes = make([]acl.Node, len(s.nodes))
		for i, n := range s.nodes {
			f.Nodes[i] = nodeFacts(n)
		}
		if prev != nil {
			f.Primaries = prev.facts.Primaries
		}
	}
	if b.Full || b.PrimariesChanged {
		f.Primaries = b.Primaries
	}
	for _, u := range s.Users() {
		f.Users = append(f.Users, acl.User{ID: u.ID, Name: u.Name, Email: u.Email, Role: u.Role})
	}
	return f
}

// mailDomains are the domains of the people's addresses and the base domain, in a stable order.
func (s *Snapshot) mailDomains() []string {
	var out []string
	for _, u := range s.Users() {
		if at := lastAt(u.Email); at >= 0 && !slices.Contains(out, u.Email[at+1:]) {
			out = append(out, u.Email[at+1:])
		}
	}
	if d := s.settings.DNS.BaseDomain; d != "" && !slices.Contains(out, d) {
		out = append(out, d)
	}
	return out
}

func lastAt(s string) int {
	for i := len(s) - 1; i >= 0; i-- {
		if s[i] == '@' {
			return i
		}
	}
	return -1
}

// nodeFacts is what a policy can see of a node; the zero Node for a hole.
func nodeFacts(n *Node) acl.Node {
	if n == nil {
		return acl.Node{}
	}
	f := acl.Node{
		ID: n.ID, Hostname: n.GivenName, FQDN: n.FQDN, Tags: n.Tags, IPv4: n.IPv4, IPv6: n.IPv6,
		ApprovedRoutes: n.Routes(), Cap: n.State.Cap, Expired: n.Dead(),
	}
	if !n.Tagged() {
		f.User = n.User
	}
	if h := n.State.Hostinfo; h != nil {
		f.RoutableIPs, f.OS = h.RoutableIPs, h.OS
		f.Posture = map[string]any{}
		for k, v := range map[string]string{"node:os": h.OS, "node:osVersion": h.OSVersion, "node:tsVersion": version(h.IPNVersion)} {
			if v != "" {
				f.Posture[k] = v
			}
		}
	}
	return f
}

// version cuts a client version such as "1.102.5-t0123abc" to the part that postures compare.
func version(s string) string {
	for i := range len(s) {
		if c := s[i]; c != '.' && (c < '0' || c > '9') {
			return s[:i]
		}
	}
	return s
}

func sameFacts(a, b acl.Node) bool {
	return a.ID == b.ID && a.Hostname == b.Hostname && a.User == b.User && a.IPv4 == b.IPv4 && a.IPv6 == b.IPv6 &&
		a.Cap == b.Cap && a.Expired == b.Expired && a.OS == b.OS && slices.Equal(a.Tags, b.Tags) &&
		samePrefixes(a.RoutableIPs, b.RoutableIPs) && samePrefixes(a.ApprovedRoutes, b.ApprovedRoutes) && reflect.DeepEqual(a.Posture, b.Posture)
}

func samePrefixes(a, b []netip.Prefix) bool { return slices.Equal(a, b) }
