package serve

import (
	"context"
	"net/http"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// settleEvery is how often the memory is looked at, and the least time between two returns.
const settleEvery = 20 * time.Second

// slack is how much unused memory is kept for what comes next.
const slack = 4 << 20

// settle gives memory back to the system when a storm is over. The runtime keeps twice what was in use at its last collection, and on a
// server of quiet streams the next collection can be minutes away; the sessions of a mass reconnect would hold twice their memory until then.
func (s *server) settle(ctx context.Context) error {
	tick := time.NewTicker(settleEvery)
	defer tick.Stop()
	sample := []metrics.Sample{{Name: "/memory/classes/heap/free:bytes"}, {Name: "/memory/classes/heap/unused:bytes"}, {Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/objects:bytes"}}
	var busy int64
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		// A collection in the middle of work would only cost: wait for a quiet spell.
		full := s.control.Poll.FullMaps.Load()
		quiet := full == busy
		busy = full
		metrics.Read(sample)
		free, live := sample[0].Value.Uint64()+sample[1].Value.Uint64(), sample[2].Value.Uint64()
		garbage := sample[3].Value.Uint64() - min(live, sample[3].Value.Uint64())
		if quiet && free+garbage > slack+live/4 {
			debug.FreeOSMemory()
		}
	}
}

// trim collects garbage and gives what is free back to the system, so that the resident set afterwards is what the server needs.
func trim(w http.ResponseWriter, _ *http.Request) {
	debug.FreeOSMemory()
	w.WriteHeader(http.StatusNoContent)
}
