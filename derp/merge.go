package derp

import (
	"fmt"

	"tailscale.com/tailcfg"
)

// layer is one source of regions. Later layers win.
type layer struct {
	name   string // path or URL, for messages
	m      *tailcfg.DERPMap
	remote bool // from a URL: never a reason to stop, so conflicts drop the region
}

// merge makes one map of the layers and the embedded region, which no layer
// may replace. The layers stay as they are, but the result shares their regions.
// dropped tells of remote regions that were left out and why.
func merge(layers []layer, embedded *tailcfg.DERPRegion) (m *tailcfg.DERPMap, dropped []string, err error) {
	m = &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{}}
	names := map[string]int{}
	put := func(r *tailcfg.DERPRegion) error {
		for _, n := range r.Nodes {
			if other, dup := names[n.Name]; dup {
				return fmt.Errorf("node name %q of region %d is taken by region %d", n.Name, r.RegionID, other)
			}
		}
		for _, n := range r.Nodes {
			names[n.Name] = r.RegionID
		}
		m.Regions[r.RegionID] = r
		return nil
	}
	if embedded != nil {
		if err := put(embedded); err != nil {
			return nil, nil, err
		}
	}
	settled := map[int]bool{} // a later layer has had its say
	for i := len(layers) - 1; i >= 0; i-- {
		l := layers[i]
		for _, id := range l.m.RegionIDs() {
			r := l.m.Regions[id]
			var conflict error
			switch {
			case embedded != nil && id == embedded.RegionID:
				conflict = fmt.Errorf("region %d is the embedded relay's (derp.server.region_id)", id)
			case settled[id]:
				continue
			case r == nil:
				settled[id] = true
				continue
			default:
				conflict = put(r)
			}
			if conflict != nil && !l.remote {
				return nil, nil, fmt.Errorf("%s: %w", l.name, conflict)
			}
			if conflict != nil {
				dropped = append(dropped, fmt.Sprintf("%s: %v", l.name, conflict))
				continue
			}
			settled[id] = true
		}
		if m.HomeParams == nil {
			m.HomeParams = l.m.HomeParams
		}
		m.OmitDefaultRegions = m.OmitDefaultRegions || l.m.OmitDefaultRegions
	}
	if len(m.Regions) > maxRegions {
		return nil, nil, fmt.Errorf("DERP map: %d regions in all, at most %d are allowed", len(m.Regions), maxRegions)
	}
	return m, dropped, nil
}
