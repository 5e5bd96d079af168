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
