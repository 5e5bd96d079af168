package netmap

import (
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"weak"

	"github.com/signalbox-net/signalbox/control/tailnet"
)

// A Kind says what a kept frame was made from.
type Kind int

// The kinds of frames.
const (
	KindTile     Kind = iota // nodes of a tile
	KindSnapshot             // filters, SSH rules, profiles, relays and DNS of a snapshot
	KindDelta                // messages between two snapshots
	Kinds                    // their number
)

func (k Kind) String() string { return [...]string{"tile", "snapshot", "delta"}[k] }

// Frames accounts for all frames that are kept in this process.
var Frames = newAccount(256 << 20)

// An Account bounds the bytes of kept frames, of all caches together. Frames are kept in caches that hang on what they were made from and go
// with it; the account only counts them, and when they are too many it empties caches, those first from which nothing was taken since it last
// looked. An emptied cache costs the making of its frames again and nothing else: a frame depends on what its cache hangs on and on its key
// alone.
//
// Taking a frame touches no lock but that of its cache. The account's own lock is taken to add a cache, and by whoever finds the bound
// exceeded.
type Account struct {
	limit, bytes atomic.Int64
	counts       [Kinds]counts

	onLeave func() // for tests; nil otherwise

	mu    sync.Mutex // guards the following fields
	list  []*member
	prune int // length of list at which it is rid of caches that are gone
	hand  int // where in list the search for something to drop goes on
}

type counts struct{ hits, misses, bytes, entries, caches atomic.Int64 }

// Count is what an Account knows of one kind.
type Count struct {
	Hits, Misses           int64 // frames found ready, and made; they only grow
	Bytes, Entries, Caches int64 // kept now, including what waits for the garbage collector
}

// A member is a cache as its account sees it. It does not keep the cache alive, and outlives it, so that what it held is given back.
type member struct {
	account *Account
	kind    Kind
	bytes   atomic.Int64
	entries atomic.Int64
	// look empties the cache, if nothing was taken from it since the last look or if force is set. It is false when the cache is gone, and nil
	// when that is known. Guarded by the account's lock.
	look func(force bool) bool
}

func newAccount(limit int64) *Account {
	a := new(Account)
	a.limit.Store(limit)
	return a
}

// SetLimit bounds the bytes of kept frames, with what it takes to find them. 0 keeps none.
func (a *Account) SetLimit(bytes int64) {
	a.limit.Store(bytes)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.shrink()
}

// Limit is the bound.
func (a *Account) Limit() int64 { return a.limit.Load() }

// Bytes are those kept now.
func (a *Account) Bytes() int64 { return a.bytes.Load() }

// Count is what is known of one kind of frames.
func (a *Account) Count(k Kind) Count {
	c := &a.counts[k]
	return Count{Hits: c.hits.Load(), Misses: c.misses.Load(), Bytes: c.bytes.Load(), Entries: c.entries.Load(), Caches: c.caches.Load()}
}

// add takes note of entries and bytes that came, or went.
func (m *member) add(entries, bytes int64) {
	m.entries.Add(entries)
	m.bytes.Add(bytes)
	m.account.bytes.Add(bytes)
	c := &m.account.counts[m.kind]
	c.entries.Add(entries)
	c.bytes.Add(bytes)
}

// release gives back all that m still counts. Nothing is added to m at the same time: its lock is held, or it is gone.
func (m *member) release() { m.add(-m.entries.Load(), -m.bytes.Load()) }

// join takes a cache in.
func (a *Account) join(m *member) {
	a.counts[m.kind].caches.Add(1)
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.list) >= a.prune {
		a.list = slices.DeleteFunc(a.list, func(m *member) bool { return m.look == nil })
		a.prune = max(64, 2*len(a.list))
	}
	a.list = append(a.list, m)
}

// forget gives back what a cache held that is gone. a.mu is held.
func (a *Account) forget(m *member) {
	if m.look == nil {
		return
	}
	m.look = nil
	m.release()
	a.counts[m.kind].caches.Add(-1)
}

// leave is called some time after a cache is gone.
func (a *Account) leave(m *member) {
	a.mu.Lock()
	a.forget(m)
	a.mu.Unlock()
	if a.onLeave != nil {
		a.onLeave()
	}
}

// tryShrink shrinks, if that has to be. Whoever comes while somebody else is at it goes on with his own work.
func (a *Account) tryShrink() {
	if a.bytes.Load() > a.limit.Load() && a.mu.TryLock() {
		a.shrink()
		a.mu.Unlock()
	}
}

