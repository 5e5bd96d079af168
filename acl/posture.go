package acl

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/tailscale/hujson"
)

// posture is a named list of conditions on a source node, all of which must
// hold.
type posture struct {
	name  text
	conds []condition
}

// condition compares one attribute of a node.
type condition struct {
	text
	attr   string
	op     string // ==, !=, <, <=, >, >=, IN, NOT IN, IS SET, NOT SET
	values []any  // string, float64 or bool
}

func (r *reader) postures(v *hujson.Value) {
	r.table(v, func(name text, v *hujson.Value) {
		if !strings.HasPrefix(name.s, "posture:") || name.s == "posture:" {
			r.fail(name.at, `postures[%q]: posture names must start with "posture:"`, name.s)
			return
		}
		ps := &posture{name: name}
		r.p.postures[name.s] = ps
		for _, t := range r.texts(v) {
			c, err := parseCondition(t)
			if err != nil {
				r.fail(t.at, "postures[%q]: %v", name.s, err)
				continue
			}
			ps.conds = append(ps.conds, c)
		}
	})
}

// postureRefs reads a srcPosture list.
func (r *reader) postureRefs(v *hujson.Value) []*posture {
	var out []*posture
	for _, t := range r.texts(v) {
		ps := r.p.postures[t.s]
		r.use(t.s)
		if ps == nil {
			r.fail(t.at, "posture not found: %q", t.s)
			continue
		}
		out = append(out, ps)
	}
	return out
}

// parseCondition reads `attr op value`, such as node:tsVersion >= '1.40'.
func parseCondition(t text) (condition, error) {
	c := condition{text: t}
	rest := t.s
	i := strings.IndexAny(rest, " \t=!<>")
	if i <= 0 {
		return c, fmt.Errorf("%q: expected an attribute, an operator and a value", t.s)
	}
	c.attr, rest = rest[:i], strings.TrimSpace(rest[i:])
	if ns, name, ok := strings.Cut(c.attr, ":"); !ok || ns == "" || name == "" {
		return c, fmt.Errorf("%q: attribute %q must have the form namespace:name", t.s, c.attr)
	}
	for _, op := range []string{"==", "!=", "<=", ">=", "<", ">", "NOT IN", "IN", "IS SET", "NOT SET"} {
		after, ok := strings.CutPrefix(rest, op)
		word := op[0] >= 'A'
		if !ok || word && after != "" && !strings.HasPrefix(after, " ") && !strings.HasPrefix(after, "[") {
			continue
		}
		c.op = op
		return c, c.readValues(strings.TrimSpace(after))
	}
	return c, fmt.Errorf("%q: unknown operator", t.s)
}

func (c *condition) readValues(s string) error {
	switch c.op {
	case "IS SET", "NOT SET":
		if s != "" {
			return fmt.Errorf("%q: %s takes no value", c.s, c.op)
		}
		return nil
	case "IN", "NOT IN":
		inner, ok := strings.CutPrefix(s, "[")
		inner, ok2 := strings.CutSuffix(inner, "]")
		if !ok || !ok2 {
			return fmt.Errorf("%q: %s needs a list in brackets", c.s, c.op)
		}
		for rest := strings.TrimSpace(inner); rest != ""; {
			v, after, err := readValue(rest)
			if err != nil {
				return fmt.Errorf("%q: %w", c.s, err)
			}
			c.values = append(c.values, v)
			after = strings.TrimSpace(after)
			if rest, ok = strings.CutPrefix(after, ","); !ok && after != "" {
				return fmt.Errorf("%q: expected a comma before %q", c.s, after)
			}
			rest = strings.TrimSpace(rest)
		}
		return nil
	}
	v, after, err := readValue(s)
	if err != nil {
		return fmt.Errorf("%q: %w", c.s, err)
	}
	if strings.TrimSpace(after) != "" {
		return fmt.Errorf("%q: unexpected %q after the value", c.s, after)
	}
	if _, isBool := v.(bool); isBool && c.op != "==" && c.op != "!=" {
		return fmt.Errorf("%q: true and false have no order", c.s)
	}
	c.values = []any{v}
	return nil
}

