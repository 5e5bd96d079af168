package config

import (
	"strings"
)

// nearest returns the name that word was most likely meant to be, or "": a
// name that ends in the word's last element, when just one does
// (`stun_listen_addr` written at the top level), else the one with the fewest
// differing characters, a third of them at most.
func nearest(word string, names []string) string {
	if len(word) > 100 {
		return "" // no key is nearly as long
	}
	lower := strings.ToLower(word)
	if n, ok := sameEnding(lower, names); ok {
		return n
	}
	best, bestDist := "", len(word)/3+2
	for _, n := range names {
		if d := distance(lower, n); d < bestDist {
			best, bestDist = n, d
		}
	}
	return best
}

func sameEnding(word string, names []string) (found string, ok bool) {
	last := word[strings.LastIndexByte(word, '.')+1:]
	for _, n := range names {
		if n[strings.LastIndexByte(n, '.')+1:] == last {
			if ok {
				return "", false
			}
			found, ok = n, true
		}
	}
	return found, ok
}

// distance is the number of single-character edits (insert, delete, replace,
// swap of neighbours) between a and b.
func distance(a, b string) int {
	prev2, prev, cur := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], prev2[j-2]+1)
			}
		}
		prev2, prev, cur = prev, cur, prev2
	}
	return prev[len(b)]
}
