package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// A valueError carries the node that is at fault when it is not the key's
// whole value.
type valueError struct {
	node *yaml.Node
	msg  string
}

func (e *valueError) Error() string { return e.msg }

func at(n *yaml.Node, format string, args ...any) error {
	return &valueError{n, fmt.Sprintf(format, args...)}
}

// what names the kind of a value for messages.
func what(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a section"
	case yaml.SequenceNode:
		return "a list"
	}
	switch n.Tag {
	case "!!bool":
		return "the boolean " + n.Value
	case "!!int", "!!float":
		return "the number " + n.Value
	case "!!null":
		return "nothing"
	}
	return strconv.Quote(n.Value)
}

func deref(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

// decode reads n into the field that dst points to. Every type of the schema
// has its case here.
func decode(k *key, n *yaml.Node, dst any) error {
	n = deref(n)
	switch dst := dst.(type) {
	case *string:
		return decodeString(k, n, dst)
	case *bool:
		return decodeBool(n, dst)
	case *int:
		if n.Kind == yaml.ScalarNode {
			if i, err := strconv.Atoi(n.Value); err == nil {
				*dst = i
				return nil
			}
		}
		return at(n, "want a whole number, got %s", what(n))
	case *time.Duration:
		if n.Kind != yaml.ScalarNode || n.Tag == "!!bool" {
			return at(n, "want a duration such as 30m or 180d, got %s", what(n))
		}
		d, err := ParseDuration(n.Value)
		if err != nil {
			return at(n, "%v, got %s", err, what(n))
		}
		*dst = d
		return nil
	case *os.FileMode:
		if n.Kind == yaml.ScalarNode {
			// Headscale reads the digits as octal whether quoted or not.
			if m, err := strconv.ParseUint(strings.TrimPrefix(n.Value, "0o"), 8, 32); err == nil && m <= 0o777 {
				*dst = os.FileMode(m)
				return nil
			}
		}
		return at(n, "want an octal file mode such as 0770, got %s", what(n))
	case *netip.Addr:
		return decodeText(n, "an IP address", func(s string) (err error) { *dst, err = netip.ParseAddr(s); return })
	case *netip.Prefix:
		return decodeText(n, "a prefix such as 100.64.0.0/10", func(s string) (err error) {
			p, err := netip.ParsePrefix(s)
			if err == nil && p != p.Masked() {
				err = fmt.Errorf("has bits set beyond its length: did you mean %v", p.Masked())
			}
			*dst = p
			return err
		})
	case *[]string:
		list, err := decodeStrings(n)
		*dst = list
		return err
	case *[]netip.Prefix:
		return decodePrefixes(n, dst)
	case *map[string]string:
		return eachPair(n, func(k, v *yaml.Node) error {
			var s string
			if err := decodeString(&key{}, v, &s); err != nil {
				return err
			}
			put(dst, k.Value, s)
			return nil
		})
	case *map[string][]string:
		return eachPair(n, func(k, v *yaml.Node) error {
			list, err := decodeStrings(v)
			put(dst, k.Value, list)
			return err
		})
	case *[]DNSRecord:
		return decodeRecords(n, dst)
	case *[]DialCandidate:
		return decodeCandidates(n, dst)
	}
	panic(fmt.Sprintf("config: key %s has the unhandled type %T", k.Name, dst))
}

func put[V any](m *map[string]V, k string, v V) {
	if *m == nil {
		*m = map[string]V{}
	}
	(*m)[k] = v
}

func decodeString(k *key, n *yaml.Node, dst *string) error {
	if n.Kind != yaml.ScalarNode {
		return at(n, "want a string, got %s", what(n))
	}
	// A password or a name of digits only is a number to YAML.
	if n.Tag == "!!bool" && !slices.Contains(k.Enum, n.Value) {
		return at(n, "want a string, got %s", what(n))
	}
	if len(k.Enum) == 0 || n.Value == "" && k.Derived != "" {
		*dst = n.Value
		return nil
	}
	for _, e := range k.Enum {
		if strings.EqualFold(e, n.Value) {
			*dst = e
			return nil
		}
	}
	msg := fmt.Sprintf("want one of %s, got %s", strings.Join(k.Enum, ", "), what(n))
	if near := nearest(n.Value, k.Enum); near != "" {
		msg += fmt.Sprintf(" (did you mean %s?)", near)
	}
	return at(n, "%s", msg)
}

func decodeBool(n *yaml.Node, dst *bool) error {
	if n.Kind == yaml.ScalarNode && (n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle)) == 0 {
		switch strings.ToLower(n.Value) {
		case "true", "yes", "on":
			*dst = true
			return nil
		case "false", "no", "off":
			*dst = false
			return nil
		}
	}
	return at(n, "want true or false, got %s", what(n))
}

// decodeText reads an optional value; the empty string leaves it unset.
func decodeText(n *yaml.Node, want string, set func(string) error) error {
	if n.Kind != yaml.ScalarNode {
		return at(n, "want %s, got %s", want, what(n))
	}
	var err error
	if n.Value != "" {
		err = set(n.Value)
	} else {
		_ = set("") // clears the default; an empty text never parses
	}
	if err != nil {
		return at(n, "want %s, got %s: %v", want, what(n), errText(err))
	}
	return nil
}

// errText drops the function name that netip puts before its reasons.
func errText(err error) string {
	s := err.Error()
	if _, reason, ok := strings.Cut(s, "): "); ok && strings.HasPrefix(s, "netip.Parse") {
		return reason
	}
	if _, reason, ok := strings.Cut(s, `": `); ok && strings.HasPrefix(s, "Parse") {
		return reason
	}
	return s
}

