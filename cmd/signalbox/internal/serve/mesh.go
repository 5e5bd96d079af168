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