// shrink empties caches until an eighth of the room is free. It passes over caches that were used since the last time, unless that does not
// suffice. a.mu is held.
func (a *Account) shrink() {
	goal := a.limit.Load() / 8 * 7
	for _, force := range []bool{false, true} {
		for range len(a.list) {
			if a.bytes.Load() <= goal {
				return
			}
			a.hand = (a.hand + 1) % len(a.list)
			if m := a.list[a.hand]; m.look != nil && !m.look(force) {
				a.forget(m)
			}
		}
	}
}

// cache keeps frames by what they were made from. Two callers that miss at once wait for one making.
type cache[K comparable] struct {
	*member
	size func(K) int // bytes of a key

	mu   sync.Mutex // guards the following fields
	m    map[K]*entry
	used bool // something was taken since the account last looked
}

type entry struct {
	once sync.Once
	f    Frame
}

// entryCost is what an entry takes beside key and frame: its struct, its place in the map, the slice that was a little too large.
const entryCost = 160

// newCache returns a cache that counts in a. size is the memory that a key holds beside itself.
func newCache[K comparable](a *Account, kind Kind, size func(K) int) *cache[K] {
	c := &cache[K]{member: &member{account: a, kind: kind}, size: size}
	p := weak.Make(c)
	c.look = func(force bool) bool {
		c := p.Value()
		if c != nil {
			c.clear(force)
		}
		return c != nil
	}
	a.join(c.member)
	runtime.AddCleanup(c, a.leave, c.member)
	return c
}

func (c *cache[K]) clear(force bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.used && !force {
		c.used = false
		return
	}
	c.m = nil
	c.release()
}

// get returns the frame under key, made by make if it is not there.
func (c *cache[K]) get(key K, make func() Frame) Frame {
	count := &c.account.counts[c.kind]
	c.mu.Lock()
	c.used = true
	e := c.m[key]
	hit := e != nil
	if !hit {
		e = new(entry)
		if c.m == nil {
			c.m = map[K]*entry{}
		}
		c.m[key] = e
	}
	c.mu.Unlock()
	if hit {
		count.hits.Add(1)
	} else {
		count.misses.Add(1)
	}
	made := false
	e.once.Do(func() {
		e.f = make()
		made = true
	})
	if made {
		c.keep(key, e)
	}
	return e.f
}

// keep counts a new entry, if it is still there and fits.
func (c *cache[K]) keep(key K, e *entry) {
	cost := int64(len(e.f) + c.size(key) + entryCost)
	c.mu.Lock()
	if c.m[key] == e {
		if cost > c.account.limit.Load()/8 {
			delete(c.m, key)
		} else {
			c.add(1, cost)
		}
	}
	c.mu.Unlock()
	c.account.tryShrink()
}

// held is what the cache holds now.
func (c *cache[K]) held() Held {
	return Held{Frames: int(c.entries.Load()), Bytes: c.bytes.Load()}
}

// Held is what one cache keeps.
type Held struct {
	Frames int   `json:"frames"`
	Bytes  int64 `json:"bytes"`
}

// framesKey is under which a Memo holds its cache.
const framesKey = "frames"

// cacheOf finds or makes the cache of a memo.
func cacheOf[K comparable](memo *sync.Map, kind Kind, size func(K) int) *cache[K] {
	if c, ok := memo.Load(framesKey); ok {
		return c.(*cache[K])
	}
	c, _ := memo.LoadOrStore(framesKey, newCache(Frames, kind, size))
	return c.(*cache[K])
}

func tileCache(t *tailnet.Tile) *cache[tileKey] {
	return cacheOf(&t.Memo, KindTile, func(k tileKey) int { return len(k.looks) })
}

func deltaCache(d *tailnet.Delta) *cache[string] {
	return cacheOf(&d.Memo, KindDelta, func(k string) int { return len(k) })
}

func snapshotCache(s *tailnet.Snapshot) *cache[any] {
	return cacheOf(&s.Memo, KindSnapshot, func(k any) int {
		if p, ok := k.(profilesKey); ok {
			return len(p)
		}
		return 0
	})
}

// memo keeps a frame with the snapshot.
func memo(s *tailnet.Snapshot, key any, make func() Frame) Frame {
	return snapshotCache(s).get(key, make)
}

// heldBy is what the cache in a memo holds, nothing when it has none yet.
func heldBy(memo *sync.Map) Held {
	if c, ok := memo.Load(framesKey); ok {
		return c.(interface{ held() Held }).held()
	}
	return Held{}
}

// TileFrames, SnapshotFrames and DeltaFrames are what is kept of each now.
func TileFrames(t *tailnet.Tile) Held { return heldBy(&t.Memo) }

// SnapshotFrames is what is kept with s itself, without its tiles.
func SnapshotFrames(s *tailnet.Snapshot) Held { return heldBy(&s.Memo) }

// DeltaFrames is what is kept with d.
func DeltaFrames(d *tailnet.Delta) Held { return heldBy(&d.Memo) }
