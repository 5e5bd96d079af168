package control

import (
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/control/tailnet"
)

// A duty looks at its date, and whenever something may have moved it.
func TestDate(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	one, two := new(tailnet.Snapshot), new(tailnet.Snapshot)
	var d date
	if !d.come(one, now) {
		t.Error("nothing is known yet")
	}
	d = date{snap: one}
	if d.come(one, now.Add(1e6*time.Hour)) {
		t.Error("there is nothing to come")
	}
	if !d.come(two, now) {
		t.Error("another snapshot may have another date")
	}
	d.include(now.Add(time.Hour))
	d.include(now.Add(time.Minute))
	d.include(now.Add(time.Hour))
	for after, want := range map[time.Duration]bool{0: false, time.Minute - 1: false, time.Minute: true, time.Hour: true} {
		if got := d.come(one, now.Add(after)); got != want {
			t.Errorf("after %v: %t, want %t", after, got, want)
		}
	}
}
