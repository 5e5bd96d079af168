package serve

import (
	"context"
	"sync"

	"tailscale.com/tailcfg"
)

// mesh joins this server's relay to those of the other servers, as the relay map names them, until ctx ends. A client is homed on a region,
// not on a relay, so two clients of one region may sit on two of them.
func (s *server) mesh(ctx context.Context) error {
	if s.relay == nil {
		return nil
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	joined := map[string]context.CancelFunc{} // by what the node says
	for {
		news := s.replica.Announced()
		want := map[string]*tailcfg.DERPNode{}
		for _, n := range s.otherRelays() {
			want[n.Name+" "+n.HostName+" "+n.IPv4+" "+n.CertName] = n
		}
		for name, stop := range joined {
			if want[name] == nil {
				stop()
				delete(joined, name)
			}
		}
		for name, n := range want {
			if joined[name] != nil {
				continue
			}
			if s.sameAddress(n) {
				s.log.Error("two relays are published at one address, so their clients do not reach each other: set derp.server.host_name or derp.server.ipv4 and ipv6 on each server",
					"relay", n.Name, "host", n.HostName)
				joined[name] = func() {}
				continue
			}
			join, stop := context.WithCancel(ctx)
			joined[name] = stop
			wg.Go(func() {
				if err := s.relay.Mesh(join, n); err != nil {
					s.log.Error("join relays", "relay", n.Name, "err", err)
				}
			})
		}
		select {
		case <-ctx.Done():
			for _, stop := range joined {
				stop()
			}
			return nil
		case <-news:
		}
	}
}

// otherRelays are the relays of the embedded region that are not this server's.
func (s *server) otherRelays() []*tailcfg.DERPNode {
	own := s.relay.Region()
	region := s.replica.Current().Settings().DERPMap.Regions[own.RegionID]
	if region == nil {
		return nil
	}
	mine := map[string]bool{}
	for _, n := range own.Nodes {
		mine[n.Name] = true
	}
	var out []*tailcfg.DERPNode
	for _, n := range region.Nodes {
		if !mine[n.Name] && !n.STUNOnly {
			out = append(out, n)
		}
	}
	return out
}

// sameAddress reports whether clients find another relay where they find this one.
func (s *server) sameAddress(n *tailcfg.DERPNode) bool {
	own := s.relay.Region().Nodes[0]
	return n.HostName == own.HostName && n.IPv4 == own.IPv4 && n.IPv6 == own.IPv6 && n.DERPPort == own.DERPPort
}

// keepMap stores this server's relay map again when another server has cleared it, having taken this one for gone.
func (s *server) keepMap(ctx context.Context) error {
	for {
		news := s.replica.Announced()
		if len(s.replica.Current().Settings().MapOf(s.mapSetting()).Regions) == 0 {
			if own := s.regions.Current(); own != nil && len(own.Regions) > 0 {
				s.log.Warn("another server took this one for gone; its relays are published again")
				s.putDERPMap(own)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-news:
		}
	}
}