func decodeStrings(n *yaml.Node) ([]string, error) {
	n = deref(n)
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return nil, nil
	}
	if n.Kind != yaml.SequenceNode {
		return nil, at(n, "want a list, got %s", what(n))
	}
	var list []string
	var errs []error
	for _, e := range n.Content {
		var s string
		if err := decodeString(&key{}, deref(e), &s); err != nil {
			errs = append(errs, err)
			continue
		}
		if s == "" {
			errs = append(errs, at(e, "an entry of the list is empty"))
			continue
		}
		list = append(list, s)
	}
	return list, errors.Join(errs...)
}

func decodePrefixes(n *yaml.Node, dst *[]netip.Prefix) error {
	texts, err := decodeStrings(n)
	if err != nil {
		return err
	}
	*dst = nil
	var errs []error
	for i, s := range texts {
		p, err := netip.ParsePrefix(s)
		if a, aerr := netip.ParseAddr(s); aerr == nil && a.Zone() == "" {
			p, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		if err != nil {
			errs = append(errs, at(n.Content[i], "want an IP address or prefix, got %q", s))
			continue
		}
		*dst = append(*dst, p.Masked())
	}
	return errors.Join(errs...)
}

func decodeRecords(n *yaml.Node, dst *[]DNSRecord) error {
	if n.Kind != yaml.SequenceNode {
		return at(n, "want a list of {name, type, value}, got %s", what(n))
	}
	var errs []error
	for _, e := range n.Content {
		var r DNSRecord
		fields := map[string]*string{"name": &r.Name, "type": &r.Type, "value": &r.Value}
		err := eachPair(deref(e), func(k, v *yaml.Node) error {
			dst := fields[k.Value]
			if dst == nil {
				return at(k, "unknown field %q: a record has name, type and value", k.Value)
			}
			return decodeString(&key{}, deref(v), dst)
		})
		if err == nil {
			err = checkRecord(e, &r)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		*dst = append(*dst, r)
	}
	return errors.Join(errs...)
}

func checkRecord(n *yaml.Node, r *DNSRecord) error {
	if r.Name == "" || r.Value == "" {
		return at(n, "a record needs a name and a value")
	}
	if !isDomain(strings.TrimSuffix(r.Name, ".")) {
		return at(n, "%q is not a domain name", r.Name)
	}
	a, err := netip.ParseAddr(r.Value)
	if err != nil {
		return at(n, "value of %s: want an IP address, got %q", r.Name, r.Value)
	}
	if r.Type == "" {
		r.Type = map[bool]string{true: "A", false: "AAAA"}[a.Is4()]
	}
	switch {
	case r.Type != "A" && r.Type != "AAAA":
		return at(n, "type of %s: want A or AAAA, got %q", r.Name, r.Type)
	case a.Is4() != (r.Type == "A"):
		return at(n, "value of %s: %v does not fit type %s", r.Name, a, r.Type)
	}
	return nil
}

// dialTimeout is how long a candidate of the dial plan is tried when the file
// does not say. Clients take 0 for "not at all".
const dialTimeout = 10 * time.Second

func decodeCandidates(n *yaml.Node, dst *[]DialCandidate) error {
	if n.Kind != yaml.SequenceNode {
		return at(n, "want a list of {ip, start_delay, timeout, priority}, got %s", what(n))
	}
	*dst = nil
	var errs []error
	for i, e := range n.Content {
		if i >= MaxDialCandidates {
			errs = append(errs, at(e, "at most %d addresses are possible", MaxDialCandidates))
			break
		}
		c := DialCandidate{Timeout: dialTimeout}
		fields := map[string]any{"ip": &c.IP, "start_delay": &c.StartDelay, "timeout": &c.Timeout, "priority": &c.Priority}
		err := eachPair(deref(e), func(k, v *yaml.Node) error {
			dst := fields[k.Value]
			if dst == nil {
				return at(k, "unknown field %q: a candidate has ip, start_delay, timeout and priority", k.Value)
			}
			return decode(&key{Name: k.Value}, v, dst)
		})
		if err == nil {
			err = checkCandidate(e, &c, *dst)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		*dst = append(*dst, c)
	}
	return errors.Join(errs...)
}

func checkCandidate(n *yaml.Node, c *DialCandidate, before []DialCandidate) error {
	switch {
	case !c.IP.IsValid():
		return at(n, "a candidate needs an ip")
	case c.IP.IsUnspecified() || c.IP.IsMulticast() || c.IP.Zone() != "" || c.IP.Is4In6():
		return at(n, "%v is not an address that clients can reach", c.IP)
	case c.Timeout <= 0:
		return at(n, "timeout of %v: want more than 0", c.IP)
	case c.StartDelay+c.Timeout > maxDialTime:
		return at(n, "start_delay and timeout of %v are %s together: clients give up after %s", c.IP, FormatDuration(c.StartDelay+c.Timeout), FormatDuration(maxDialTime))
	}
	if slices.ContainsFunc(before, func(o DialCandidate) bool { return o.IP == c.IP }) {
		return at(n, "%v is given twice", c.IP)
	}
	return nil
}

func eachPair(n *yaml.Node, f func(k, v *yaml.Node) error) error {
	if n.Kind != yaml.MappingNode {
		return at(n, "want a section of key: value, got %s", what(n))
	}
	var errs []error
	for i := 0; i+1 < len(n.Content); i += 2 {
		errs = append(errs, f(n.Content[i], deref(n.Content[i+1])))
	}
	return errors.Join(errs...)
}
