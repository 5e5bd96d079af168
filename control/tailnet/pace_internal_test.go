package tailnet

import (
	"slices"
	"testing"
	"time"
)

// announcements are the milliseconds at which a pace of 50 to 250 ms announces changes that come at the given ones.
func announcements(changes []int) (out []int) {
	const least, most = 50 * time.Millisecond, 250 * time.Millisecond
	began := time.Unix(1e9, 0)
	at := func(ms int) time.Time { return began.Add(time.Duration(ms) * time.Millisecond) }
	var p pace
	for len(changes) > 0 {
		due, waited, revisions := changes[0], false, 1
		for { // as Replica.Run does: at each change, and when the time has come
			w := p.wait(at(due), revisions, least, most)
			if w <= 0 {
				break
			}
			waited = true
			if revisions < len(changes) && changes[revisions] <= due+int(w/time.Millisecond) {
				due = changes[revisions]
				revisions++
			} else {
				due += int(w / time.Millisecond)
			}
		}
		changes = changes[revisions:]
		p.announced(at(due), waited, revisions, least, most)
		out = append(out, due)
	}
	return out
}

// However long changes go on, the gap stays what it grew to.
func TestPaceOfAnHour(t *testing.T) {
	var hour []int
	for ms := 0; ms < 3_600_000; ms += 10 {
		hour = append(hour, ms)
	}
	got := announcements(hour)
	for i, at := range got[5:] {
		if gap := at - got[4+i]; gap != 250 {
			t.Fatalf("announcement %d came %d ms after the one before, want 250", 5+i, gap)
		}
	}
}

func TestPace(t *testing.T) {
	var endless []int
	for ms := 1000; ms <= 2000; ms++ {
		endless = append(endless, ms)
	}
	for _, c := range []struct {
		name          string
		changes, want []int
	}{
		{"alone", []int{1000, 1100, 1200}, []int{1000, 1100, 1200}},
		{"a burst", []int{1000, 1001, 1002, 1030}, []int{1000, 1050}},
		{"two bursts", []int{1000, 1001, 1400, 1401}, []int{1000, 1050, 1400, 1450}},
		{"one soon after a burst", []int{1000, 1001, 1002, 1003, 1060}, []int{1000, 1050, 1100}},
		{"a burst soon after a burst waits twice as long", []int{1000, 1001, 1002, 1003, 1060, 1061, 1062}, []int{1000, 1050, 1150}},
		{"a trickle", []int{1000, 1040, 1120, 1150, 1190, 1260}, []int{1000, 1050, 1120, 1170, 1220, 1270}},
		{"a trickle after a burst", []int{1000, 1001, 1002, 1003, 1100, 1210, 1220, 1290}, []int{1000, 1050, 1100, 1210, 1260, 1310}},
		{"without end", endless, []int{1000, 1050, 1150, 1350, 1600, 1850, 2100}},
		{"quick again after it", append(slices.Clone(endless), 2400, 2401), []int{1000, 1050, 1150, 1350, 1600, 1850, 2100, 2400, 2450}},
	} {
		if got := announcements(c.changes); !slices.Equal(got, c.want) {
			t.Errorf("%s: announced at %v, want %v", c.name, got, c.want)
		}
	}
}
