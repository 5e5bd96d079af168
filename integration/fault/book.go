package fault

import (
	"fmt"
	"maps"
	"slices"
	"sync"
)

// A Book holds what a server must know. A fact has a name, such as
// "user/alice", and a value; the empty value says that there is no such thing.
type Book struct {
	mu    sync.Mutex // guards facts
	facts map[string]*fact
}

// A fact's sure value was acknowledged; maybe is that of a request without an
// answer yet. There is at most one request at a time for a fact.
type fact struct {
	sure  string
	maybe string
	open  bool // maybe stands
}

// NewBook returns a book without facts.
func NewBook() *Book { return &Book{facts: map[string]*fact{}} }

func (b *Book) fact(name string) *fact {
	f := b.facts[name]
	if f == nil {
		f = new(fact)
		b.facts[name] = f
	}
	return f
}

// Begin notes that a request is sent which makes the fact so.
func (b *Book) Begin(name, value string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.fact(name)
	f.maybe, f.open = value, true
}

// Done notes that the server acknowledged what Begin noted.
func (b *Book) Done(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fact(name).settle()
}

// Refused notes that the server refused what Begin noted: nothing changed.
func (b *Book) Refused(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fact(name).open = false
}

func (f *fact) settle() {
	if f.open {
		f.sure, f.open = f.maybe, false
	}
}

// Seen notes that the server showed somebody a fact, which from then on may
// not be lost, answered or not.
func (b *Book) Seen(name, value string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if f := b.facts[name]; f != nil && f.open && f.maybe == value {
		f.settle()
	}
}

// Value is the acknowledged value of a fact, and the one of a request without
// an answer.
func (b *Book) Value(name string) (sure, maybe string, open bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.fact(name)
	return f.sure, f.maybe, f.open
}

// Check compares the book with everything that the server shows, and returns
// what is wrong. From then on the book says what the server shows.
func (b *Book) Check(shown map[string]string) (wrong []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(b.facts)) {
		f, got := b.facts[name], shown[name]
		switch {
		case got == f.sure || f.open && got == f.maybe:
		case f.open:
			wrong = append(wrong, fmt.Sprintf("%s is %q, must be %q or %q, the value of a request without an answer", name, got, f.sure, f.maybe))
		default:
			wrong = append(wrong, fmt.Sprintf("%s is %q, but %q was acknowledged", name, got, f.sure))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(shown)) {
		if b.facts[name] == nil {
			wrong = append(wrong, fmt.Sprintf("%s is %q, and nobody asked for it", name, shown[name]))
		}
	}
	for name, f := range b.facts {
		f.sure, f.open = shown[name], false
	}
	return wrong
}
