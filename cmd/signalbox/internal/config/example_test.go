package config

import (
	"bytes"
	"flag"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write config-example.yaml")

const examplePath = "../../../../config-example.yaml"

func TestExampleFileIsGeneratedFromTheSchema(t *testing.T) {
	if *update {
		if err := os.WriteFile(examplePath, Example(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(examplePath)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, Example()) {
		t.Error("config-example.yaml differs from the schema: run go test ./cmd/signalbox/internal/config -update")
	}
}

// The file as it is, and with every commented key in force, has to mean what
// no file at all means.
func TestExampleFileEqualsTheDefaults(t *testing.T) {
	root := Overrides{IsRoot: func() bool { return true }, Getwd: func() (string, error) { return "/", nil }}
	want, err := Load("", nil, root)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(examplePath)
	if err != nil {
		t.Fatal(err)
	}
	all := regexp.MustCompile(`(?m)^( *)#([a-z0-9_]+: )`).ReplaceAll(text, []byte("$1$2"))
	if bytes.Equal(all, text) {
		t.Fatal("no commented key found")
	}
	for name, text := range map[string][]byte{"as it is": text, "commented keys in force": all} {
		got, err := load(t, string(text), nil, root)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(got.Warnings) > 0 {
			t.Errorf("%s: warnings %q", name, got.Warnings)
		}
		for i := range schema {
			k := &schema[i]
			// Empty lists of the file and absent ones mean the same.
			g, w := reflect.ValueOf(k.At(got)).Elem(), reflect.ValueOf(k.At(want)).Elem()
			if (g.Kind() == reflect.Slice || g.Kind() == reflect.Map) && g.Len() == 0 && w.Len() == 0 {
				continue
			}
			if !reflect.DeepEqual(g.Interface(), w.Interface()) {
				t.Errorf("%s: %s = %v, default %v", name, k.Name, g, w)
			}
			if inForce := got.IsSet(k.Name); !inForce && (k.Derived == "" || name != "as it is") {
				t.Errorf("%s: %s is missing", name, k.Name)
			}
		}
	}
}

func TestEveryKeyIsDocumented(t *testing.T) {
	seen := map[string]bool{}
	for _, k := range schema {
		if seen[k.Name] {
			t.Errorf("%s is in the schema twice", k.Name)
		}
		seen[k.Name] = true
		if k.Doc == "" || !strings.HasSuffix(k.Doc, ".") {
			t.Errorf("%s: doc %q is no sentence", k.Name, k.Doc)
		}
		if (k.Derived == "") != (k.Shown == "") {
			t.Errorf("%s: Derived and Shown go together", k.Name)
		}
		if removed[k.Name] != "" {
			t.Errorf("%s is a key and a removed one", k.Name)
		}
	}
}

// Each field of the table has to be a field of its own: two keys with one
// pointer would overwrite each other.
func TestKeysDoNotShareFields(t *testing.T) {
	var c Config
	at := map[any]string{}
	for _, k := range schema {
		p := k.At(&c)
		if other := at[p]; other != "" {
			t.Errorf("%s and %s share a field", k.Name, other)
		}
		at[p] = k.Name
	}
}