// readValue reads one quoted string, number or boolean from the start of s.
func readValue(s string) (v any, rest string, err error) {
	if s == "" {
		return nil, "", fmt.Errorf("a value is missing")
	}
	if q := s[0]; q == '\'' || q == '"' {
		end := strings.IndexByte(s[1:], q)
		if end < 0 {
			return nil, "", fmt.Errorf("a quote is not closed")
		}
		return s[1 : 1+end], s[end+2:], nil
	}
	word := s
	if i := strings.IndexAny(s, ", \t]"); i >= 0 {
		word = s[:i]
	}
	rest = s[len(word):]
	switch word {
	case "true":
		return true, rest, nil
	case "false":
		return false, rest, nil
	}
	f, err := strconv.ParseFloat(word, 64)
	if err != nil {
		return nil, "", fmt.Errorf("%q is not a quoted string, a number or a boolean", word)
	}
	return f, rest, nil
}

// holds reports whether every condition is met, and the first that is not.
func (ps *posture) holds(attr func(name string) (any, bool)) (bool, *condition) {
	for i := range ps.conds {
		if c := &ps.conds[i]; !c.holds(attr) {
			return false, c
		}
	}
	return true, nil
}

// holds treats an attribute that is not set, or has another type than the
// value, as not meeting any comparison; != and NOT IN are then met only when
// the attribute is set.
func (c *condition) holds(attr func(name string) (any, bool)) bool {
	got, set := attr(c.attr)
	switch c.op {
	case "IS SET":
		return set
	case "NOT SET":
		return !set
	}
	if !set {
		return false
	}
	switch c.op {
	case "IN":
		return slices.ContainsFunc(c.values, func(v any) bool { return equalValue(got, v) })
	case "NOT IN":
		return !slices.ContainsFunc(c.values, func(v any) bool { return equalValue(got, v) })
	case "==":
		return equalValue(got, c.values[0])
	case "!=":
		return !equalValue(got, c.values[0])
	}
	order, ok := compareValue(c.attr, got, c.values[0])
	if !ok {
		return false
	}
	switch c.op {
	case "<":
		return order < 0
	case "<=":
		return order <= 0
	case ">":
		return order > 0
	}
	return order >= 0
}

func equalValue(a, b any) bool {
	if x, ok := a.(int); ok {
		a = float64(x)
	}
	return a == b
}

// compareValue orders numbers as numbers and strings as versions: runs of
// digits compare by value, as in 1.9 < 1.10.
func compareValue(attr string, a, b any) (int, bool) {
	if x, ok := a.(int); ok {
		a = float64(x)
	}
	switch x := a.(type) {
	case float64:
		y, ok := b.(float64)
		return cmp.Compare(x, y), ok
	case string:
		y, ok := b.(string)
		return compareVersion(x, y), ok
	}
	return 0, false
}

func compareVersion(a, b string) int {
	for a != "" && b != "" {
		da, db := digits(a), digits(b)
		if da > 0 && db > 0 {
			x, y := strings.TrimLeft(a[:da], "0"), strings.TrimLeft(b[:db], "0")
			if c := cmp.Or(cmp.Compare(len(x), len(y)), strings.Compare(x, y)); c != 0 {
				return c
			}
			a, b = a[da:], b[db:]
			continue
		}
		if a[0] != b[0] {
			return cmp.Compare(a[0], b[0])
		}
		a, b = a[1:], b[1:]
	}
	return cmp.Compare(len(a), len(b))
}

func digits(s string) int {
	n := 0
	for n < len(s) && '0' <= s[n] && s[n] <= '9' {
		n++
	}
	return n
}
