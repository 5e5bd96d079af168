package integration

import (
	"context"
	"fmt"
	"testing"
	"time"

	"tailscale.com/ipn/ipnstate"
)

// A Vigil watches a client for something that must not happen.
type Vigil struct {
	stop func()
	end  chan string // what was seen, or nothing
}

// Vigil watches the client's status from now on.
func (c *Client) Vigil(t testing.TB, what string, wrong func(*ipnstate.Status) bool) *Vigil {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	v := &Vigil{stop: stop, end: make(chan string, 1)}
	if st := c.Status(t); wrong(st) {
		t.Fatalf("%s: %s from the start:\n%s", c.Name, what, describe(st))
	}
	go func() {
		start := time.Now()
		st, err := c.watch(ctx, wrong)
		if err == nil {
			v.end <- fmt.Sprintf("%s: after %v %s:\n%s", c.Name, time.Since(start).Round(time.Millisecond), what, describe(st))
		} else if ctx.Err() == nil {
			v.end <- fmt.Sprintf("%s: the watch ended: %v", c.Name, err)
		}
		close(v.end)
	}()
	return v
}

// End ends the watch, and fails the test if something was seen.
func (v *Vigil) End(t testing.TB) {
	t.Helper()
	v.stop()
	if seen, bad := <-v.end; bad {
		t.Error(seen)
	}
}
