package serve

import "testing"

// Memory is given back once after a storm, and not again and again for what lies between objects.
func TestSpareMemoryIsGivenBackOnce(t *testing.T) {
	const mib = 1 << 20
	var m spare
	for _, c := range []struct {
		what         string
		maps         int64
		unused, live uint64
		want         bool
		left         uint64 // what giving back leaves
	}{
		{"at rest from the start", 0, 3 * mib, 10 * mib, false, 0},
		{"a storm", 1000, 80 * mib, 40 * mib, false, 0},
		{"still a storm", 2000, 120 * mib, 60 * mib, false, 0},
		{"over", 2000, 120 * mib, 60 * mib, true, 35 * mib},
		{"20 s later", 2000, 36 * mib, 60 * mib, false, 0},
		{"an hour later", 2000, 39 * mib, 60 * mib, false, 0},
		{"half of the sessions end, and the rest are packed", 2000, 12 * mib, 30 * mib, false, 0},
		{"what they held is garbage", 2000, 45 * mib, 30 * mib, true, 10 * mib},
		{"a few come", 2003, 60 * mib, 30 * mib, false, 0},
		{"and stay", 2003, 60 * mib, 30 * mib, true, 11 * mib},
	} {
		got := m.due(c.maps, c.unused, c.live)
		if got != c.want {
			t.Errorf("%s: %t, want %t", c.what, got, c.want)
		}
		if got {
			m.left = c.left
		}
	}
}
