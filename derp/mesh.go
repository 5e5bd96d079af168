package derp

import (
	"context"
	"fmt"

	tsderp "tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/netmon"
	"tailscale.com/tailcfg"
	"tailscale.com/types/logger"
)

// Mesh keeps this relay joined to another one of its region until ctx ends:
// it watches who is connected there and forwards packets for them. Both sides
// have to do it, with the same Config.MeshKey. A lost connection is made anew.
//
// The other relay is found by its node of the DERP map, pin included.
func (s *Server) Mesh(ctx context.Context, other *tailcfg.DERPNode) error {
	if !s.relay.HasMeshKey() {
		return fmt.Errorf("mesh with %s: this relay has no mesh key", other.Name)
	}
	region := &tailcfg.DERPRegion{RegionID: s.cfg.RegionID, RegionCode: s.cfg.RegionCode, Nodes: []*tailcfg.DERPNode{other}}
	c := derphttp.NewRegionClient(s.cfg.PrivateKey, logger.Discard, netmon.NewStatic(), func() *tailcfg.DERPRegion { return region })
	c.MeshKey = s.relay.MeshKey()
	c.WatchConnectionChanges = true
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	defer c.Close()
	add := func(m tsderp.PeerPresentMessage) { s.relay.AddPacketForwarder(m.Key, c) }
	remove := func(m tsderp.PeerGoneMessage) { s.relay.RemovePacketForwarder(m.Peer, c) }
	c.RunWatchConnectionLoop(ctx, s.relay.PublicKey(), logger.Discard, add, remove, func(err error) {
		if ctx.Err() == nil {
			s.cfg.Log.Debug("mesh", "relay", other.Name, "err", err)
		}
	})
	return nil
}
