// Package limit keeps token buckets in tables of a fixed size.
//
// It owns nothing but the buckets: callers decide what a key is (a source
// address, a machine key), when a token is due and what a refusal looks like.
// A table never grows, whatever strangers send: 65,536 buckets of 16 bytes in
// sets of four, and a key that finds its set full of busier ones takes the
// place of one of them at random. The price is that a flood of invented keys
// can forget an honest debt, never that it can invent one; buckets that have
// filled up again are taken first, since forgetting those loses nothing.
//
// A table does not read a clock. A caller that charges only failures asks
// first and pays after the verdict:
//
//	if failures.Empty(limit.Addr(source), now) {
//		return tooManyRequests(failures.Wait(limit.Addr(source), now))
//	}
//	if err := attempt(); err != nil {
//		failures.Debit(limit.Addr(source), now, 1)
//	}
package limit

import (
	"hash/maphash"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"
)

const (
	tableSize = 1 << 16
	ways      = 4
	sets      = tableSize / ways
	stripes   = 256

	// ticksPerSecond is the resolution of a bucket's stamp; 32 bits of it
	// last two years before a bucket that nobody touched looks young again.
	ticksPerSecond = 64
)

// seed makes the place of a key unpredictable, so that nobody can choose
// keys that push out a particular bucket.
var seed = maphash.MakeSeed()

// Key names a bucket. It is a hash under a seed of this process: meaningless
// elsewhere, equal for equal inputs.
type Key uint64

// Addr is the key of a network source: an IPv4 address by itself (also when
// written as IPv4-mapped IPv6), an IPv6 address by its /64, the least that a
// site is given. All invalid addresses share one key.
func Addr(a netip.Addr) Key {
	a = a.Unmap()
	b := a.As16()
	n := len(b)
	if a.Is6() {
		n = 8
	}
	return Key(maphash.Bytes(seed, b[:n]))
}

// Bytes is the key of any byte string, such as the 32 bytes of a machine key.
func Bytes(b []byte) Key {
	return Key(maphash.Bytes(seed, b))
}

// A bucket is empty space while its tag is zero.
type bucket struct {
	tag    uint64
	tokens float32
	stamp  uint32
}

// Table is a fixed number of token buckets that share one rate and burst.
// All methods may be called concurrently. A key that the table does not hold
// has a full bucket.
type Table struct {
	rate  float32 // tokens per tick
	burst float32

	// locks[i] guards the sets whose number is i modulo stripes.
	locks [stripes]sync.Mutex
	sets  [sets][ways]bucket
}

// A Bucket is one token bucket by itself, for what all sources share. Its
// methods may be called concurrently.
type Bucket struct {
	rate  float32 // tokens per tick
	burst float32

	mu sync.Mutex // guards the following field
	b  bucket
}

// NewBucket returns a full bucket of burst tokens that gains perSecond tokens
// a second.
func NewBucket(perSecond, burst float64) *Bucket {
	return &Bucket{rate: float32(perSecond / ticksPerSecond), burst: float32(burst), b: bucket{tokens: float32(burst)}}
}

// Empty reports whether the bucket holds less than one token, and takes none.
func (b *Bucket) Empty(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.b.fill(now, b.rate, b.burst)
	return b.b.tokens < 1
}

// Debit takes n tokens whether or not the bucket holds them. A debt is at most
// one burst.
func (b *Bucket) Debit(now time.Time, n float64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.b.fill(now, b.rate, b.burst)
	b.b.tokens = max(b.b.tokens-float32(n), -b.burst)
}

// New returns a table whose buckets hold at most burst tokens and gain
// perSecond tokens a second.
func New(perSecond, burst float64) *Table {
	return &Table{rate: float32(perSecond / ticksPerSecond), burst: float32(burst)}
}

// Allow takes one token of k's bucket and reports whether there was one.
func (t *Table) Allow(k Key, now time.Time) bool {
	set, mu := t.lock(k)
	defer mu.Unlock()
	b := t.find(set, k, now)
	if b == nil {
		if t.burst < 1 {
			return false
		}
		t.insert(set, k, now, t.burst-1)
		return true
	}
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// Empty reports whether k's bucket holds less than one token, and takes none.
func (t *Table) Empty(k Key, now time.Time) bool {
	return t.Wait(k, now) > 0
}

// Wait is how long it takes until k's bucket holds a token, 0 when it has one.
func (t *Table) Wait(k Key, now time.Time) time.Duration {
	set, mu := t.lock(k)
	defer mu.Unlock()
	tokens := t.burst
	if b := t.find(set, k, now); b != nil {
		tokens = b.tokens
	}
	if tokens >= 1 {
		return 0
	}
	if t.rate <= 0 {
		return time.Duration(1<<63 - 1)
	}
	return time.Duration(float64(1-tokens)/float64(t.rate)*float64(time.Second)/ticksPerSecond) + 1
}

// Debit takes n tokens whether or not the bucket holds them: attempts that
// ran at once and all failed are all paid for. A debt is at most one burst.
func (t *Table) Debit(k Key, now time.Time, n float64) {
	set, mu := t.lock(k)
	defer mu.Unlock()
	if b := t.find(set, k, now); b != nil {
		b.tokens = max(b.tokens-float32(n), -t.burst)
		return
	}
	t.insert(set, k, now, max(t.burst-float32(n), -t.burst))
}

// Refund gives n tokens back, up to a full bucket.
func (t *Table) Refund(k Key, now time.Time, n float64) {
	set, mu := t.lock(k)
	defer mu.Unlock()
	if b := t.find(set, k, now); b != nil {
		b.tokens = min(b.tokens+float32(n), t.burst)
	}
}

// lock returns k's set and its locked mutex.
func (t *Table) lock(k Key) (*[ways]bucket, *sync.Mutex) {
	i := uint64(k) % sets
	mu := &t.locks[i%stripes]
	mu.Lock()
	return &t.sets[i], mu
}

// find returns k's bucket filled up to now, or nil.
func (t *Table) find(set *[ways]bucket, k Key, now time.Time) *bucket {
	for i := range set {
		if b := &set[i]; b.tag == tag(k) {
			b.fill(now, t.rate, t.burst)
			return b
		}
	}
	return nil
}

func (t *Table) insert(set *[ways]bucket, k Key, now time.Time, tokens float32) {
	victim := &set[rand.IntN(ways)]
	for i := range set {
		b := &set[i]
		if b.tag != 0 {
			b.fill(now, t.rate, t.burst)
		}
		if b.tag == 0 || b.tokens >= t.burst {
			victim = b
			break
		}
	}
	*victim = bucket{tag: tag(k), tokens: tokens, stamp: ticks(now)}
}

// fill adds what the bucket gained since its stamp. A clock that went back
// adds nothing and moves the stamp, or the bucket would stand still until the
// old time comes round again.
func (b *bucket) fill(now time.Time, rate, burst float32) {
	at := ticks(now)
	if gone := int32(at - b.stamp); gone > 0 {
		b.tokens = min(b.tokens+float32(gone)*rate, burst)
	}
	b.stamp = at
}

func tag(k Key) uint64 { return uint64(k) | 1 }

func ticks(now time.Time) uint32 {
	return uint32(now.Unix()*ticksPerSecond + int64(now.Nanosecond())*ticksPerSecond/int64(time.Second))
}
