package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// maxFile bounds the configuration file; a real one has a few KiB.
const maxFile = 1 << 20

// Load reads the file at path (none when empty), the variables of env
// ("NAME=value") and the overrides, fills in defaults, and checks the whole.
// The error is a Problems, and then the Config is what could be read, good
// for nothing but looking at.
func Load(path string, env []string, o Overrides) (*Config, error) {
	l := newLoader(o)
	l.file(path)
	l.env(env)
	l.flags()
	l.derive()
	if len(l.problems) == 0 {
		l.validate()
	}
	l.warnUnused()
	return l.cfg, l.problems.err()
}

// LoadClient is Load for commands that talk to a server. It needs only the
// keys that say where the server is, so problems of the others are left to the
// server.
func LoadClient(path string, env []string, o Overrides) (*Config, error) {
	cfg, err := Load(path, env, o)
	var all Problems
	if !errors.As(err, &all) {
		return cfg, err
	}
	var mine Problems
	for _, p := range all {
		if p.Key == "" || p.Key == "data_dir" || p.Key == "unix_socket" || strings.HasPrefix(p.Key, "cli.") {
			mine = append(mine, p)
		}
	}
	return cfg, mine.err()
}

// A loader collects one configuration and its problems.
type loader struct {
	cfg      *Config
	o        Overrides
	cwd      string
	problems Problems
	merging  int // depth of merge keys
}

func newLoader(o Overrides) *loader {
	if o.IsRoot == nil {
		o.IsRoot = func() bool { return os.Geteuid() == 0 }
	}
	if o.IsLocal == nil {
		o.IsLocal = isLocal
	}
	if o.Getwd == nil {
		o.Getwd = os.Getwd
	}
	l := &loader{cfg: &Config{origins: map[string]Origin{}}, o: o}
	for i := range schema {
		l.setDefault(&schema[i])
	}
	cwd, err := o.Getwd()
	if err != nil {
		l.problem(Origin{}, "", "find the working directory: %v", err)
	}
	l.cwd = cwd
	return l
}

func (l *loader) problem(o Origin, key, format string, args ...any) {
	l.problems = append(l.problems, Problem{o, key, fmt.Sprintf(format, args...)})
}

// fault reports a problem of one key, at the place where it was set.
func (l *loader) fault(key, format string, args ...any) {
	l.problem(l.cfg.origins[key], key, format, args...)
}

// setDefault goes through decode, so that a default means what the same text
// in a file means.
func (l *loader) setDefault(k *key) {
	if k.Default == nil {
		return
	}
	var n yaml.Node
	if err := n.Encode(k.Default); err != nil {
		panic(fmt.Sprintf("config: default of %s: %v", k.Name, err))
	}
	if err := decode(k, &n, k.At(l.cfg)); err != nil {
		panic(fmt.Sprintf("config: default of %s: %v", k.Name, err))
	}
}

func scalar(s string) *yaml.Node { return &yaml.Node{Kind: yaml.ScalarNode, Value: s} }

// file reads the YAML file into the configuration.
func (l *loader) file(path string) {
	if path == "" {
		return
	}
	shown := path
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	l.cfg.Path = path
	src, err := readLimited(path)
	if err != nil {
		l.problem(Origin{File: shown}, "", "read the configuration: %v", err)
		return
	}
	dec := yaml.NewDecoder(bytes.NewReader(src))
	var doc yaml.Node
	if err := dec.Decode(&doc); err != nil && err != io.EOF {
		l.syntax(shown, err)
		return
	}
	var second yaml.Node
	if err := dec.Decode(&second); err != io.EOF {
		if err != nil {
			l.syntax(shown, err)
			return
		}
		l.problem(Origin{File: shown, Line: second.Line, Col: second.Column}, "", "a second document: only one is read")
	}
	if len(doc.Content) == 0 {
		return // empty, or comments only
	}
	l.section(shown, "", doc.Content[0])
}

func readLimited(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		var pe *os.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return nil, err
	}
	defer f.Close()
	src, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(src) > maxFile {
		err = fmt.Errorf("larger than %d bytes", maxFile)
	}
	return src, err
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)

// syntax reports an error of the YAML parser, which knows the line only.
func (l *loader) syntax(file string, err error) {
	o, msg := Origin{File: file}, err.Error()
	if m := yamlLine.FindStringSubmatch(msg); m != nil {
		msg = m[2]
		if n, err := strconv.Atoi(m[1]); err == nil {
			o.Line, o.Col = n, 1
		}
	}
	l.problem(o, "", "not valid YAML: %s", msg)
}

