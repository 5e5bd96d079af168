package fault

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/integration/sim"
)

// swift skips a test whose clients have to be about as fast as the server.
func swift(t *testing.T) {
	t.Helper()
	if raced {
		t.Skip("the race detector makes clients too slow for this, and does not watch the server")
	}
}

// each runs f for the numbers below n, at most wide of them at a time, until
// one fails.
func each(t *testing.T, n, wide int, f func(i int) error) {
	t.Helper()
	var wg sync.WaitGroup
	var next atomic.Int64
	var failed atomic.Bool
	for range wide {
		wg.Go(func() {
			for !failed.Load() {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := f(i); err != nil {
					failed.Store(true)
					t.Errorf("number %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()
	if failed.Load() {
		t.FailNow()
	}
}

// resident is the resident memory of the server after a garbage collection, in
// bytes, and its heap in use.
func (s *Server) resident(t *testing.T) (rss, heap int64) {
	t.Helper()
	code, text, err := Get(t.Context(), "http://"+s.Metrics+"/debug/pprof/heap?gc=1&debug=1")
	if err != nil || code != 200 {
		t.Fatalf("heap profile: status %d, %v", code, err)
	}
	m := regexp.MustCompile(`(?m)^# HeapAlloc = (\d+)$`).FindStringSubmatch(text)
	if m == nil {
		t.Fatal("the heap profile does not say how large the heap is")
	}
	heap, _ = strconv.ParseInt(m[1], 10, 64)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.PID()))
	if err != nil {
		t.Fatal(err)
	}
	m = regexp.MustCompile(`(?m)^VmRSS:\s*(\d+) kB$`).FindStringSubmatch(string(status))
	if m == nil {
		t.Fatal("/proc does not say how much memory the server has")
	}
	rss, _ = strconv.ParseInt(m[1], 10, 64)
	return rss << 10, heap
}

// gauge reads one number from the metrics listener.
func (s *Server) gauge(t *testing.T, name string) int {
	t.Helper()
	_, text, err := Get(t.Context(), "http://"+s.Metrics+"/metrics")
	m := regexp.MustCompile(`(?m)^` + name + ` (\S+)$`).FindStringSubmatch(text)
	if err != nil || m == nil {
		t.Fatalf("no metric %s: %v", name, err)
	}
	f, _ := strconv.ParseFloat(m[1], 64)
	return int(f)
}

func TestFloodOfHandshakes(t *testing.T) {
	swift(t)
	t.Parallel()
	s := StartServer(t)
	p := gather(t, s, 2)
	var through, refused atomic.Int64
	attempt := func(i int) error {
		m := sim.NewMachine("stranger")
		// Some sources stay below their limit, so that their handshakes are done
		// in full; the rest comes from one and is refused.
		m.Source = netip.AddrFrom4([4]byte{127, 1, 1, 1})
		if i%3 == 0 {
			m.Source = netip.AddrFrom4([4]byte{127, 1, 2, byte(1 + i/3%50)})
		}
		conn, err := p.srv.Dial(t.Context(), m)
		switch {
		case sim.Status(err) == 429:
			refused.Add(1)
			return nil
		case err != nil:
			return err
		}
		defer conn.Close()
		through.Add(1)
		_, err = conn.Whoami(t.Context())
		return err
	}
	each(t, 600, 8, attempt) // fills tables and pools
	rssBefore, heapBefore := s.resident(t)

	stop := make(chan struct{})
	honest := make(chan time.Duration)
	go func() {
		worst, n := latency(t, s, stop)
		t.Logf("%d honest requests, the slowest took %v", n, worst)
		honest <- worst
	}()
	each(t, 10_000, 16, attempt)
	close(stop)
	if worst := <-honest; worst > starved {
		t.Errorf("an honest request took %v", worst)
	}
	p.alive(t, "after-the-flood")
	p.unbroken(t)
	if through.Load() < 2000 || refused.Load() < 2000 {
		t.Errorf("%d handshakes went through and %d were refused: the flood is not what it should be", through.Load(), refused.Load())
	}

	// Freed memory goes back to the system little by little.
	var rss, heap int64
	for deadline := time.Now().Add(20 * time.Second); ; <-time.After(100 * time.Millisecond) {
		if rss, heap = s.resident(t); rss-rssBefore < 10<<20 && heap-heapBefore < 1<<20 || time.Now().After(deadline) {
			break
		}
	}
	t.Logf("%d handshakes, %d refused; resident memory from %d to %d KiB, heap from %d to %d KiB",
		through.Load(), refused.Load(), rssBefore>>10, rss>>10, heapBefore>>10, heap>>10)
	if rss-rssBefore >= 10<<20 {
		t.Errorf("resident memory grew by %d KiB", (rss-rssBefore)>>10)
	}
	if heap-heapBefore >= 1<<20 {
		t.Errorf("the heap grew by %d KiB", (heap-heapBefore)>>10)
	}
}

func TestManyJoinsOneAddress(t *testing.T) {
	swift(t)
	t.Parallel()
	s := StartServer(t)
	key, srv := s.NewKey("company"), s.Sim()
	begin := time.Now()
	each(t, 500, 128, func(i int) error {
		conn, err := srv.Dial(t.Context(), sim.NewMachine(fmt.Sprintf("desk-%d", i)))
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := conn.Register(t.Context(), key); err != nil {
			return err
		}
		stream, err := conn.Poll(t.Context())
		if err != nil {
			return err
		}
		return stream.Wait(t.Context(), func(v *sim.View) bool { return v.Self != nil })
	})
	t.Logf("500 machines joined in %v", time.Since(begin))
	if n := s.gauge(t, "signalbox_nodes"); n != 500 {
		t.Errorf("%d nodes, want 500", n)
	}
}

func TestReconnectsOneAddress(t *testing.T) {
	swift(t)
	t.Parallel()
	s := StartServer(t)
	key, srv := s.NewKey("company"), s.Sim()
	machines := make([]*sim.Machine, 100)
	each(t, len(machines), 8, func(i int) error {
		machines[i] = sim.NewMachine(fmt.Sprintf("desk-%d", i))
		conn, err := srv.Dial(t.Context(), machines[i])
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Register(t.Context(), key)
		return err
	})
	begin := time.Now()
	each(t, 5000, 64, func(i int) error {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		conn, err := srv.Dial(ctx, machines[i%len(machines)])
		if err != nil {
			return err
		}
		defer conn.Close()
		// A lite report, as every client makes one when it comes back, would be
		// slowed down for talking too much; a question is not.
		_, err = conn.Whoami(ctx)
		return err
	})
	t.Logf("5000 reconnects in %v", time.Since(begin))
	for _, m := range []string{"signalbox_noise_limited_total", "signalbox_noise_busy_total"} {
		if n := s.gauge(t, m); n != 0 {
			t.Errorf("%s is %d, want 0", m, n)
		}
	}
}
