package cli

import (
	"strings"
	"testing"
)

func TestAllowsAllSeesOnlyTheTopLevel(t *testing.T) {
	for text, want := range map[string]bool{
		`{}`:                                         true,
		"// nothing\n{ /* \"acls\": */ }":            true,
		`{"groups": {"acls": []}}`:                   true,
		`{"hosts": {"x": "acls"},}`:                  true,
		`{"acls": []}`:                               false,
		`{"ACLs" /* old spelling */ : []}`:           false,
		"{\n\t\"grants\":\n[],}":                     false,
		`{"groups": {"group:a": ["x@\"acls\": y"]}}`: true,
		``:                                   false,
		`[]`:                                 false,
		`{"groups": {}`:                      false,
		`{} {}`:                              false,
		`"acls"`:                             false,
		strings.Repeat("[", 1<<20):           false,
		`{"a":` + strings.Repeat("[", 1<<20): false,
	} {
		if got := allowsAll([]byte(text)); got != want {
			t.Errorf("allowsAll(%.60q) = %v, want %v", text, got, want)
		}
	}
}
