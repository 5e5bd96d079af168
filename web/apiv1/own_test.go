package apiv1

import (
	"encoding/json"
	"errors"
	"strconv"
	"strings"
	"testing"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/acl/tailnetfile"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

const own = "/api/signalbox/v1"

// policyWorld has two people with a device each and a policy that lets alice reach bob's port 22.
func policyWorld(t *testing.T) *world {
	w := newWorld(t)
	var ids []tailcfg.UserID
	w.do(func(tx *db.Tx) error {
		for _, name := range []string{"ann", "ben"} {
			u := &db.User{Name: name}
			if err := tx.CreateUser(u); err != nil {
				return err
			}
			ids = append(ids, u.ID)
		}
		return nil
	})
	w.addNode("desk", ids[0], nil)
	w.addNode("box", ids[1], nil)
	get[PolicyResponse](w, "PUT", "/api/v1/policy", PolicyRequest{`{"acls":[{"action":"accept","src":["ann@"],"dst":["ben@:22"]}]}`})
	return w
}

func TestExplainAnswersByTheLivePolicy(t *testing.T) {
	w := policyWorld(t)
	type answer struct{ Verdicts []verdict }
	for _, c := range []struct {
		query string
		want  bool
	}{{"src=desk&dst=box&port=22", true}, {"src=desk&dst=box&port=23", false}, {"src=box&dst=desk&port=22", false}} {
		got := get[answer](w, "GET", own+"/policy/explain?"+c.query, nil)
		if len(got.Verdicts) == 0 {
			t.Fatalf("%s: no verdict", c.query)
		}
		for _, v := range got.Verdicts {
			if v.Allowed != c.want {
				t.Errorf("%s: allowed = %v (%s), want %v", c.query, v.Allowed, v.Reason, c.want)
			}
		}
	}
	for query, other := range map[string]string{"src=desk": "box", "dst=box": "desk"} {
		found := false
		for _, o := range get[openings](w, "GET", own+"/policy/explain?"+query, nil).Openings {
			found = found || o.Other == other && len(o.Ports) > 0
		}
		if !found {
			t.Errorf("%s does not list %s", query, other)
		}
	}
	w.refused(400, "query.src", "GET", own+"/policy/explain", nil)
	w.refused(400, "query.src", "GET", own+"/policy/explain?src=nobody&dst=box", nil)
	w.refused(400, "query.port", "GET", own+"/policy/explain?src=desk&dst=box&port=x", nil)
	w.refused(400, "query.proto", "GET", own+"/policy/explain?src=desk&dst=box&port=1&proto=carrier-pigeon", nil)
	w.refused(404, "version", "GET", own+"/policy/explain?src=desk&dst=box&version=999", nil)
}

func TestExplainSpeaksLowerCase(t *testing.T) {
	w := policyWorld(t)
	for query, want := range map[string][]string{
		"src=desk&dst=box&port=22": {`"rules":[{"line":1,"column":`, `"src":["ann@"]`, `"dst":"ben@"`, `"ports":"22"`},
		"src=desk&dst=box&port=23": {`"near":[{"line":1,"column":`, `"fails":[`},
	} {
		body := w.send("GET", own+"/policy/explain?"+query, nil).Body.String()
		for _, s := range want {
			if !strings.Contains(body, s) {
				t.Errorf("%s: got %s, want %s in it", query, body, s)
			}
		}
	}
}

// A version whose names the tailnet refutes by now is explained as it would be in force.
func TestExplainTakesAVersionWithAStaleName(t *testing.T) {
	w := policyWorld(t)
	var last *db.User
	w.do(func(tx *db.Tx) error {
		last = &db.User{Name: "zed", Email: "zed@gone.example"}
		return tx.CreateUser(last)
	})
	get[PolicyResponse](w, "PUT", "/api/v1/policy", PolicyRequest{`{"acls":[{"action":"accept","src":["ann@"],"dst":["ben@:22"]},
		{"action":"accept","src":["user:*@gone.example"],"dst":["ben@:22"]}]}`})
	live := w.replica.Current().Policy().Version.ID
	w.do(func(tx *db.Tx) error { return tx.DeleteUser(last.ID) })
	type answer struct{ Verdicts []verdict }
	got := get[answer](w, "GET", own+"/policy/explain?src=desk&dst=box&port=22&version="+strconv.FormatInt(live, 10), nil)
	if len(got.Verdicts) == 0 || !got.Verdicts[0].Allowed {
		t.Errorf("verdicts = %+v, want allowed", got.Verdicts)
	}
}

func TestDiffTellsTheEffectAndStoresNothing(t *testing.T) {
	w := policyWorld(t)
	before := get[PolicyResponse](w, "GET", "/api/v1/policy", nil)
	e := get[acl.Effect](w, "POST", own+"/policy/diff", PolicyRequest{`{"acls":[{"action":"accept","src":["ann@"],"dst":["ben@:22,80"]}]}`})
	ports := map[string]bool{}
	for _, f := range e.Flows {
		ports[f.Allow] = f.Opened
	}
	if !ports["tcp:80"] || !ports["udp:80"] || len(ports) != 2 {
		t.Errorf("flows = %+v, want port 80 opened and nothing else", e.Flows)
	}
	if after := get[PolicyResponse](w, "GET", "/api/v1/policy", nil); after.Policy != before.Policy {
		t.Error("the policy was stored")
	}
	w.refused(400, "policy:1:", "POST", own+"/policy/diff", PolicyRequest{`{"acls": 5}`})
}

func TestRollbackMakesAnEarlierVersionLive(t *testing.T) {
	w := policyWorld(t)
	get[PolicyResponse](w, "PUT", "/api/v1/policy", PolicyRequest{`{"acls":[]}`})
	type list struct{ Versions []PolicyVersionInfo }
	versions := get[list](w, "GET", own+"/policy/versions", nil).Versions
	if len(versions) < 2 || !versions[0].Live || versions[1].Live {
		t.Fatalf("versions = %+v", versions)
	}
	path := own + "/policy/versions/" + jsonText(versions[1].Version)
	old := get[PolicyVersionInfo](w, "GET", path, nil)
	if old.Text == "" {
		t.Fatal("no text")
	}
	get[PolicyVersionInfo](w, "POST", path+"/rollback", nil)
	if live := get[PolicyResponse](w, "GET", "/api/v1/policy", nil); live.Policy != old.Text {
		t.Errorf("live = %q, want %q", live.Policy, old.Text)
	}
	w.refused(404, "no policy version", "POST", own+"/policy/versions/99999/rollback", nil)
	w.refused(400, "path.id", "GET", own+"/policy/versions/x", nil)
}

func TestExportHasTheDNSSettingsWithoutSecrets(t *testing.T) {
	w := newWorld(t)
	w.do(func(tx *db.Tx) error {
		if _, err := tx.PutSetting(tailnet.SettingDNS, []byte(`{"magicDNS": true, "baseDomain": "mesh.example.com", "global": ["9.9.9.9", "https://ann:hunter2@dns.example.com/q"],
			"split": {"corp.example": ["https://x:hunter2@10.0.0.53/q"]}, "searchDomains": ["corp.example"]}`)); err != nil {
			return err
		}
		_, err := tx.PutSetting(tailnet.SettingExtraRecords, []byte(`[{"Name": "db.mesh.example.com", "Type": "A", "Value": "100.64.0.9"}]`))
		return err
	})
	body := w.send("GET", own+"/tailnet", nil).Body.String()
	want := `"dns":{"magicDNS":true,"baseDomain":"mesh.example.com","overrideLocal":false,"global":["9.9.9.9","https://ann:xxxxx@dns.example.com/q"],` +
		`"split":{"corp.example":["https://x:xxxxx@10.0.0.53/q"]},"searchDomains":["corp.example"],` +
		`"records":[{"Name":"db.mesh.example.com","Type":"A","Value":"100.64.0.9"}]}`
	if !strings.Contains(body, want) || strings.Contains(body, "hunter2") {
		t.Errorf("got %s, want %s in it", body, want)
	}
}

func TestExportCompilesOfflineToTheSame(t *testing.T) {
	w := policyWorld(t)
	for name, routes := range map[string][]string{"router": {"10.1.0.0/16", "10.2.0.0/16"}, "exit": {"0.0.0.0/0", "::/0"}} {
		id := w.addNode(name, w.alice, nil, routes...)
		get[NodeResponse](w, "POST", "/api/v1/node/"+strconv.FormatInt(int64(id), 10)+"/approve_routes", map[string]any{"routes": routes})
	}
	w.addNode("server", 0, []string{"tag:server"})
	get[PolicyResponse](w, "PUT", "/api/v1/policy", PolicyRequest{`{
		"tagOwners": {"tag:server": ["alice@example.com"]}, "postures": {"posture:linux": ["node:os == 'linux'"]},
		"acls": [
			{"action": "accept", "src": ["ann@"], "dst": ["10.1.0.0/16:80", "autogroup:internet:*"]},
			{"action": "accept", "src": ["ben@"], "srcPosture": ["posture:linux"], "dst": ["tag:server:22"]},
			{"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self:*"]},
		],
		"ssh": [{"action": "accept", "src": ["autogroup:member"], "dst": ["tag:server"], "users": ["root"]}],
	}`})
	rec := w.send("GET", own+"/tailnet", nil)
	f, err := tailnetfile.Parse(rec.Body.Bytes())
	if err != nil {
		t.Fatalf("%v in %s", err, rec.Body)
	}
	facts, err := f.Tailnet()
	if err != nil {
		t.Fatal(err)
	}
	p, err := acl.Parse([]byte(f.Policy))
	if err != nil {
		t.Fatal(err)
	}
	a, err := acl.Compile(p, facts)
	if err != nil {
		t.Fatal(err)
	}
	if e := acl.Diff(w.replica.Current().Access(), a); !e.Empty() {
		t.Errorf("the export differs from the live tailnet: %+v", e)
	}
	nothing, err := acl.Parse([]byte(`{"acls": []}`))
	if err != nil {
		t.Fatal(err)
	}
	none, err := acl.Compile(nothing, facts)
	if err != nil {
		t.Fatal(err)
	}
	if text := jsonText(acl.Diff(none, a).Flows); !strings.Contains(text, "10.1.0.0/16") || !strings.Contains(text, "server") || !strings.Contains(text, "2000::/3") {
		t.Errorf("the export lacks a route, an exit node or a posture: %s", text)
	}
}

func TestAuditAndServersAreListed(t *testing.T) {
	w := policyWorld(t)
	type audit struct{ Events []AuditInfo }
	events := get[audit](w, "GET", own+"/audit?limit=1000", nil).Events
	found := false
	for i, e := range events {
		if e.Number != events[0].Number+int64(i) {
			t.Errorf("event %d has number %d", i, e.Number)
		}
		found = found || e.Action == "policy.set"
	}
	if !found {
		t.Errorf("no policy.set in %+v", events)
	}
	get[PolicyResponse](w, "PUT", "/api/v1/policy", PolicyRequest{openPolicy})
	newest := get[audit](w, "GET", own+"/audit?last=2", nil).Events
	if len(newest) != 2 || newest[1].Number != w.lastAudit().Number || newest[0].Number != newest[1].Number-1 {
		t.Errorf("the last two events = %+v", newest)
	}
	w.refused(400, "query.limit", "GET", own+"/audit?limit=-1", nil)
}

func TestServersAreListedAsTheyLastSaid(t *testing.T) {
	w := policyWorld(t)
	self := db.Instance{Name: "self", Version: "2"}
	fresh := db.Instance{Name: "fresh", Version: "2", Streams: 5}
	mute := db.Instance{Name: "the version before", Version: "1"}
	dead := db.Instance{Name: "dead", Version: "1", Revision: 1, Streams: 9}
	w.do(func(tx *db.Tx) error { return tx.Heartbeat(&dead) })
	w.clock.Add(int64(2 * time.Minute))
	w.do(func(tx *db.Tx) error {
		rev, err := tx.Revision()
		fresh.Revision = rev
		return errors.Join(err, tx.Heartbeat(&self), tx.Heartbeat(&fresh), tx.Heartbeat(&mute))
	})
	get[PolicyResponse](w, "PUT", "/api/v1/policy", PolicyRequest{openPolicy})
	w.config.Instance, w.config.Streams = self.ID, func() int64 { return 3 }
	w.handler = New(w.config)
	type servers struct{ Servers []ServerInfo }
	got := map[string]ServerInfo{}
	for _, i := range get[servers](w, "GET", own+"/servers", nil).Servers {
		got[i.Name] = i
	}
	now := int64(w.replica.Current().Revision())
	for name, want := range map[string]ServerInfo{
		"self":               {Self: true, Alive: true, Streams: 3, Revision: now},
		"fresh":              {Alive: true, Streams: 5, Revision: int64(fresh.Revision), Lag: now - int64(fresh.Revision)},
		"the version before": {Alive: true},
		"dead":               {Revision: 1, Lag: now - 1},
	} {
		i := got[name]
		if i.Self != want.Self || i.Alive != want.Alive || i.Streams != want.Streams || i.Revision != want.Revision || i.Lag != want.Lag || i.Heartbeat == "" {
			t.Errorf("%s: %+v, want %+v", name, i, want)
		}
	}
	if got["fresh"].Lag < 1 {
		t.Errorf("the edit of the policy does not show in the lag: %+v", got["fresh"])
	}
}

func jsonText(v any) string {
	b, _ := json.Marshal(v)
	return string(b)
}
