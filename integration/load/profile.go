package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// profileTime is how long a storm is recorded: the server records for a fixed
// time and cannot be told to stop earlier.
const profileTime = 10 * time.Second

// cpuProfile records the server's CPU for d in the background, beginning after
// some delay. The function that it returns waits for the recording.
func (o *options) cpuProfile(ctx context.Context, s *server, phase string, delay, d time.Duration) (wait func()) {
	if o.profile == "" {
		return func() {}
	}
	var done sync.WaitGroup
	done.Go(func() {
		pause(ctx, delay)
		o.saveProfile(ctx, s, fmt.Sprintf("/debug/pprof/profile?seconds=%d", max(1, int(d.Seconds()))), phase+".cpu.pprof")
	})
	return done.Wait
}

func (o *options) heapProfile(ctx context.Context, s *server) {
	if o.profile != "" {
		o.saveProfile(ctx, s, "/debug/pprof/heap", "heap.pprof")
		o.saveProfile(ctx, s, "/debug/pprof/goroutine", "goroutine.pprof")
	}
}

func (o *options) saveProfile(ctx context.Context, s *server, path, name string) {
	text, err := s.debug(ctx, path)
	if err == nil {
		if err = os.MkdirAll(o.profile, 0o755); err == nil {
			err = os.WriteFile(filepath.Join(o.profile, name), text, 0o644)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "load: profile:", err)
	}
}
