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

// checkHostName accepts what tailcfg.DERPNode.HostName may be: a DNS name or
// an IP literal without zone and brackets.
func checkHostName(h string) error {
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
	s.mu.Lock()
	tlsLn, stun := s.tlsLn, s.stunPC
	s.mu.Unlock()

	c := &s.cfg
	v4, v6 := publishedAddrs(c)
	relay := &tailcfg.DERPNode{
		Name:      c.nodeName("a"),
		RegionID:  c.RegionID,
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
		relay.DERPPort = tlsLn.Addr().(*net.TCPAddr).Port
	case c.TLSListen != "":
		relay.DERPPort = portOf(c.TLSListen)
	}
	if p := stunPort(stun[0], c.STUNListen); p != 0 {
		relay.STUNPort = p
	}
	r := &tailcfg.DERPRegion{
		RegionID:   c.RegionID,
		RegionCode: c.RegionCode,
		RegionName: c.RegionName,
		Nodes:      []*tailcfg.DERPNode{relay},
	}
	if p := stunPort(stun[1], c.STUNSecondListen); p != 0 {
		r.Nodes = append(r.Nodes, &tailcfg.DERPNode{
			Name:     c.nodeName("b"),
			RegionID: c.RegionID,
			HostName: c.HostName,
			IPv4:     v4,
			IPv6:     v6,
			STUNPort: p,
			STUNOnly: true,
		})
	}
	return r
}

// nodeName is a name that no other node of the map has.
func (c *Config) nodeName(kind string) string {
	if c.Instance == 0 {
		return fmt.Sprintf("%d%s", c.RegionID, kind)
	}
	return fmt.Sprintf("%d%s-%d", c.RegionID, kind, c.Instance)
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
