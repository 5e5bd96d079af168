package config

import (
	"bytes"
	"encoding"
	"fmt"
	"os"
	"reflect"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Dump returns the configuration in effect as YAML that Load reads back, with
// stars in the place of secrets.
func (c *Config) Dump() ([]byte, error) {
	root := &yaml.Node{Kind: yaml.MappingNode}
	for i := range schema {
		k := &schema[i]
		if k.Name == "server_url" && strings.HasSuffix(c.ServerURL, ":0") {
			continue // follows listen_addr, whose port is not known before it is bound
		}
		v, err := render(k, c)
		if err != nil {
			return nil, fmt.Errorf("print %s: %w", k.Name, err)
		}
		if k.Secret && v.Value != "" {
			v.SetString("***")
		}
		insert(root, strings.Split(k.Name, "."), v)
	}
	var b bytes.Buffer
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	if err := enc.Encode(root); err != nil {
		return nil, err
	}
	return b.Bytes(), enc.Close()
}

// insert puts v under the path. Keys of a section stand together in the
// schema.
func insert(n *yaml.Node, path []string, v *yaml.Node) {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == path[0] {
			insert(n.Content[i+1], path[1:], v)
			return
		}
	}
	if len(path) > 1 {
		sub := &yaml.Node{Kind: yaml.MappingNode}
		insert(sub, path[1:], v)
		v = sub
	}
	n.Content = append(n.Content, scalar(path[0]), v)
}

// render is the inverse of decode.
func render(k *key, c *Config) (*yaml.Node, error) {
	n := &yaml.Node{}
	switch v := k.At(c).(type) {
	case *time.Duration:
		n.SetString(FormatDuration(*v))
		n.Tag = "" // 0 needs no quotes
		return n, nil
	case *os.FileMode:
		n.SetString(fmt.Sprintf("%04o", *v))
		return n, nil
	case *[]DNSRecord:
		list := []map[string]string{}
		for _, r := range *v {
			list = append(list, map[string]string{"name": r.Name, "type": r.Type, "value": r.Value})
		}
		return n, n.Encode(list)
	case *[]DialCandidate:
		type candidate struct {
			IP         string `yaml:"ip"`
			StartDelay string `yaml:"start_delay"`
			Timeout    string `yaml:"timeout"`
			Priority   int    `yaml:"priority"`
		}
		list := []candidate{}
		for _, c := range *v {
			list = append(list, candidate{c.IP.String(), FormatDuration(c.StartDelay), FormatDuration(c.Timeout), c.Priority})
		}
		return n, n.Encode(list)
	case encoding.TextMarshaler: // addresses and prefixes; the zero value is the empty text
		text, err := v.MarshalText()
		n.SetString(string(text))
		return n, err
	default:
		rv := reflect.ValueOf(v).Elem()
		if rv.Kind() == reflect.Slice && rv.Type().Elem().Kind() != reflect.String {
			texts := []string{}
			for i := range rv.Len() {
				texts = append(texts, fmt.Sprint(rv.Index(i)))
			}
			return n, n.Encode(texts)
		}
		return n, n.Encode(rv.Interface())
	}
}
