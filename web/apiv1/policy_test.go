package apiv1

import (
	"context"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/acl"
)

const openPolicy = `// everybody
{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}
`

func TestPolicyIsKeptByteForByte(t *testing.T) {
	w := newWorld(t)
	if p := get[PolicyResponse](w, "GET", "/api/v1/policy", nil); p.Policy != string(acl.Default()) || p.UpdatedAt == nil {
		t.Errorf("first policy = %+v", p)
	}
	w.clock.Add(int64(time.Minute))
	p := get[PolicyResponse](w, "PUT", "/api/v1/policy", PolicyRequest{openPolicy})
	if p.Policy != openPolicy || !p.UpdatedAt.Equal(w.now()) {
		t.Errorf("answer = %+v", p)
	}
	if got := get[PolicyResponse](w, "GET", "/api/v1/policy", nil); got.Policy != openPolicy {
		t.Errorf("stored policy = %q", got.Policy)
	}
	if v := w.replica.Current().Policy().Version; string(v.Text) != openPolicy {
		t.Errorf("live policy = %q", v.Text)
	}
	audits := w.lastAudit().Number
	get[PolicyResponse](w, "PUT", "/api/v1/policy", PolicyRequest{openPolicy})
	if n := w.lastAudit().Number; n != audits {
		t.Errorf("the same text again wrote audit row %d", n)
	}
}

func TestRejectedPolicyChangesNothing(t *testing.T) {
	w := newWorld(t)
	before := w.replica.Current()
	for _, c := range []struct{ text, want string }{
		{"{\n  \"acls\": [{]\n}", "policy:2:"},
		{"{\n\"nonsense\": {}}", "policy:2:"},
		{"{\"acls\": [{\"action\": \"accept\", \"src\": [\"group:none\"], \"dst\": [\"*:*\"]}]}", "policy:1:"},
		{"{\n\"acls\": [],\n\"tests\": [{\"src\": \"alice@example.com\", \"accept\": [\"100.64.0.1:22\"]}]}", "policy:3:"},
		{strings.Repeat("[", 100_000), "policy:1:"},
	} {
		for _, route := range []struct{ method, path string }{{"PUT", "/api/v1/policy"}, {"POST", "/api/v1/policy/check"}} {
			p := w.refused(400, c.want, route.method, route.path, PolicyRequest{c.text})
			if len(p.Errors) == 0 || !strings.HasPrefix(p.Errors[0].Location, c.want) || !strings.HasPrefix(p.Detail, p.Errors[0].Location+": ") {
				t.Errorf("%s of %.60q: %+v", route.path, c.text, p)
			}
		}
	}
	if got := get[PolicyResponse](w, "GET", "/api/v1/policy", nil); got.Policy != string(acl.Default()) {
		t.Errorf("stored policy = %q", got.Policy)
	}
	if now := w.replica.Current(); now.Revision() != before.Revision() || now.Access() != before.Access() {
		t.Errorf("revision %d became %d", before.Revision(), now.Revision())
	}
}

func TestPolicyCheckStoresNothing(t *testing.T) {
	w := newWorld(t)
	if rec := w.send("POST", "/api/v1/policy/check", PolicyRequest{openPolicy}); rec.Code != 200 || strings.TrimSpace(rec.Body.String()) != "{}" {
		t.Errorf("check = %d %s", rec.Code, rec.Body)
	}
	if got := get[PolicyResponse](w, "GET", "/api/v1/policy", nil); got.Policy == openPolicy {
		t.Error("the checked policy was stored")
	}
}

func TestPolicyOfAFileIsNotReplaced(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.PolicyMode = "file" })
	w.refused(400, "file", "PUT", "/api/v1/policy", PolicyRequest{openPolicy})
	get[EmptyResponse](w, "POST", "/api/v1/policy/check", PolicyRequest{openPolicy})
}

// A caller who gives up while others compile gets an answer.
func TestPolicyChecksAreFew(t *testing.T) {
	w := newWorld(t)
	s := newServer(w.config)
	for range cap(s.compiles) {
		s.compiles <- struct{}{}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	r := httptest.NewRequest("POST", "/api/v1/policy/check", nil).WithContext(ctx)
	if p := problem(s.compile(r, openPolicy)); p.Status != 429 {
		t.Errorf("status = %d, want 429", p.Status)
	}
}
