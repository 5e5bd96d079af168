package netmap

import (
	"sync"
	"sync/atomic"

	"github.com/signalbox-net/signalbox/control/tailnet"
)

// Stats counts how often a shared frame was there already. The counters only grow.
var Stats struct{ Hits, Misses, MissBytes atomic.Int64 }

// cache keeps frames by what they were made from. Two callers that miss at once wait for one making.
type cache[K comparable] struct {
	mu sync.Mutex // guards the following field
	m  map[K]*entry
}

type entry struct {
	once sync.Once
	f    Frame
}

// get returns the frame under key, made by make if it is not there. Past limit entries nothing more is kept.
func (c *cache[K]) get(key K, limit int, make func() Frame) Frame {
	c.mu.Lock()
	e := c.m[key]
	if e == nil {
		e = new(entry)
		if c.m == nil {
			c.m = map[K]*entry{}
		}
		if len(c.m) < limit {
			c.m[key] = e
		}
		Stats.Misses.Add(1)
	} else {
		Stats.Hits.Add(1)
	}
	c.mu.Unlock()
	e.once.Do(func() {
		e.f = make()
		Stats.MissBytes.Add(int64(len(e.f)))
	})
	return e.f
}

func tileCacheOf(t *tailnet.Tile) *tileCache {
	if c, ok := t.Memo.Load("frames"); ok {
		return c.(*tileCache)
	}
	c, _ := t.Memo.LoadOrStore("frames", new(tileCache))
	return c.(*tileCache)
}

// maxSnapshotFrames bounds the frames kept with one snapshot: filters, SSH rules and profiles, one for each group of equal viewers.
const maxSnapshotFrames = 4096

// memo keeps a frame with the snapshot.
func memo(s *tailnet.Snapshot, key interface{}, make func() Frame) Frame {
	c, ok := s.Memo.Load("frames")
	if !ok {
		c, _ = s.Memo.LoadOrStore("frames", new(cache[interface{}]))
	}
	return c.(*cache[interface{}]).get(key, maxSnapshotFrames, make)
}
