package acl

import "math/bits"

// Row is a set of slots: the peers that one node may see. Rows with equal
// content share one pointer within an Access.
type Row struct {
	set
	hash  uint64
	count int
}

// Has reports whether the node in slot is visible. Slots beyond the row are
// not.
func (r *Row) Has(slot int) bool { return r.has(slot) }

// Word returns the bits of slots 64i to 64i+63, lowest first; zero beyond the
// end.
func (r *Row) Word(i int) uint64 {
	if i >= len(r.set) {
		return 0
	}
	return r.set[i]
}

// Words is the number of words that may be non-zero.
func (r *Row) Words() int { return len(r.set) }

// Count is the number of visible slots.
func (r *Row) Count() int { return r.count }

// Hash is a digest of the content: equal rows have equal hashes, also between
// two Access values of the same size.
func (r *Row) Hash() uint64 { return r.hash }

// Equal compares the content. Rows of different length are equal when the
// longer one has no bits beyond the shorter.
func (r *Row) Equal(o *Row) bool {
	if r == o {
		return true
	}
	if r.hash != o.hash {
		return false
	}
	for i := range max(len(r.set), len(o.set)) {
		if r.Word(i) != o.Word(i) {
			return false
		}
	}
	return true
}

// set is a bitset over slots. All sets of one compilation have equal length.
type set []uint64

func newSet(n int) set { return make(set, (n+63)/64) }

func (s set) has(i int) bool {
	return i >= 0 && i>>6 < len(s) && s[i>>6]>>(i&63)&1 != 0
}

func (s set) add(i int) { s[i>>6] |= 1 << (i & 63) }

func (s set) del(i int) { s[i>>6] &^= 1 << (i & 63) }

func (s set) or(o set) {
	for i, w := range o {
		s[i] |= w
	}
}

func (s set) and(o set) {
	for i := range s {
		s[i] &= o[i]
	}
}

func (s set) clone() set { return append(set(nil), s...) }

func (s set) empty() bool {
	for _, w := range s {
		if w != 0 {
			return false
		}
	}
	return true
}

func (s set) count() int {
	n := 0
	for _, w := range s {
		n += bits.OnesCount64(w)
	}
	return n
}

func (s set) equal(o set) bool {
	for i, w := range s {
		if w != o[i] {
			return false
		}
	}
	return true
}

// all yields the members in ascending order.
func (s set) all(yield func(int) bool) {
	for i, w := range s {
		for ; w != 0; w &= w - 1 {
			if !yield(i<<6 + bits.TrailingZeros64(w)) {
				return
			}
		}
	}
}

// hash ignores trailing zero words, so that sets of different capacity but
// equal content agree.
func (s set) hash() uint64 {
	n := len(s)
	for n > 0 && s[n-1] == 0 {
		n--
	}
	h := newHash()
	for _, w := range s[:n] {
		h.word(w)
	}
	return h.sum()
}

func internRow(index map[uint64][]*Row, s set) *Row {
	h := s.hash()
	for _, r := range index[h] {
		if r.set.equal(s) {
			return r
		}
	}
	r := &Row{set: s, hash: h, count: s.count()}
	index[h] = append(index[h], r)
	return r
}
