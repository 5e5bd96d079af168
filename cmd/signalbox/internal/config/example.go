package config

import (
	"bytes"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"
)

const exampleHead = `# Configuration of Signalbox: every key, with its default.
#
# No key is required; a file needs only what differs. The names are Headscale's
# where Headscale has the key. "#key: value" is a key whose default depends on
# others; it shows what the server of a root user without other keys gets.
#
# Every key can be set in the environment as well: derp.server.enabled is
# SIGNALBOX_DERP_SERVER_ENABLED (HEADSCALE_DERP_SERVER_ENABLED is accepted).
# Relative paths are relative to this file's directory. Durations have the units
# ms, s, m, h, d, w and y, as in 1h30m or 180d; 0 needs none.
#
# "signalbox configtest -c FILE" checks a file.
`

// Example returns the text of config-example.yaml.
func Example() []byte {
	var b bytes.Buffer
	b.WriteString(exampleHead)
	defaults := Default()
	var open []string // the sections around the last key
	for i := range schema {
		k := &schema[i]
		path := strings.Split(k.Name, ".")
		section, name := path[:len(path)-1], path[len(path)-1]
		same := 0
		for same < len(open) && same < len(section) && open[same] == section[same] {
			same++
		}
		b.WriteByte('\n')
		for ; same < len(section); same++ {
			fmt.Fprintf(&b, "%s%s:\n", indent(same), section[same])
		}
		open = section
		in := indent(len(section))
		doc := k.Doc
		if k.Derived != "" {
			doc += " Default: " + k.Derived + "."
		}
		for _, line := range wrap(doc, 80-len(in)-2) {
			fmt.Fprintf(&b, "%s# %s\n", in, line)
		}
		if k.Derived != "" {
			fmt.Fprintf(&b, "%s#%s: %s\n", in, name, k.Shown)
			continue
		}
		fmt.Fprintf(&b, "%s%s: %s\n", in, name, exampleValue(k, defaults))
	}
	return b.Bytes()
}

func indent(depth int) string { return strings.Repeat("  ", depth) }

// exampleValue is the default on one line.
func exampleValue(k *key, defaults *Config) string {
	n, err := render(k, defaults)
	if err != nil {
		panic(fmt.Sprintf("config: default of %s: %v", k.Name, err))
	}
	if n.Kind != yaml.ScalarNode {
		n.Style = yaml.FlowStyle
	}
	text, err := yaml.Marshal(n)
	if err != nil {
		panic(fmt.Sprintf("config: default of %s: %v", k.Name, err))
	}
	return strings.TrimSpace(string(text))
}

func wrap(s string, width int) (lines []string) {
	line := ""
	for _, w := range strings.Fields(s) {
		if line != "" && len(line)+1+len(w) > width {
			lines = append(lines, line)
			line = ""
		}
		if line != "" {
			line += " "
		}
		line += w
	}
	if line != "" {
		lines = append(lines, line)
	}
	return lines
}
