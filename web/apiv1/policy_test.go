package apiv1

import (
	"context"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

const openPolicy = `// everybody
{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}
`

func TestPolicyIsKeptByteForByte(t *testing.T) {
	w := newWorld(t)
	if p := get[PolicyResponse](w, "GET", "/api/v1/policy", nil); p.Policy != string(firstPolicy) || p.UpdatedAt == nil {
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
	if got := get[PolicyResponse](w, "GET", "/api/v1/policy", nil); got.Policy != string(firstPolicy) {
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
	_, err := s.compile(r, openPolicy)
	if p := problem(err); p.Status != 429 {
		t.Errorf("status = %d, want 429", p.Status)
	}
}

func TestEditOfAnOlderVersionIsRefused(t *testing.T) {
	w := newWorld(t)
	first := w.send("GET", "/api/v1/policy", nil).Header().Get("ETag")
	rec := w.send("PUT", "/api/v1/policy", PolicyRequest{openPolicy}, "If-Match", first)
	second := rec.Header().Get("ETag")
	if rec.Code != 200 || first == "" || second == "" || second == first {
		t.Fatalf("edit of %s = %d %s, now %s", first, rec.Code, rec.Body, second)
	}
	audits, rev := w.lastAudit().Number, w.replica.Current().Revision()
	for _, tag := range []string{first, "W/" + second, `"x"`, strings.Trim(first, `"`)} {
		rec := w.send("PUT", "/api/v1/policy", PolicyRequest{`{"acls": []}`}, "If-Match", tag)
		if rec.Code != 412 || !strings.Contains(rec.Body.String(), "version "+strings.Trim(second, `"`)+" is live") {
			t.Errorf("If-Match %s = %d %s, want 412", tag, rec.Code, rec.Body)
		}
	}
	rollback := own + "/policy/versions/" + strings.Trim(first, `"`) + "/rollback"
	if rec := w.send("POST", rollback, nil, "If-Match", first); rec.Code != 412 {
		t.Errorf("rollback with %s = %d %s, want 412", first, rec.Code, rec.Body)
	}
	if got := get[PolicyResponse](w, "GET", "/api/v1/policy", nil); got.Policy != openPolicy {
		t.Errorf("stored policy = %q", got.Policy)
	}
	if n := w.lastAudit().Number; n != audits || w.replica.Current().Revision() != rev {
		t.Errorf("a refused edit wrote audit row %d", n)
	}
	for _, tag := range []string{strings.Trim(second, `"`), `"x", ` + second, "*"} {
		if rec := w.send("PUT", "/api/v1/policy", PolicyRequest{openPolicy}, "If-Match", tag); rec.Code != 200 || rec.Header().Get("ETag") != second {
			t.Errorf("If-Match %s = %d %s", tag, rec.Code, rec.Body)
		}
	}
}

// Of two edits of one version, made at once, one wins.
func TestConcurrentEditsDoNotOverwriteEachOther(t *testing.T) {
	w := newWorld(t)
	tag := w.send("GET", "/api/v1/policy", nil).Header().Get("ETag")
	codes := make(chan int)
	const n = 8
	for i := range n {
		go func() {
			codes <- w.send("PUT", "/api/v1/policy", PolicyRequest{fmt.Sprintf("// %d\n%s", i, openPolicy)}, "If-Match", tag).Code
		}()
	}
	got := map[int]int{}
	for range n {
		got[<-codes]++
	}
	if got[200] != 1 || got[412] != n-1 {
		t.Errorf("answers %v, want one 200 and %d 412", got, n-1)
	}
}

// lagging is a replica whose first answer is an older snapshot.
type lagging struct {
	Replica
	old   *tailnet.Snapshot
	reads int
}

func (l *lagging) Current() *tailnet.Snapshot {
	if l.reads++; l.reads == 1 {
		return l.old
	}
	return l.Replica.Current()
}

// What was compiled against a tailnet that has moved on is compiled again.
func TestPolicyIsJudgedByTheTailnetThatItIsStoredFor(t *testing.T) {
	w := newWorld(t)
	zoe := &db.User{Name: "zoe", Email: "zoe@example.com"}
	w.do(func(tx *db.Tx) error { return tx.CreateUser(zoe) })
	late := &lagging{Replica: w.replica, old: w.replica.Current()}
	w.do(func(tx *db.Tx) error { return tx.DeleteUser(zoe.ID) })
	before := w.send("GET", "/api/v1/policy", nil).Header().Get("ETag")

	w.config.Replica = late
	w.handler = New(w.config)
	text := `{"acls": [], "tests": [{"src": "zoe@example.com", "deny": ["100.64.0.1:22"]}]}`
	w.refused(400, "zoe", "PUT", "/api/v1/policy", PolicyRequest{text})
	if late.reads != 2 {
		t.Errorf("%d compilations, want 2", late.reads)
	}
	if now := w.send("GET", "/api/v1/policy", nil).Header().Get("ETag"); now != before {
		t.Errorf("version %s was stored", now)
	}
	late.reads = 0
	get[PolicyResponse](w, "PUT", "/api/v1/policy", PolicyRequest{openPolicy})
}

func TestNoteIsKeptWithTheVersion(t *testing.T) {
	w := newWorld(t)
	rec := w.send("PUT", "/api/v1/policy", SetPolicyRequest{PolicyRequest{openPolicy}, "open up"})
	got := get[PolicyVersionInfo](w, "GET", own+"/policy/versions/"+strings.Trim(rec.Header().Get("ETag"), `"`), nil)
	if got.Note != "open up" || got.Text != openPolicy || !got.Live {
		t.Errorf("version = %+v", got)
	}
	w.refused(400, "body.note", "PUT", "/api/v1/policy", SetPolicyRequest{PolicyRequest{openPolicy}, "a\x1bb"})
}
