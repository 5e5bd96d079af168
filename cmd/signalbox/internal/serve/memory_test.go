package serve

import (
	"net/http"
	"net/http/httptest"
	"runtime"
	"testing"
)

func TestTrimGivesMemoryBack(t *testing.T) {
	const garbage = 64 << 20
	h := built(t, "").debugHandler()
	waste := make([]byte, garbage)
	for i := 0; i < len(waste); i += 4096 {
		waste[i] = 1
	}
	runtime.KeepAlive(waste)
	answer := httptest.NewRecorder()
	request := httptest.NewRequest("POST", "http://127.0.0.1:9090/debug/trim", nil)
	request.RemoteAddr = "127.0.0.1:40000"
	h.ServeHTTP(answer, request)
	if w := ask(h, "127.0.0.1:40000", "127.0.0.1:9090", "/debug/trim"); w.Code != http.StatusMethodNotAllowed {
		t.Errorf("GET: status %d", w.Code)
	}
	if answer.Code != http.StatusNoContent {
		t.Errorf("status %d", answer.Code)
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	if m.HeapAlloc > garbage/2 {
		t.Errorf("%d bytes of heap in use after trim: nothing was collected", m.HeapAlloc)
	}
	if n := m.HeapIdle - m.HeapReleased; n > garbage/2 {
		t.Errorf("%d free bytes kept after trim", n)
	}
}

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
