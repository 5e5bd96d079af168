package cli

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"text/tabwriter"
	"time"

	"go.yaml.in/yaml/v3"
)

// timeFormat is how tables show a moment, in local time.
const timeFormat = "2006-01-02 15:04:05"

func (m *program) checkOutput() error {
	switch m.output {
	case "", "table", "json", "json-line", "yaml":
		return nil
	}
	return usagef("unknown output format %q: want json, json-line, yaml or table", m.output)
}

// machine reports whether the output is for a program.
func (m *program) machine() bool {
	return m.output == "json" || m.output == "json-line" || m.output == "yaml"
}

// print shows v to a program, or text to a person.
func (m *program) print(v any, text string) error {
	if m.machine() {
		return m.encode(m.Stdout, v)
	}
	_, err := fmt.Fprintln(m.Stdout, text)
	return err
}

// printTable shows v to a program, or the table to a person.
func (m *program) printTable(v any, header []string, rows [][]string) error {
	if m.machine() {
		return m.encode(m.Stdout, v)
	}
	w := tabwriter.NewWriter(m.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, strings.Join(header, "\t"))
	for _, r := range rows {
		for i := range r {
			r[i] = printable(r[i])
		}
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	return w.Flush()
}

// printable keeps a name that a device chose from steering the terminal or
// breaking the table.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u2028' || r == '\u2029' || r >= '\u202a' && r <= '\u202e' || r >= '\u2066' && r <= '\u2069' {
			return '\ufffd'
		}
		return r
	}, s)
}

// encode writes v in the machine's format that was asked for. Members keep the
// order that they have in v's JSON.
func (m *program) encode(w io.Writer, v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return err
	}
	var out bytes.Buffer
	switch m.output {
	case "json-line":
		if err := json.Compact(&out, b.Bytes()); err != nil {
			return err
		}
		out.WriteByte('\n')
	case "yaml":
		var doc yaml.Node
		if err := yaml.Unmarshal(b.Bytes(), &doc); err != nil {
			return fmt.Errorf("turn the answer into YAML: %w", err)
		}
		plain(&doc)
		e := yaml.NewEncoder(&out)
		e.SetIndent(2)
		if err := e.Encode(&doc); err != nil {
			return err
		}
	default:
		if err := json.Indent(&out, bytes.TrimSpace(b.Bytes()), "", "\t"); err != nil {
			return err
		}
		out.WriteByte('\n')
	}
	_, err := w.Write(out.Bytes())
	return err
}

// plain takes JSON's braces off a document, and the quotes off words that no
// YAML parser, old ones included, reads as anything but a string.
func plain(n *yaml.Node) {
	switch {
	case n.Kind != yaml.ScalarNode && len(n.Content) > 0,
		n.Kind == yaml.ScalarNode && word.MatchString(n.Value) && !special.MatchString(n.Value):
		n.Style = 0
	}
	for _, c := range n.Content {
		plain(c)
	}
}

var (
	word    = regexp.MustCompile(`^[A-Za-z]([A-Za-z0-9_.@/+:-]*[A-Za-z0-9_])?$`)
	special = regexp.MustCompile(`(?i)^(y|n|yes|no|on|off|true|false|null)$`)
)

// confirm asks before something is destroyed, as Headscale does: whoever is at
// standard input, a person or a program, answers. --force asks nobody. No
// answer at all is an error, so that a script does not take it for done.
func (m *program) confirm(format string, args ...any) (bool, error) {
	if m.force {
		return true, nil
	}
	fmt.Fprintf(m.Stderr, "%s [y/N] ", printable(fmt.Sprintf(format, args...)))
	line, err := bufio.NewReader(m.Stdin).ReadString('\n')
	if err != nil && err != io.EOF {
		return false, err
	}
	if err == io.EOF && line == "" {
		fmt.Fprintln(m.Stderr)
		return false, errors.New("nothing was done, since nobody answered: use --force where nobody can be asked")
	}
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", "yes":
		return true, nil
	}
	return false, nil
}

// result is what destructive verbs say to a program.
func result(text string) map[string]string { return map[string]string{"Result": text} }

func showTime(t *time.Time) string {
	if t == nil || t.IsZero() {
		return "-"
	}
	return t.Local().Format(timeFormat)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
