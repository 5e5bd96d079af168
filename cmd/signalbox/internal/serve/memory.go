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
	var rest spare
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if unused, live := heap(); rest.due(s.control.Poll.FullMaps.Load(), unused, live) {
			debug.FreeOSMemory()
			unused, _ = heap()
			rest.left = unused
		}
	}
}

// heap is what the process holds of memory that nothing uses: free, or garbage. live is what was in use at the last collection.
func heap() (unused, live uint64) {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/free:bytes"}, {Name: "/memory/classes/heap/unused:bytes"}, {Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	live = sample[2].Value.Uint64()
	objects := sample[3].Value.Uint64()
	return sample[0].Value.Uint64() + sample[1].Value.Uint64() + objects - min(live, objects), live
}

// spare judges unused memory.
type spare struct {
	maps int64  // full maps sent when last asked
	left uint64 // unused bytes that the last return could not give back: they lie between objects
}

// due reports whether memory should be given back now, maps full maps having been sent. A collection in the middle of work would only cost, so
// it waits for a quiet spell. What the last return could not give back does not count, or every look would cost a full collection.
func (m *spare) due(maps int64, unused, live uint64) bool {
	quiet := maps == m.maps
	m.maps, m.left = maps, min(m.left, unused)
	return quiet && unused-m.left > slack+live/4
}

// trim collects garbage and gives what is free back to the system, so that the resident set afterwards is what the server needs.
func trim(w http.ResponseWriter, _ *http.Request) {
	debug.FreeOSMemory()
	w.WriteHeader(http.StatusNoContent)
}
