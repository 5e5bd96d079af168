package signalbox_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/signalbox-net/signalbox/acl"
)

// pages are the documents for people: those at the root and all in docs.
func pages(t *testing.T) map[string]string {
	t.Helper()
	names, err := filepath.Glob("docs/*.md")
	if err != nil || len(names) == 0 {
		t.Fatalf("no docs (%v)", err)
	}
	out := map[string]string{}
	for _, name := range append(names, "README.md", "CONTRIBUTING.md", "CHANGELOG.md") {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		out[name] = string(text)
	}
	return out
}

// A fence is a fenced block of a page.
type fence struct {
	lang, text string
	line       int
}

// fences splits a page into its fenced blocks and the prose around them, in
// which a block is an empty line.
func fences(page string) (blocks []fence, prose string) {
	var rest, body []string
	open := false
	var b fence
	for i, line := range strings.Split(page, "\n") {
		lang, is := strings.CutPrefix(line, "```")
		switch {
		case is && !open:
			open, b, body = true, fence{lang: strings.TrimSpace(lang), line: i + 1}, nil
		case is:
			open, b.text = false, strings.Join(body, "\n")+"\n"
			blocks = append(blocks, b)
			rest = append(rest, "")
		case open:
			body = append(body, line)
		default:
			rest = append(rest, line)
		}
	}
	return blocks, strings.Join(rest, "\n")
}

// docTailnet has one device, so that selectors are resolved; the people and
// tags of the tests that a policy carries are imagined by acl.Check.
func docTailnet() *acl.Tailnet {
	return &acl.Tailnet{
		Domains: []string{"example.com"},
		Users: []acl.User{
			{ID: 1, Name: "alice", Email: "alice@example.com", Role: "owner"},
			{ID: 2, Name: "bob", Email: "bob@example.com", Role: "member"},
			{ID: 3, Name: "carol", Role: "member"},
		},
	}
}

func TestPoliciesOfTheDocsCompile(t *testing.T) {
	n := 0
	for name, page := range pages(t) {
		blocks, _ := fences(page)
		for _, b := range blocks {
			if b.lang != "hujson" {
				continue
			}
			n++
			p, err := acl.Parse([]byte(b.text))
			if err != nil {
				t.Errorf("%s:%d: %v", name, b.line, err)
				continue
			}
			tailnet := docTailnet()
			access, err := acl.Compile(p, tailnet)
			if err != nil {
				t.Errorf("%s:%d: %v", name, b.line, err)
				continue
			}
			for _, f := range acl.Check(p, tailnet, access) {
				t.Errorf("%s:%d: test of the policy fails: %v", name, b.line, f)
			}
		}
	}
	if n < 10 {
		t.Errorf("found %d policies in the docs, there are more", n)
	}
}

// anchors are the ids that a page's headings get: lower case, spaces to
// hyphens, everything else but letters, digits, hyphens and underscores gone.
func anchors(page string) map[string]bool {
	out := map[string]bool{}
	_, prose := fences(page)
	for line := range strings.SplitSeq(prose, "\n") {
		title := strings.TrimLeft(line, "#")
		if title == line || !strings.HasPrefix(title, " ") {
			continue
		}
		id := strings.Map(func(c rune) rune {
			switch {
			case c == ' ':
				return '-'
			case c == '-' || c == '_' || 'a' <= c && c <= 'z' || '0' <= c && c <= '9':
				return c
			}
			return -1
		}, strings.ToLower(strings.TrimSpace(title)))
		out[id] = true
	}
	return out
}

var linkTarget = regexp.MustCompile(`\]\(([^)\s]+)\)`)

func TestLinksOfTheDocsLeadSomewhere(t *testing.T) {
	all := pages(t)
	n := 0
	for name, page := range all {
		_, prose := fences(page)
		for _, m := range linkTarget.FindAllStringSubmatch(prose, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			n++
			path, id, hasID := strings.Cut(m[1], "#")
			target := name
			if path != "" {
				target = filepath.Join(filepath.Dir(name), path)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s: %v", name, m[1], err)
				continue
			}
			if hasID && !anchors(all[target])[id] {
				t.Errorf("%s links to %s: no such heading", name, m[1])
			}
		}
	}
	if n < 20 {
		t.Errorf("found %d relative links in the docs, there are more", n)
	}
}
