package acl

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

func TestDeepNestingIsRefusedBeforeParsing(t *testing.T) {
	deep := strings.Repeat("[", maxDepth+1) + strings.Repeat("]", maxDepth+1)
	_, err := Parse([]byte("{\n\"acls\": " + deep[1:] + "}"))
	want := fmt.Sprintf("line 2, column %d: nested deeper than %d levels", len(`"acls": `)+maxDepth, maxDepth)
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	// Brackets in strings and comments are no nesting.
	ok := `{"acls": [], /* ` + deep + ` */ "groups": {"group:a": []}} // ` + deep + "\n"
	if _, err := Parse([]byte(ok)); err != nil {
		t.Errorf("brackets in comments: %v", err)
	}
	if _, err := Parse([]byte(`{"hosts": {"` + deep + `": "10.0.0.1"}, "acls": []}`)); err != nil {
		t.Errorf("brackets in strings: %v", err)
	}
}

func TestOversizeIsRefused(t *testing.T) {
	_, err := Parse([]byte("{}" + strings.Repeat(" ", maxSize)))
	if err == nil || !strings.Contains(err.Error(), "the limit is") {
		t.Errorf("got %v", err)
	}
}

func TestBigPolicyCompiles(t *testing.T) {
	tn := fleet(2000, 60, rand.New(rand.NewPCG(1, 2)))
	src := bigPolicy(len(tn.Users))
	if len(src) < 1<<20*3/4 {
		t.Fatalf("the policy has only %d bytes", len(src))
	}
	p, err := Parse(src)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.rules) != 10_000 {
		t.Fatalf("got %d rules", len(p.rules))
	}
	if _, err := Compile(p, tn); err != nil {
		t.Fatal(err)
	}
}

// TestBombsAreRefused: texts that are small but stand for more than memory
// holds. Each must end in an error, quickly and with a place.
func TestBombsAreRefused(t *testing.T) {
	tn := fleet(10_000, 60, rand.New(rand.NewPCG(1, 2)))
	var ports []string
	for i := range 2000 {
		ports = append(ports, fmt.Sprint(i+1))
	}
	rules := func(n int, format string) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, format, i%250, i/250)
		}
		return b.String()
	}
	for name, src := range map[string]string{
		// Every source is another one, so nothing is shared.
		"sources": `{"acls":[` + rules(5000, `{"action":"accept","src":["autogroup:member","10.%d.%d.0/24"],"dst":["100.64.0.1:1"]},`) + `]}`,
		// Everybody gets every rule.
		"targets": `{"acls":[` + rules(5000, `{"action":"accept","src":["10.%d.%d.1"],"dst":["*:*"]},`) + `]}`,
		// A list of ports for each address of everybody.
		"ports": `{"acls":[` + rules(20, `{"action":"accept","src":["10.%d.%d.1"],"dst":["autogroup:member:`+strings.Join(ports, ",")+`"]},`) + `]}`,
		// One rule a user and rule.
		"self": `{"acls":[` + rules(3000, `{"action":"accept","src":["autogroup:member"],"dst":["autogroup:self:1%d-6%d00"]},`) + `]}`,
		"ssh":  `{"acls":[],"ssh":[` + rules(5000, `{"action":"accept","src":["autogroup:member"],"dst":["autogroup:member"],"users":["u%d-%d"]},`) + `]}`,
	} {
		t.Run(name, func(t *testing.T) {
			p, err := Parse([]byte(src))
			if err != nil {
				t.Fatal(err)
			}
			_, err = Compile(p, tn)
			if err == nil || !strings.Contains(err.Error(), "expands to more than") {
				t.Fatalf("got %v, want a limit", err)
			}
			checkErrors(t, []byte(src), err)
		})
	}
}