// section walks a mapping; prefix is its name with a dot, or empty.
func (l *loader) section(file, prefix string, n *yaml.Node) {
	n = deref(n)
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return
	}
	if n.Kind != yaml.MappingNode {
		l.problem(Origin{File: file, Line: n.Line, Col: n.Column}, strings.TrimSuffix(prefix, "."),
			"want a section of keys, got %s", what(n))
		return
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		kn, vn := n.Content[i], n.Content[i+1]
		o := Origin{File: file, Line: kn.Line, Col: kn.Column}
		if kn.Tag == "!!merge" {
			l.merge(o, prefix, vn)
			continue
		}
		name := prefix + kn.Value
		if first := seen[kn.Value]; first != 0 {
			l.problem(o, name, "given twice: first on line %d", first)
			continue
		}
		seen[kn.Value] = kn.Line
		l.entry(o, name, vn)
	}
}

// merge reads what a YAML merge key (<<) refers to. An anchor may contain a
// reference to itself, so the nesting is bounded.
func (l *loader) merge(o Origin, prefix string, n *yaml.Node) {
	if l.merging >= 10 {
		l.problem(o, strings.TrimSuffix(prefix, "."), "merge keys (<<) are nested too deep")
		return
	}
	l.merging++
	defer func() { l.merging-- }()
	l.section(o.File, prefix, n)
}

func (l *loader) entry(o Origin, name string, vn *yaml.Node) {
	if k := lookup(name); k != nil {
		l.set(k, o, vn)
		return
	}
	if now, ok := renamed[name]; ok {
		l.cfg.Warnings = append(l.cfg.Warnings, fmt.Sprintf("%v: %s is called %s now", o, name, now))
		l.set(lookup(now), o, vn)
		return
	}
	if isSection(name) {
		l.section(o.File, name+".", vn)
		return
	}
	if instead, ok := removed[name]; ok {
		if sub := removedBelow(name, deref(vn)); len(sub) > 0 {
			for _, kn := range sub {
				full := name + "." + kn.Value
				hint := instead
				if h, ok := removed[full]; ok {
					hint = h
				}
				l.problem(Origin{File: o.File, Line: kn.Line, Col: kn.Column}, full, "this key was removed: %s", hint)
			}
			return
		}
		l.problem(o, name, "this key was removed: %s", instead)
		return
	}
	msg := "unknown key"
	if near := nearest(name, allNames()); near != "" {
		msg += fmt.Sprintf(" (did you mean %s?)", near)
	}
	l.problem(o, name, "%s", msg)
}

func removedBelow(name string, n *yaml.Node) (keys []*yaml.Node) {
	if _, ok := removed[name+"."]; !ok || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		keys = append(keys, n.Content[i])
	}
	return keys
}

// set decodes a value. A key without a value keeps its default.
func (l *loader) set(k *key, o Origin, n *yaml.Node) {
	if v := deref(n); v.Kind == yaml.ScalarNode && v.Tag == "!!null" {
		return
	}
	l.cfg.origins[k.Name] = o
	err := decode(k, n, k.At(l.cfg))
	for _, err := range flatten(err) {
		var ve *valueError
		if errors.As(err, &ve) && ve.node.Line > 0 {
			o.Line, o.Col = ve.node.Line, ve.node.Column
		}
		l.problem(o, k.Name, "%v", err)
	}
}

// flatten undoes errors.Join, at every level.
func flatten(err error) []error {
	if err == nil {
		return nil
	}
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	var all []error
	for _, e := range joined.Unwrap() {
		all = append(all, flatten(e)...)
	}
	return all
}

func lookup(name string) *key {
	i := slices.IndexFunc(schema, func(k key) bool { return k.Name == name })
	if i < 0 {
		return nil
	}
	return &schema[i]
}

func isSection(name string) bool {
	return slices.ContainsFunc(schema, func(k key) bool { return strings.HasPrefix(k.Name, name+".") })
}

// allNames has every key and every section.
func allNames() []string {
	var names []string
	for _, k := range schema {
		for i, r := range k.Name {
			if r == '.' && !slices.Contains(names, k.Name[:i]) {
				names = append(names, k.Name[:i])
			}
		}
		names = append(names, k.Name)
	}
	return names
}

// flags applies the command line, except for --url's addresses (derive).
func (l *loader) flags() {
	if l.o.DataDir != "" {
		l.cfg.DataDir = l.o.DataDir
		l.cfg.origins["data_dir"] = Origin{Flag: "--data-dir"}
	}
	if l.o.AllowPlainHTTP {
		l.cfg.AllowPlainHTTP = true
		l.cfg.origins["allow_plain_http"] = Origin{Flag: "--allow-plain-http"}
	}
	if l.o.URL != "" {
		l.cfg.ServerURL = l.o.URL
		l.cfg.origins["server_url"] = Origin{Flag: "--url"}
	}
}

func isLocal(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	addrs, err := interfaceAddrs()
	return err == nil && slices.Contains(addrs, a.Unmap())
}
