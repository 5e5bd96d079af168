package signalbox_test

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the generated part of docs/configuration.md")

// configKey is a key of config-example.yaml.
type configKey struct {
	name, value, doc string
	derived          bool // its default depends on others
}

var exampleKey = regexp.MustCompile(`^( *)(#?)([a-z0-9_]+):(?: (.*))?$`)

// exampleKeys reads config-example.yaml, which is generated from the schema:
// a comment above each key, and keys with a derived default commented out
// without a space after the #.
func exampleKeys(t *testing.T) []configKey {
	t.Helper()
	text, err := os.ReadFile("config-example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, body, ok := strings.Cut(string(text), "\n\n")
	if !ok {
		t.Fatal("config-example.yaml has no head")
	}
	var keys []configKey
	var path, doc []string
	for line := range strings.SplitSeq(body, "\n") {
		if c, ok := strings.CutPrefix(strings.TrimSpace(line), "# "); ok {
			doc = append(doc, c)
			continue
		}
		m := exampleKey.FindStringSubmatch(line)
		if m == nil {
			if strings.TrimSpace(line) != "" {
				t.Fatalf("config-example.yaml: what is %q?", line)
			}
			continue
		}
		path = append(path[:len(m[1])/2], m[3])
		if m[4] == "" {
			continue // a section
		}
		keys = append(keys, configKey{strings.Join(path, "."), m[4], strings.Join(doc, " "), m[2] != ""})
		doc = nil
	}
	return keys
}

// configTables renders the keys, one table for each section.
func configTables(keys []configKey) string {
	var order []string
	rows := map[string][]string{}
	for _, k := range keys {
		section, _, nested := strings.Cut(k.name, ".")
		switch {
		case strings.HasPrefix(k.name, "tls_"), strings.HasPrefix(k.name, "acme_"):
			section = "tls_*, acme_*"
		case !nested:
			section = "Top level"
		}
		if rows[section] == nil {
			order = append(order, section)
		}
		def := "`" + k.value + "`"
		if k.derived {
			def = "*" + def + "*"
		}
		rows[section] = append(rows[section], fmt.Sprintf("| `%s` | %s | %s |\n", k.name, def, strings.ReplaceAll(k.doc, "|", "\\|")))
	}
	var parts []string
	for _, section := range order {
		parts = append(parts, fmt.Sprintf("### %s\n\n| Key | Default | Meaning |\n|---|---|---|\n%s", section, strings.Join(rows[section], "")))
	}
	return strings.Join(parts, "\n")
}

// The page is held equal to the example, and the example to the schema by a
// test of its package. After a change: go test -run ConfigurationPage -update .
func TestConfigurationPageHasEveryKey(t *testing.T) {
	const name, mark = "docs/configuration.md", "A default in italics depends on other keys.\n\n"
	page, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	keys := exampleKeys(t)
	if len(keys) < 100 {
		t.Fatalf("config-example.yaml has %d keys, there are more", len(keys))
	}
	head, got, ok := strings.Cut(string(page), mark)
	if !ok {
		t.Fatalf("%s has no line %q", name, mark)
	}
	want := configTables(keys)
	if *update {
		if err := os.WriteFile(name, []byte(head+mark+want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got == want {
		return
	}
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := 0; i < len(g) || i < len(w); i++ {
		if i >= len(g) || i >= len(w) || g[i] != w[i] {
			t.Fatalf("%s differs from config-example.yaml (renew it with go test -run ConfigurationPage -update .):\ngot  %q\nwant %q", name, at(g, i), at(w, i))
		}
	}
}

func at(lines []string, i int) string {
	if i < len(lines) {
		return lines[i]
	}
	return ""
}
