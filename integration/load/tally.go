package main

import (
	"fmt"
	"sort"
	"sync"
)

// tally counts things by kind and keeps the first few in words.
type tally struct {
	mu    sync.Mutex
	kinds map[string]*kind
}

type kind struct {
	Count    int      `json:"count"`
	Examples []string `json:"examples"`
}

const maxExamples = 5

func (t *tally) add(name, format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := t.kinds[name]
	if k == nil {
		if t.kinds == nil {
			t.kinds = map[string]*kind{}
		}
		k = new(kind)
		t.kinds[name] = k
	}
	k.Count++
	if len(k.Examples) < maxExamples {
		k.Examples = append(k.Examples, fmt.Sprintf(format, args...))
	}
}

func (t *tally) total() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0
	for _, k := range t.kinds {
		n += k.Count
	}
	return n
}

func (t *tally) snapshot() map[string]kind {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := make(map[string]kind, len(t.kinds))
	for name, k := range t.kinds {
		m[name] = kind{k.Count, append([]string(nil), k.Examples...)}
	}
	return m
}

func (t *tally) lines() []string {
	var out []string
	for name, k := range t.snapshot() {
		for _, e := range k.Examples {
			out = append(out, fmt.Sprintf("%s (%d): %s", name, k.Count, e))
		}
	}
	sort.Strings(out)
	return out
}
