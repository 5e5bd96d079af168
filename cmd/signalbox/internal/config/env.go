package config

import (
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Prefixes of the variables, weakest first.
var envPrefixes = []string{"HEADSCALE_", "SIGNALBOX_"}

// Kubernetes gives every container of a namespace such variables for each
// service in it; a service called signalbox is likely.
var kubernetes = regexp.MustCompile(`^(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT|PORT_\d+_(TCP|UDP).*)$`)

// EnvName returns the variable that overrides a key.
func EnvName(key string) string {
	return "SIGNALBOX_" + strings.ToUpper(strings.ReplaceAll(key, ".", "_"))
}

// env applies the variables. An unknown one is only warned about: an
// environment is shared with wrappers and tools that have their own.
func (l *loader) env(env []string) {
	byVar := map[string]*key{}
	for i := range schema {
		byVar[strings.TrimPrefix(EnvName(schema[i].Name), "SIGNALBOX_")] = &schema[i]
	}
	env = slices.Sorted(slices.Values(env))
	for _, prefix := range envPrefixes {
		for _, kv := range env {
			name, value, _ := strings.Cut(kv, "=")
			rest, ok := strings.CutPrefix(name, prefix)
			if !ok || rest == "CONFIG" || value == "" {
				continue // empty is unset, as in Headscale: container files often pass it on
			}
			if k := byVar[rest]; k != nil {
				l.set(k, Origin{Env: name}, envNode(k, value))
			} else if !kubernetes.MatchString(rest) {
				l.warnEnv(name, prefix, rest, byVar)
			}
		}
	}
}

func (l *loader) warnEnv(name, prefix, rest string, byVar map[string]*key) {
	names := make([]string, 0, len(byVar))
	for n := range byVar {
		names = append(names, strings.ToLower(n))
	}
	slices.Sort(names)
	msg := "the environment variable " + name + " belongs to no key and is ignored"
	if near := nearest(strings.ToLower(rest), names); near != "" {
		msg += " (did you mean " + prefix + strings.ToUpper(near) + "?)"
	}
	l.cfg.Warnings = append(l.cfg.Warnings, msg)
}

// envNode makes of a variable's text the YAML value that it stands for: lists
// may be YAML or words with commas or spaces between them, the rest is taken
// as it is.
func envNode(k *key, value string) *yaml.Node {
	structured := false
	switch k.At(&Config{}).(type) {
	case *string, *bool, *int, *os.FileMode, *netip.Addr, *netip.Prefix:
	case *[]string, *[]netip.Prefix:
		if !strings.HasPrefix(strings.TrimSpace(value), "[") {
			n := &yaml.Node{Kind: yaml.SequenceNode}
			for _, w := range strings.FieldsFunc(value, func(r rune) bool { return r == ',' || r == ' ' }) {
				n.Content = append(n.Content, scalar(w))
			}
			return n
		}
		structured = true
	case *map[string]string, *map[string][]string, *[]DNSRecord:
		structured = true
	}
	if structured {
		var doc yaml.Node
		if err := yaml.Unmarshal([]byte(value), &doc); err == nil && len(doc.Content) == 1 {
			clearPositions(doc.Content[0])
			return doc.Content[0]
		}
	}
	return scalar(value)
}

// clearPositions keeps line numbers inside a variable from being taken for
// those of the file.
func clearPositions(n *yaml.Node) {
	n.Line, n.Column = 0, 0
	for _, c := range n.Content {
		clearPositions(c)
	}
}
