package db

import "sync"

// A broadcast signals each subscriber through a channel with one slot: a
// signal that nobody has taken yet stands for all later ones.
type broadcast struct {
	own chan struct{}

	mu   sync.Mutex // guards the following fields
	subs map[chan struct{}]struct{}
}

func newBroadcast() *broadcast {
	return &broadcast{own: make(chan struct{}, 1), subs: map[chan struct{}]struct{}{}}
}

func (b *broadcast) signal() {
	poke(b.own)
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.subs {
		poke(c)
	}
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Wake returns a channel that holds a signal when something may have been
// committed, by this server or (PostgreSQL) another. Missed and repeated
// signals are normal: a follower reads until nothing moves. It is the same
// channel at each call, for one consumer; others use Subscribe.
func (s *Store) Wake() <-chan struct{} { return s.wake.own }

// Subscribe is Wake for a further consumer. cancel ends it.
func (s *Store) Subscribe() (ch <-chan struct{}, cancel func()) { return s.wake.subscribe() }

func (b *broadcast) subscribe() (ch <-chan struct{}, cancel func()) {
	c := make(chan struct{}, 1)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.subs[c] = struct{}{}
	return c, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.subs, c)
	}
}
