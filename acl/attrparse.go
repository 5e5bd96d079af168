package acl

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"github.com/tailscale/hujson"
	"tailscale.com/tailcfg"
)

// appConnectors is the capability that carries app connector settings
// (tailscale.com/types/appctype.AppConnectorAttr).
const appConnectors = "tailscale.com/app-connectors"

// appConnector is one entry of that capability.
type appConnector struct {
	Name       string         `json:"name,omitempty"`
	Domains    []string       `json:"domains,omitempty"`
	Routes     []netip.Prefix `json:"routes,omitempty"`
	Connectors []string       `json:"connectors,omitempty"` // tags, or "*"
}

func (r *reader) nodeAttr(v *hujson.Value) {
	a := &nodeAttr{at: v.StartOffset}
	var target, attrs, pool []text
	if !r.object(v, map[string]field{
		"target": r.textsInto(&target), "attr": r.textsInto(&attrs), "ippool": r.textsInto(&pool),
		"app": func(v *hujson.Value) { r.nodeApps(a, v) },
	}) {
		return
	}
	for _, t := range target {
		s, err := r.selector(t)
		switch {
		case err != nil:
			r.fail(t.at, "%v", err)
		case s.kind == selSelf, s.kind == selInternet, s.kind == selDangerAll, s.kind == selShared,
			s.kind == selNonroot, s.kind == selService:
			r.fail(t.at, "nodeAttrs: %q is not a valid target", t.s)
		default:
			a.target = append(a.target, s)
		}
	}
	for _, t := range attrs {
		if t.s == "" {
			r.fail(t.at, "nodeAttrs: attr values cannot be empty")
			continue
		}
		a.attrs = append(a.attrs, t.s)
	}
	for _, t := range pool {
		p, err := checkPool(t.s)
		if err != nil {
			r.fail(t.at, "%v", err)
			continue
		}
		a.pool = append(a.pool, p)
	}
	r.p.attrs = append(r.p.attrs, a)
}

var (
	cgnat         = netip.MustParsePrefix("100.64.0.0/10")
	reservedPools = []netip.Prefix{
		netip.MustParsePrefix("100.100.0.0/24"),
		netip.MustParsePrefix("100.100.100.0/24"),
		netip.MustParsePrefix("100.115.92.0/23"),
	}
)

func checkPool(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, fmt.Errorf("IPPool(%s): %q: invalid address", s, s)
	}
	if p = p.Masked(); !p.Addr().Is4() || p.Bits() < cgnat.Bits() || !cgnat.Contains(p.Addr()) {
		return p, fmt.Errorf("IPPool(%s): network outside %v", s, cgnat)
	}
	for _, res := range reservedPools {
		if res.Bits() <= p.Bits() && res.Contains(p.Addr()) {
			return p, fmt.Errorf("IPPool(%s): network within reserved range", s)
		}
	}
	return p, nil
}

func (r *reader) nodeApps(a *nodeAttr, v *hujson.Value) {
	a.app = map[string][]tailcfg.RawMessage{}
	r.table(v, func(name text, v *hujson.Value) {
		if !strings.Contains(name.s, "/") {
			r.fail(name.at, "nodeAttrs: app name %q must have the form {domain}/{path}", name.s)
			return
		}
		var values []tailcfg.RawMessage
		r.list(v, func(v *hujson.Value) {
			value := raw(v)
			if name.s == appConnectors {
				var c appConnector
				if err := json.Unmarshal([]byte(value), &c); err != nil {
					r.fail(v.StartOffset, "nodeAttrs: app %q: %v", name.s, err)
					return
				}
				r.checkConnector(v, &c)
				a.conns = append(a.conns, c)
			}
			values = append(values, value)
		})
		a.app[name.s] = values
	})
	a.apps = sortedKeys(a.app)
}

func (r *reader) checkConnector(v *hujson.Value, c *appConnector) {
	for _, tag := range c.Connectors {
		if tag != "*" && r.p.tagOwners[tag] == nil {
			r.fail(v.StartOffset, "tag not found: %q", tag)
		}
	}
}

func (r *reader) autoApprovers(v *hujson.Value) {
	r.object(v, map[string]field{
		"routes": func(v *hujson.Value) {
			r.table(v, func(name text, v *hujson.Value) {
				prefix, _, ok := parsePrefix(name.s)
				if !ok {
					r.fail(name.at, "autoApprovers: %q: invalid address", name.s)
					return
				}
				by := r.owners(v, "autoApprovers: ")
				r.p.approveRoutes = append(r.p.approveRoutes, approver{name: name, prefix: prefix, by: by})
			})
		},
		"exitnode": func(v *hujson.Value) { r.p.approveExit = r.owners(v, "autoApprovers: ") },
		"services": func(v *hujson.Value) {
			r.table(v, func(name text, v *hujson.Value) {
				if !strings.HasPrefix(name.s, "svc:") {
					r.fail(name.at, "autoApprovers: %q must be a service", name.s)
					return
				}
				by := r.owners(v, "autoApprovers: ")
				r.p.approveSvc = append(r.p.approveSvc, approver{name: name, by: by})
			})
		},
	})
}
