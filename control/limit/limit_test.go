package limit

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"
	"unsafe"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func TestBurstThenRate(t *testing.T) {
	tab := New(20, 200)
	k := Addr(netip.MustParseAddr("192.0.2.1"))
	for i := range 200 {
		if !tab.Allow(k, start) {
			t.Fatalf("attempt %d of the burst was refused", i+1)
		}
	}
	if tab.Allow(k, start) {
		t.Fatal("attempt 201 was allowed at the same moment")
	}
	// Steps shorter than a token must add up.
	allowed := 0
	for ms := range 1000 {
		if tab.Allow(k, start.Add(time.Duration(ms+1)*time.Millisecond)) {
			allowed++
		}
	}
	if allowed != 20 {
		t.Errorf("allowed %d in the second after the burst, want 20", allowed)
	}
	if !tab.Allow(Addr(netip.MustParseAddr("192.0.2.2")), start) {
		t.Error("another source was refused")
	}
}

func TestDebitGoesBelowZeroAndRefundComesBack(t *testing.T) {
	tab := New(1, 10)
	k := Bytes([]byte("machine"))
	tab.Refund(k, start, 5)
	tab.Debit(k, start, 15)
	if !tab.Empty(k, start) {
		t.Error("a bucket in debt is not empty")
	}
	if got, want := tab.Wait(k, start), 6*time.Second; got < want || got > want+time.Millisecond {
		t.Errorf("Wait = %v, want %v", got, want)
	}
	tab.Refund(k, start, 6)
	if tab.Empty(k, start) {
		t.Error("bucket empty after the refund of 6 on -5")
	}
	tab.Debit(k, start, 1000)
	if got, want := tab.Wait(k, start), 11*time.Second; got < want || got > want+time.Millisecond {
		t.Errorf("Wait at the deepest debt = %v, want %v", got, want)
	}
}

func TestAddressesShareBucketsBySite(t *testing.T) {
	key := func(s string) Key { return Addr(netip.MustParseAddr(s)) }
	for _, same := range [][2]string{
		{"192.0.2.7", "::ffff:192.0.2.7"},
		{"2001:db8:1:2::1", "2001:db8:1:2:ffff::9"},
	} {
		if key(same[0]) != key(same[1]) {
			t.Errorf("%s and %s have different keys", same[0], same[1])
		}
	}
	for _, differ := range [][2]string{
		{"192.0.2.7", "192.0.2.8"},
		{"2001:db8:1:2::1", "2001:db8:1:3::1"},
	} {
		if key(differ[0]) == key(differ[1]) {
			t.Errorf("%s and %s have one key", differ[0], differ[1])
		}
	}
}

func TestClockGoingBackNeitherFillsNorFreezes(t *testing.T) {
	tab := New(1, 2)
	k := Bytes([]byte("k"))
	tab.Allow(k, start)
	tab.Allow(k, start)
	if tab.Allow(k, start.Add(-time.Hour)) {
		t.Error("a clock that went back filled the bucket")
	}
	if !tab.Allow(k, start.Add(-time.Hour+time.Second)) {
		t.Error("the bucket stood still after the clock went back")
	}
}

func TestFloodOfKeysKeepsSizeAndMostDebts(t *testing.T) {
	if got := unsafe.Sizeof(bucket{}); got != 16 {
		t.Fatalf("a bucket is %d bytes, want 16", got)
	}
	tab := New(1, 1)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var b [32]byte
	for i := range uint64(1_000_000) {
		binary.LittleEndian.PutUint64(b[:], i)
		tab.Allow(Bytes(b[:]), start)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 64<<10 {
		t.Errorf("a million keys grew the heap by %d bytes", grown)
	}
	// Of the last 10,000 keys nearly all must still be known as spent.
	forgotten := 0
	for i := uint64(990_000); i < 1_000_000; i++ {
		binary.LittleEndian.PutUint64(b[:], i)
		if !tab.Empty(Bytes(b[:]), start) {
			forgotten++
		}
	}
	if forgotten > 2000 {
		t.Errorf("%d of the last 10,000 debts were forgotten", forgotten)
	}
	runtime.KeepAlive(tab)
}

func TestConcurrentUseSpendsEachTokenOnce(t *testing.T) {
	tab := New(0, 1000)
	k := Bytes([]byte("k"))
	var wg sync.WaitGroup
	got := make([]int, 8)
	for g := range got {
		wg.Go(func() {
			for range 500 {
				if tab.Allow(k, start) {
					got[g]++
				}
			}
		})
	}
	wg.Wait()
	sum := 0
	for _, n := range got {
		sum += n
	}
	if sum != 1000 {
		t.Errorf("%d tokens spent of 1000", sum)
	}
}

func BenchmarkAllow(b *testing.B) {
	tab := New(1e9, 1e6)
	now := start
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		a := netip.MustParseAddr("192.0.2.1")
		for pb.Next() {
			tab.Allow(Addr(a), now)
			a = a.Next()
		}
	})
}

func TestBucketOfAllSources(t *testing.T) {
	b := NewBucket(20, 200)
	for i := range 200 {
		if b.Empty(start) {
			t.Fatalf("empty after %d of the burst", i)
		}
		b.Debit(start, 1)
	}
	if !b.Empty(start) {
		t.Error("not empty after the burst")
	}
	b.Debit(start, 10_000)
	if !b.Empty(start.Add(10*time.Second)) || b.Empty(start.Add(11*time.Second)) {
		t.Error("a debt is not one burst at most, paid off at the rate")
	}
}
