package acl

import "testing"

func TestPolicyWithoutRuleMembersAllowsAll(t *testing.T) {
	for text, want := range map[string]bool{
		`{}`:                               true,
		"// nothing\n{ /* \"acls\": */ }":  true,
		`{"hosts": {"acls": "10.0.0.1"}}`:  true,
		`{"groups": {"group:acls": []}}`:   true,
		`{"acls": []}`:                     false,
		`{"ACLs" /* old spelling */ : []}`: false,
		"{\n\t\"grants\":\n[],}":           false,
		`{"grants": null}`:                 false,
	} {
		p, err := Parse([]byte(text))
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := p.AllowsAll(); got != want {
			t.Errorf("AllowsAll(%s) = %v, want %v", text, got, want)
		}
	}
}
