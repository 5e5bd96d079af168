package apiv1

import (
	"net/http"
	"net/netip"
	"slices"
	"strconv"

	"go4.org/netipx"

	"github.com/signalbox-net/signalbox/db"
)

var exitRoutes = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}

// neverRouted are networks that no router of a tailnet can stand for: this
// host, loopback, link-local (with the metadata services of clouds),
// multicast, reserved, and the address of the client's own resolver.
var neverRouted = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("100.100.100.100/32"),
	netip.MustParsePrefix("::/127"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("ff00::/8"),
}

// approveRoutes replaces the set of a node's approved routes.
func (s *server) approveRoutes(w http.ResponseWriter, r *http.Request) (any, error) {
	var req ApproveRoutesRequest
	if err := decode(w, r, &req, maxBody, false); err != nil {
		return nil, err
	}
	routes, err := s.routeList("body.routes", req.Routes)
	if err != nil {
		return nil, err
	}
	return s.changeNode(r, "node.routes", func(_ *db.Tx, n *db.Node) error {
		var advertised []netip.Prefix
		if h := n.State.Hostinfo; h != nil {
			advertised = h.RoutableIPs
		}
		for _, p := range routes {
			// A route that is approved already may stay while its router is
			// away: the caller sends back what it was shown.
			if slices.Contains(advertised, p) || slices.Contains(n.ApprovedRoutes, p) {
				continue
			}
			if p.Bits() == 0 && (slices.Contains(advertised, exitRoutes[0]) || slices.Contains(advertised, exitRoutes[1])) {
				continue
			}
			return badField("body.routes", "the node does not advertise %v", p)
		}
		n.ApprovedRoutes = routes
		return nil
	})
}

// routeList parses routes, sorted and each once, an exit route as both.
func (s *server) routeList(location string, in []string) ([]netip.Prefix, error) {
	const most = 10_000
	if len(in) > most {
		return nil, badField(location, "must not have more than %d routes", most)
	}
	out := make([]netip.Prefix, 0, len(in))
	for i, text := range in {
		at := location + "[" + strconv.Itoa(i) + "]"
		p, err := netip.ParsePrefix(text)
		switch {
		case err != nil || p.Addr().Is4In6():
			return nil, badField(at, "is not an address prefix such as 10.0.0.0/8")
		case p != p.Masked():
			return nil, badField(at, "has bits beyond its length; did you mean %v?", p.Masked())
		case p.Bits() == 0:
			out = append(out, exitRoutes...)
			continue
		}
		if why := s.forbidden(p); why.IsValid() {
			return nil, badField(at, "covers or is part of %v, which cannot be routed", why)
		}
		out = append(out, p)
	}
	slices.SortFunc(out, netipx.ComparePrefix)
	return slices.Compact(out), nil
}

// forbidden is the network that p may not overlap with, the zero Prefix when p
// is fine.
func (s *server) forbidden(p netip.Prefix) netip.Prefix {
	for _, no := range neverRouted {
		if p.Overlaps(no) {
			return no
		}
	}
	for _, pool := range []netip.Prefix{s.Pools.IPv4, s.Pools.IPv6} {
		if pool.IsValid() && p.Overlaps(pool) {
			return pool
		}
	}
	return netip.Prefix{}
}
