package signalbox_test

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// matches are the first groups of all matches of re in the files, sorted and
// each once.
func matches(t *testing.T, re string, files ...string) []string {
	t.Helper()
	var out []string
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(re).FindAllStringSubmatch(string(text), -1) {
			out = append(out, strings.Join(m[1:], " "))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// equalLists fails for each element that only one of the lists has.
func equalLists(t *testing.T, page string, got []string, where string, want []string) {
	t.Helper()
	if len(want) == 0 {
		t.Fatalf("found nothing in %s", where)
	}
	for _, x := range want {
		if !slices.Contains(got, x) {
			t.Errorf("%s lacks %q of %s", page, x, where)
		}
	}
	for _, x := range got {
		if !slices.Contains(want, x) {
			t.Errorf("%s has %q, %s does not", page, x, where)
		}
	}
}

func TestRoutesOfTheAPIPage(t *testing.T) {
	const page = "docs/api.md"
	routes := func(prefix, source string) []string {
		var out []string
		for _, r := range matches(t, `(?m)^\s+m\.(Get|Post|Put|Delete)\("([^"]+)"`, source) {
			method, path, _ := strings.Cut(r, " ")
			out = append(out, strings.ToUpper(method)+" "+prefix+path)
		}
		return out
	}
	want := append(routes("/api/v1", "web/apiv1/apiv1.go"), routes("/api/signalbox/v1", "web/apiv1/own.go")...)
	equalLists(t, page, matches(t, "(?m)^\\| `((?:GET|POST|PUT|DELETE) /api/[^`]+)`", page), "web/apiv1", want)
}

func TestMetricsOfTheOperationsPage(t *testing.T) {
	const page, source = "docs/operations.md", "cmd/signalbox/internal/serve/metrics.go"
	var want []string
	for _, m := range matches(t, `(?:gauge\(|count\(|make\(|Name: )"([a-z0-9_]+)",`, source) {
		want = append(want, "signalbox_"+m)
	}
	for _, m := range matches(t, `newRelayMetric\("([a-z0-9_]+)",`, "cmd/signalbox/internal/serve/relaymetrics.go") {
		want = append(want, "signalbox_"+m)
	}
	equalLists(t, page, matches(t, "`(signalbox_[a-z0-9_]+)(?:\\{[a-z]+\\})?`", page), source, want)
}

func TestDebugPagesOfTheOperationsPage(t *testing.T) {
	const page, source = "docs/operations.md", "cmd/signalbox/internal/serve/debug.go"
	equalLists(t, page, matches(t, "(?m)^\\| `(/debug/[a-z]+/?)`", page), source, matches(t, `(?m)^\s+\{"(/debug/[a-z]+/?)", "`, source))
}

func TestSectionsOfThePolicyPage(t *testing.T) {
	// The parser lists the members of a policy in lower case.
	source, err := os.ReadFile("acl/parse.go")
	if err != nil {
		t.Fatal(err)
	}
	_, list, ok := strings.Cut(string(source), "for _, name := range []string{")
	if !ok {
		t.Fatal("acl/parse.go: the list of sections is somewhere else now")
	}
	list, _, _ = strings.Cut(list, "}")
	var want []string
	for _, m := range regexp.MustCompile(`"([a-z0-9]+)"`).FindAllStringSubmatch(list, -1) {
		want = append(want, m[1])
	}
	page, err := os.ReadFile("docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(page), "## Sections")
	table, _, _ = strings.Cut(table, "## Names")
	var got []string
	for row := range strings.SplitSeq(table, "\n") {
		first, _, _ := strings.Cut(strings.TrimPrefix(row, "| "), " | ")
		if !strings.HasPrefix(row, "| ") {
			continue
		}
		for _, m := range regexp.MustCompile("`([A-Za-z0-9]+)`").FindAllStringSubmatch(first, -1) {
			got = append(got, strings.ToLower(m[1]))
		}
	}
	equalLists(t, "docs/policy.md", got, "acl/parse.go", want)
}
