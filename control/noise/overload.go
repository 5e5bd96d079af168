package noise

import (
	"math"
	"runtime/metrics"
	"sync"
	"time"
)

// memoryTight returns a function that reports whether the process uses more
// than nine tenths of its memory limit (GOMEMLIMIT). It looks at most once a
// second. Without a limit it is always false.
func memoryTight(now func() time.Time) func() bool {
	const (
		limit    = "/gc/gomemlimit:bytes"
		total    = "/memory/classes/total:bytes"
		released = "/memory/classes/heap/released:bytes"
	)
	var (
		mu     sync.Mutex
		looked time.Time
		tight  bool
		s      = []metrics.Sample{{Name: limit}, {Name: total}, {Name: released}}
	)
	return func() bool {
		mu.Lock()
		defer mu.Unlock()
		if t := now(); t.Sub(looked) >= time.Second {
			looked = t
			metrics.Read(s)
			most, used := s[0].Value.Uint64(), s[1].Value.Uint64()-s[2].Value.Uint64()
			tight = most < math.MaxInt64 && used > most/10*9
		}
		return tight
	}
}
