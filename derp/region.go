package derp

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"

	"tailscale.com/tailcfg"
)

// hostNameRE is a DNS name of letters, digits, hyphens and underscores.
var hostNameRE = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?$`)

// CheckHostName accepts what tailcfg.DERPNode.HostName may be: a DNS name or
// an IP literal without zone and brackets.
func CheckHostName(h string) error {
	if h == "" {
		return errors.New("host name is empty")
	}
	if ip, err := netip.ParseAddr(h); err == nil {
		if ip.Zone() != "" || ip.IsUnspecified() || ip.IsMulticast() {
			return fmt.Errorf("%q is not an address that clients can dial", h)
		}
		return nil
	}
	if len(h) > 253 || !hostNameRE.MatchString(h) {
		return fmt.Errorf("%q is neither a DNS name nor an IP address", h)
	}
	for label := range strings.SplitSeq(strings.TrimSuffix(h, "."), ".") {
		if len(label) > 63 {
			return fmt.Errorf("%q has a label of more than 63 characters", h)
		}
	}
	return nil
}

// Region is the embedded region as the DERP map carries it, with the ports
// that Listen bound. Each call makes a new value, owned by the caller.
func (s *Server) Region() *tailcfg.DERPRegion {
	c := &s.cfg
	n := s.node(c.RegionID, 0, c.STUNListen)
	return &tailcfg.DERPRegion{RegionID: c.RegionID, RegionCode: c.RegionCode, RegionName: c.RegionName, Nodes: []*tailcfg.DERPNode{n}}
}

// CompanionScore is what the latency of the companion region is multiplied
// with (tailcfg.DERPHomeParams.RegionScore), so that no client calls it home
// while it reaches the embedded one.
const CompanionScore = 10

// Companion is the same relay once more, as a region of its own with the
// second STUN port: a client learns that its NAT is hard when two servers see
// it at different ports, and it asks one node of a region only. It is a whole
// relay, since a client may choose it as its home all the same. Nil without a
// second STUN port. id is a region id that the map does not have yet.
func (s *Server) Companion(id int) *tailcfg.DERPRegion {
	if s.cfg.STUNSecondListen == "" {
		return nil
	}
	n := s.node(id, 1, s.cfg.STUNSecondListen)
	return &tailcfg.DERPRegion{
		RegionID: id, RegionCode: s.cfg.RegionCode + "-nat", RegionName: s.cfg.RegionName + " (second STUN port)", Nodes: []*tailcfg.DERPNode{n},
	}
}

// node is this relay as a node of a region, with one of its STUN ports.
func (s *Server) node(region, stun int, listen string) *tailcfg.DERPNode {
	s.mu.Lock()
	tlsLn, pc := s.tlsLn, s.stunPC[stun]
	s.mu.Unlock()
	c := &s.cfg
	v4, v6 := publishedAddrs(c)
	n := &tailcfg.DERPNode{
		Name:      c.nodeName(region),
		RegionID:  region,
		HostName:  c.HostName,
		IPv4:      v4,
		IPv6:      v6,
		CertName:  s.pin,
		STUNPort:  -1,
		DERPPort:  c.PublicPort,
		CanPort80: c.CanPort80,
	}
	switch {
	case tlsLn != nil:
		n.DERPPort = tlsLn.Addr().(*net.TCPAddr).Port
	case c.TLSListen != "":
		n.DERPPort = portOf(c.TLSListen)
	}
	if p := stunPort(pc, listen); p != 0 {
		n.STUNPort = p
	}
	return n
}

// nodeName is a name that no other node of the map has.
func (c *Config) nodeName(region int) string {
	if c.Instance == 0 {
		return fmt.Sprintf("%da", region)
	}
	return fmt.Sprintf("%da-%d", region, c.Instance)
}

// publishedAddrs are tailcfg.DERPNode.IPv4 and IPv6. A client takes an empty
// one as "look HostName up", which for an IP literal of the other family is a
// query that cannot succeed, so that family says "none".
func publishedAddrs(c *Config) (v4, v6 string) {
	if c.IPv4.IsValid() {
		v4 = c.IPv4.String()
	}
	if c.IPv6.IsValid() {
		v6 = c.IPv6.String()
	}
	ip, err := netip.ParseAddr(c.HostName)
	if err != nil {
		return v4, v6
	}
	if ip = ip.Unmap(); ip.Is4() && v4 == "" {
		v4 = ip.String()
	} else if ip.Is6() && v6 == "" {
		v6 = ip.String()
	}
	if v4 == "" {
		v4 = "none"
	}
	if v6 == "" {
		v6 = "none"
	}
	return v4, v6
}

func stunPort(pc *net.UDPConn, addr string) int {
	if pc != nil {
		return pc.LocalAddr().(*net.UDPAddr).Port
	}
	return portOf(addr)
}

// portOf is the numeric port of a listen address, 0 when there is none.
func portOf(addr string) int {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return 0
	}
	n, err := net.LookupPort("tcp", port)
	if err != nil {
		return 0
	}
	return n
}
