package poll

import (
	"testing"
	"time"
)

// KeepAlives keep the time that clients count on, and meet.
func TestPause(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	moments := map[time.Time]int{}
	for range 10_000 {
		now = now.Add(time.Millisecond) // ten seconds of streams that begin
		d := pause(now, 50*time.Second)
		if d < 50*time.Second || d > time.Minute {
			t.Fatalf("a KeepAlive after %v, want 50 s to 60 s", d)
		}
		moments[now.Add(d)]++
	}
	if len(moments) > 21 {
		t.Errorf("10,000 streams wake in %d moments, want one a second", len(moments))
	}
	for at, n := range moments {
		if n > 2000 {
			t.Errorf("%d of 10,000 streams wake at %v", n, at)
		}
	}
	for _, every := range []time.Duration{1, 10, time.Microsecond, 20 * time.Millisecond} {
		if d := pause(now, every); d <= 0 || d > every+every/5+2 {
			t.Errorf("every %v: %v", every, d)
		}
	}
}
