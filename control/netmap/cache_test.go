package netmap

import (
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"
)

func textCache(a *Account, kind Kind) *cache[string] {
	return newCache(a, kind, func(k string) int { return len(k) })
}

// fill puts n frames of 1000 bytes into c and checks what comes out.
func fill(t *testing.T, c *cache[string], n int) {
	t.Helper()
	for i := range n {
		key := fmt.Sprint(i)
		want := fmt.Sprintf("%01000d", i)
		if got := c.get(key, func() Frame { return Frame(want) }); string(got) != want {
			t.Errorf("under %s is %.20q", key, got)
		}
	}
}

func TestKeptFramesAreBounded(t *testing.T) {
	t.Parallel()
	const limit = 64 << 10
	a := newAccount(limit)
	caches := []*cache[string]{textCache(a, KindTile), textCache(a, KindSnapshot), textCache(a, KindDelta)}
	for range 20 {
		for _, c := range caches {
			fill(t, c, 100)
			if b := a.Bytes(); b > limit {
				t.Fatalf("%d bytes are kept, the limit is %d", b, limit)
			}
		}
	}
	var bytes, entries int64
	for _, c := range caches {
		c.mu.Lock()
		entries += int64(len(c.m))
		for k, e := range c.m {
			bytes += int64(len(k) + len(e.f) + entryCost)
		}
		c.mu.Unlock()
	}
	var counted Count
	for k := range Kinds {
		n := a.Count(k)
		counted.Bytes += n.Bytes
		counted.Entries += n.Entries
		if n.Hits+n.Misses != 2000 || n.Misses < 100 || n.Caches != 1 {
			t.Errorf("%v: %+v, want 2000 requests of one cache", k, n)
		}
	}
	if bytes != a.Bytes() || bytes != counted.Bytes || entries != counted.Entries || entries == 0 {
		t.Errorf("%d bytes in %d entries are kept, counted are %d, and by kind %+v", bytes, entries, a.Bytes(), counted)
	}
	a.SetLimit(0)
	if a.Bytes() != 0 {
		t.Errorf("%d bytes are kept, none may be", a.Bytes())
	}
	fill(t, caches[0], 3)
	if n := a.Count(KindTile).Entries; n != 0 || a.Bytes() != 0 {
		t.Errorf("%d entries are kept, none may be", n)
	}
}

func TestFramesInUseStayLongest(t *testing.T) {
	t.Parallel()
	a := newAccount(64 << 10)
	hot := textCache(a, KindTile)
	fill(t, hot, 10)
	var all []*cache[string]
	for range 20 {
		cold := textCache(a, KindDelta)
		all = append(all, cold)
		fill(t, cold, 10)
		before := a.Count(KindTile).Misses
		fill(t, hot, 10)
		if made := a.Count(KindTile).Misses - before; made != 0 {
			t.Fatalf("%d frames in use were dropped before others that nobody asks for", made)
		}
	}
	runtime.KeepAlive(all)
}

func TestFrameLargerThanItsShareIsNotKept(t *testing.T) {
	t.Parallel()
	a := newAccount(16 << 10)
	c := textCache(a, KindDelta)
	fill(t, c, 4)
	before := a.Bytes()
	for range 2 {
		if f := c.get("large", func() Frame { return make(Frame, 4<<10) }); len(f) != 4<<10 {
			t.Fatalf("%d bytes", len(f))
		}
	}
	if n := a.Count(KindDelta); a.Bytes() != before || n.Misses != 6 {
		t.Errorf("%d bytes are kept after, %d before; %+v", a.Bytes(), before, n)
	}
}

// What hung on a snapshot that is gone must not count for ever.
func TestFramesOfWhatIsGoneAreGivenBack(t *testing.T) {
	t.Parallel()
	a := newAccount(1 << 20)
	left := make(chan struct{}, 1000) // room for all: nothing may hold up the runtime
	a.onLeave = func() { left <- struct{}{} }
	stay := textCache(a, KindSnapshot)
	fill(t, stay, 5)
	want := a.Bytes()
	const gone = 150
	caches := make([]*cache[string], gone)
	for i := range caches {
		caches[i] = textCache(a, KindTile)
		fill(t, caches[i], 5)
	}
	if n := a.Count(KindTile); n.Caches != gone {
		t.Fatalf("%+v, want %d caches", n, gone)
	}
	clear(caches)
	runtime.GC()
	timeout := time.After(20 * time.Second)
	for i := range gone {
		select {
		case <-left:
		case <-timeout:
			t.Fatalf("%d caches were given back", i)
		}
	}
	if n := a.Count(KindTile); n.Bytes != 0 || n.Entries != 0 || n.Caches != 0 || a.Bytes() != want {
		t.Errorf("%+v is still counted, %d bytes in all, want %d", n, a.Bytes(), want)
	}
	for range 200 {
		fill(t, textCache(a, KindTile), 1)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.list) >= 1+gone+200 {
		t.Errorf("the account remembers %d caches", len(a.list))
	}
	runtime.KeepAlive(stay)
}

func TestFramesAreRightWhateverIsDropped(t *testing.T) {
	t.Parallel()
	a := newAccount(16 << 10)
	shared := []*cache[string]{textCache(a, KindTile), textCache(a, KindTile)}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 100 {
				fill(t, shared[i%2], 7)
				if i%10 == 0 {
					fill(t, textCache(a, KindDelta), 7)
				}
			}
		})
	}
	wg.Wait()
	a.SetLimit(a.Limit()) // the last one may have come while another was at it
	if b := a.Bytes(); b < 0 || b > 16<<10 {
		t.Errorf("%d bytes are counted", b)
	}
}
