package main

import "context"

// fullMaps is how many full maps each side has counted up to a moment.
type fullMaps struct {
	sent int64 // by the server
	had  int64 // by the clients: one for each session
}

func (r *run) fullMaps(ctx context.Context) fullMaps {
	return fullMaps{sent: int64(r.server.gauges(ctx, "signalbox_full_maps_total")[0]), had: r.fleet.maps.Load()}
}

// onePerSession holds the server to what makes joins cheap: whoever is there
// already gets a small delta, and only the newcomer a full map. A session that
// broke may have been sent one that nobody read.
func (r *run) onePerSession(ctx context.Context, j *joining, before fullMaps) {
	after := r.fullMaps(ctx)
	j.FullMaps = after.sent - before.sent
	sessions := after.had - before.had
	if j.FullMaps > sessions+int64(j.Broken) {
		r.fleet.faults.add("full map instead of a delta", "%d full maps were sent to %d sessions, %d broken", j.FullMaps, sessions, j.Broken)
	}
	// Of each peer a client hears once, in its full map or when it joins later.
	j.BytesPeer = float64(j.BytesClient) / max(1, r.figures.Peers)
	r.log("join: %d full maps for %d sessions, %.0f bytes a client for each peer", j.FullMaps, sessions, j.BytesPeer)
}
