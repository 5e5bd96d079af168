package acl

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
)

// seedPolicies are those of the text cases and some random ones.
func seedPolicies(f *testing.F) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		for _, x := range txtar.Parse(b).Files {
			if strings.HasSuffix(x.Name, ".policy") {
				f.Add(x.Data)
			}
		}
	}
	rnd := rand.New(rand.NewPCG(9, 9))
	for range 5 {
		f.Add(randomPolicy(rnd))
	}
	f.Add(Default())
	f.Add([]byte(strings.Repeat("[", 100)))
	f.Add([]byte(`{"acls":/* { */[]}//`))
}

// checkErrors: a fault has a place inside the text.
func checkErrors(t *testing.T, src []byte, err error) {
	t.Helper()
	var errs Errors
	if !errors.As(err, &errs) || len(errs) == 0 {
		t.Fatalf("error of type %T: %v", err, err)
	}
	lines := bytes.Split(src, []byte("\n"))
	for _, e := range errs {
		if e.Line < 1 || e.Line > len(lines) || e.Column < 1 || e.Column > len(lines[e.Line-1])+1 || e.Message == "" {
			t.Fatalf("place %d:%d of %q is not in the text %q", e.Line, e.Column, e.Message, src)
		}
	}
}

func FuzzParse(f *testing.F) {
	seedPolicies(f)
	f.Fuzz(func(t *testing.T, src []byte) {
		before := bytes.Clone(src)
		_, err := Parse(src)
		if !bytes.Equal(src, before) {
			t.Fatal("Parse changed its input")
		}
		if err != nil {
			checkErrors(t, src, err)
		}
		once, ferr := Format(src)
		if ferr != nil {
			if err == nil {
				t.Fatalf("Format refuses a valid policy: %v", ferr)
			}
			checkErrors(t, src, ferr)
			return
		}
		if _, again := Parse(once); (again == nil) != (err == nil) {
			t.Fatalf("formatting changes the verdict from %v to %v\n%s\n%s", err, again, src, once)
		}
		if twice, err := Format(once); err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("formatting again changes the text (%v)\n%s\n%s", err, once, twice)
		}
	})
}

func FuzzCompile(f *testing.F) {
	seedPolicies(f)
	tailnets := make([]*Tailnet, 4)
	for i := range tailnets {
		tailnets[i] = randomTailnet(rand.New(rand.NewPCG(uint64(i), 3)))
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		x := Examine(src, tailnets[0])
		if len(x.Errors) > 0 {
			checkErrors(t, src, x.Errors)
		} else if x.Access == nil {
			t.Fatal("neither compiled nor refused")
		}
		p, err := Parse(src)
		if (err == nil) != (x.Policy != nil) {
			t.Fatalf("Parse says %v, Examine %v", err, x.Errors)
		}
		if err != nil {
			return
		}
		for _, tn := range tailnets {
			a, err := Compile(p, tn)
			if err != nil {
				checkErrors(t, src, err)
				continue
			}
			checkAccess(t, tn, a)
			Check(p, tn, a)
			Warnings(p, tn)
			b, err := Compile(p, tn)
			if err != nil {
				t.Fatal(err)
			}
			checkSame(t, a, b)
			if e := Diff(a, b); !e.Empty() {
				t.Fatalf("a policy differs from itself: %+v\n%s", e, src)
			}
		}
	})
}

// checkAccess verifies what holds for every compiled policy.
func checkAccess(t *testing.T, tn *Tailnet, a *Access) {
	t.Helper()
	for i := range tn.Nodes {
		for k := range tn.Nodes {
			hole := tn.Nodes[i].ID == 0 || tn.Nodes[k].ID == 0
			if i != k && a.Row(i).Has(k) != a.Row(k).Has(i) {
				t.Fatalf("slots %d and %d do not see each other alike", i, k)
			}
			if hole && a.Row(i).Has(k) {
				t.Fatalf("a hole is visible: %d sees %d", i, k)
			}
			if a.Row(i).Equal(a.Row(k)) != (a.Row(i) == a.Row(k)) || a.Filter(i).Equal(a.Filter(k)) != (a.Filter(i) == a.Filter(k)) ||
				a.SSH(i).Equal(a.SSH(k)) != (a.SSH(i) == a.SSH(k)) || a.Caps(i).Equal(a.Caps(k)) != (a.Caps(i) == a.Caps(k)) ||
				a.Views(i).Equal(a.Views(k)) != (a.Views(i) == a.Views(k)) {
				t.Fatalf("equal answers of slots %d and %d do not share a pointer", i, k)
			}
		}
		v := a.Views(i)
		last := -1
		seen := map[netip.Prefix]int{}
		for x, slot := range v.Slots {
			if slot <= last || slot == i || tn.Nodes[slot].ID == 0 {
				t.Fatalf("views of slot %d: bad slots %v", i, v.Slots)
			}
			last = slot
			for _, p := range v.Peers[x].PrimaryRoutes {
				if o, ok := seen[p]; ok {
					t.Fatalf("slot %d sees %v on two peers, %d and %d", i, p, o, slot)
				}
				seen[p] = slot
			}
		}
		for _, r := range a.Filter(i).Rules {
			if (len(r.DstPorts) == 0) == (len(r.CapGrant) == 0) {
				t.Fatalf("a rule must have either ports or capabilities: %+v", r)
			}
		}
	}
}

func checkSame(t *testing.T, a, b *Access) {
	t.Helper()
	for i := range a.Len() {
		if !a.Row(i).Equal(b.Row(i)) || a.Row(i).Hash() != b.Row(i).Hash() || !a.Filter(i).Equal(b.Filter(i)) ||
			!a.SSH(i).Equal(b.SSH(i)) || !a.Caps(i).Equal(b.Caps(i)) || !a.Views(i).Equal(b.Views(i)) ||
			!a.Self(i).Equal(b.Self(i)) || !a.Base(i).Equal(b.Base(i)) {
			t.Fatalf("slot %d: two compilations of the same policy differ", i)
		}
	}
}

// TestRandomPoliciesKeepInvariants runs the checks of FuzzCompile on policies
// that are all valid.
func TestRandomPoliciesKeepInvariants(t *testing.T) {
	for seed := range 300 {
		rnd := rand.New(rand.NewPCG(uint64(seed), 21))
		tn, src := randomTailnet(rnd), randomPolicy(rnd)
		p, err := Parse(src)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		a, err := Compile(p, tn)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		checkAccess(t, tn, a)
		b, err := Compile(p, tn)
		if err != nil {
			t.Fatal(err)
		}
		checkSame(t, a, b)
		if e := Diff(a, b); !e.Empty() {
			t.Fatalf("seed %d: a policy differs from itself: %+v", seed, e)
		}
	}
}
