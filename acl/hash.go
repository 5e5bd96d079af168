package acl

import "math/bits"

// hasher digests words and strings. It needs no secret: the digests only
// speed up comparisons, equality always compares content. It must not differ
// between processes, because two servers compare their answers.
type hasher uint64

func newHash() hasher { return 0x9e3779b97f4a7c15 }

func (h *hasher) word(w uint64) {
	hi, lo := bits.Mul64(uint64(*h)^w^0xa0761d6478bd642f, 0xe7037ed1a0b428db)
	*h = hasher(hi ^ lo ^ bits.RotateLeft64(w, 29))
}

func (h *hasher) text(s string) {
	h.word(uint64(len(s)))
	for len(s) >= 8 {
		h.word(uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24 |
			uint64(s[4])<<32 | uint64(s[5])<<40 | uint64(s[6])<<48 | uint64(s[7])<<56)
		s = s[8:]
	}
	var w uint64
	for i := range len(s) {
		w |= uint64(s[i]) << (8 * i)
	}
	h.word(w)
}

func (h hasher) sum() uint64 { return uint64(h) }
