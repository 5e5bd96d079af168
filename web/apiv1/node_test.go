package apiv1

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// wantFields are the members of a node in Headscale 0.30.
const wantFields = "approvedRoutes availableRoutes createdAt discoKey expiry givenName id ipAddresses lastSeen machineKey name nodeKey online preAuthKey registerMethod subnetRoutes tags user"

func nodePath(id tailcfg.NodeID) string { return fmt.Sprintf("/api/v1/node/%d", int64(id)) }

func TestNodeShape(t *testing.T) {
	w := newWorld(t)
	id := w.addNode("Laptop of Alice", w.alice, nil)
	raw := get[map[string]map[string]json.RawMessage](w, "GET", nodePath(id), nil)["node"]
	var names []string
	for _, f := range strings.Fields(wantFields) {
		if _, ok := raw[f]; ok {
			names = append(names, f)
		}
	}
	if len(raw) != len(strings.Fields(wantFields)) || len(names) != len(raw) {
		t.Errorf("fields = %v", raw)
	}
	for f, want := range map[string]string{
		"id": `"1"`, "name": `"Laptop of Alice"`, "givenName": `"laptop-of-alice"`, "ipAddresses": `["100.64.0.1","fd7a:115c:a1e0::1"]`, "online": "false", "lastSeen": "null",
		"preAuthKey": "null", "approvedRoutes": "[]", "availableRoutes": "[]", "subnetRoutes": "[]", "tags": "[]", "registerMethod": `"REGISTER_METHOD_CLI"`,
		"createdAt": `"2030-01-02T03:04:05Z"`, "expiry": `"2030-01-03T03:04:05Z"`,
	} {
		if string(raw[f]) != want {
			t.Errorf("%s = %s, want %s", f, raw[f], want)
		}
	}
	if s := string(raw["nodeKey"]); !strings.HasPrefix(s, `"nodekey:`) || !strings.HasPrefix(string(raw["machineKey"]), `"mkey:`) || !strings.HasPrefix(string(raw["discoKey"]), `"discokey:`) {
		t.Errorf("keys = %s %s %s", s, raw["machineKey"], raw["discoKey"])
	}
}

func TestNodeListShowsOwnersAndKeys(t *testing.T) {
	w := newWorld(t)
	k := get[PreAuthKeyResponse](w, "POST", "/api/v1/preauthkey", `{"user":"1"}`).PreAuthKey
	mine := w.addNode("mine", w.alice, nil)
	w.do(func(tx *db.Tx) error {
		n, err := tx.Node(mine)
		if err != nil {
			return err
		}
		n.AuthKeyID = int64(k.ID)
		return tx.PutNode(n)
	})
	w.addNode("server", 0, []string{"tag:server"})
	nodes := get[NodesResponse](w, "GET", "/api/v1/node", nil).Nodes
	if len(nodes) != 2 {
		t.Fatalf("nodes = %+v", nodes)
	}
	if n := nodes[0]; n.User.Name != "alice" || n.PreAuthKey == nil || n.PreAuthKey.ID != k.ID || !strings.HasSuffix(n.PreAuthKey.Key, "-***") {
		t.Errorf("own node = %+v", n)
	}
	if n := nodes[1]; n.User == nil || n.User.ID != 2147455555 || n.User.Name != "tagged-devices" || n.Tags[0] != "tag:server" || n.PreAuthKey != nil {
		t.Errorf("tagged node = %+v", n)
	}
	one := get[NodeResponse](w, "GET", nodePath(mine), nil).Node
	if !reflect.DeepEqual(one, nodes[0]) {
		t.Errorf("a node alone = %+v, in the list %+v", one, nodes[0])
	}
	if n := get[NodesResponse](w, "GET", "/api/v1/node?user=alice", nil).Nodes; len(n) != 1 || n[0].GivenName != "mine" {
		t.Errorf("nodes of alice = %+v", n)
	}
	w.refused(404, "no such user", "GET", "/api/v1/node?user=nobody", nil)
	w.refused(404, "no node has the id 99", "GET", "/api/v1/node/99", nil)
}

func TestNodeExpire(t *testing.T) {
	w := newWorld(t)
	path := nodePath(w.addNode("host", w.alice, nil)) + "/expire"
	expired := func() bool { return w.replica.Current().ByName("host").Expired }

	n := get[NodeResponse](w, "POST", path, nil).Node
	if !n.Expiry.Equal(w.now()) || !expired() {
		t.Errorf("expired now: expiry = %v, expired = %v", n.Expiry, expired())
	}
	later := w.now().Add(48 * time.Hour)
	n = get[NodeResponse](w, "POST", path, ExpireNodeRequest{Expiry: &Timestamp{later}}).Node
	if !n.Expiry.Equal(later) || expired() {
		t.Errorf("expires later: expiry = %v, expired = %v", n.Expiry, expired())
	}
	n = get[NodeResponse](w, "POST", path, ExpireNodeRequest{Expiry: &Timestamp{w.now().Add(-time.Hour)}}).Node
	if !n.Expiry.Equal(w.now()) || !expired() {
		t.Errorf("expired in the past: expiry = %v, expired = %v", n.Expiry, expired())
	}
	n = get[NodeResponse](w, "POST", path, ExpireNodeRequest{DisableExpiry: true}).Node
	if n.Expiry != nil || expired() {
		t.Errorf("never expires: expiry = %v, expired = %v", n.Expiry, expired())
	}
	n = get[NodeResponse](w, "POST", path+"?expiry="+later.Format(time.RFC3339), nil).Node
	if !n.Expiry.Equal(later) {
		t.Errorf("expiry from the query = %v", n.Expiry)
	}
	w.refused(400, "disableExpiry", "POST", path, ExpireNodeRequest{Expiry: &Timestamp{later}, DisableExpiry: true})
	if a := w.lastAudit(); a.Action != "node.expire" || a.Target != "node:1" {
		t.Errorf("audit = %+v", a)
	}
}

func TestNodeRename(t *testing.T) {
	w := newWorld(t)
	path := nodePath(w.addNode("one", w.alice, nil)) + "/rename/"
	w.addNode("two", w.alice, nil)
	if n := get[NodeResponse](w, "POST", path+"Web-1", nil).Node; n.GivenName != "web-1" || n.Name != "one" {
		t.Errorf("renamed = %+v", n)
	}
	w.refused(409, `"two" is taken or reserved`, "POST", path+"two", nil)
	w.refused(409, "reserved", "POST", path+"localhost", nil)
	for _, bad := range []string{"-a", "a-", "a.b", "a_b", "%C3%BC", "a%20b", strings.Repeat("a", 64), "%2e", "a%00"} {
		w.refused(400, "path.name", "POST", path+bad, nil)
	}
	audits := w.lastAudit().Number
	get[NodeResponse](w, "POST", path+"web-1", nil)
	if now := w.lastAudit().Number; now != audits {
		t.Errorf("a rename to the same name wrote audit row %d", now)
	}
}

// A released name waits for its former owner. An administrator may give it away, a name in use or a reserved one not.
func TestForcedRenameTakesAHeldName(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Reserved = []string{"vpn"} })
	path := nodePath(w.addNode("one", w.alice, nil)) + "/rename/"
	w.addNode("two", 0, []string{"tag:server"})
	w.do(func(tx *db.Tx) error {
		if _, err := tx.PutSetting(tailnet.SettingDNS, []byte(`{"baseDomain": "mesh.test"}`)); err != nil {
			return err
		}
		_, err := tx.PutSetting(tailnet.SettingExtraRecords, []byte(`[{"Name": "grafana.mesh.test", "Value": "100.64.9.9"}]`))
		return err
	})
	w.refused(409, "is taken or reserved", "POST", path+"grafana", nil)
	gone := w.addNode("three", 0, []string{"tag:server"})
	get[EmptyResponse](w, "DELETE", nodePath(gone), nil)
	w.refused(409, "held for its former owner", "POST", path+"three", nil)
	w.refused(409, "held for its former owner", "POST", path+"three?force=false", nil)
	w.refused(400, "query.force", "POST", path+"three?force=perhaps", nil)
	for _, name := range []string{"two", "localhost", "vpn", "grafana"} {
		w.refused(409, "is taken or reserved", "POST", path+name+"?force=true", nil)
	}
	if n := get[NodeResponse](w, "POST", path+"three?force=true", nil).Node; n.GivenName != "three" {
		t.Errorf("renamed = %+v", n)
	}
	if a := w.lastAudit(); a.Action != "node.rename" || !strings.Contains(string(a.After), `"three"`) {
		t.Errorf("audit = %s %s", a.Action, a.After)
	}
}

// An address is an administrator's to choose, also one that was given up just now, as long as no node has it.
func TestSetIP(t *testing.T) {
	w := newWorld(t)
	id, other := w.addNode("one", w.alice, nil), w.addNode("two", w.alice, nil)
	path := fmt.Sprintf("%s/node/%d/ip", own, id)
	set := func(a string) []string {
		t.Helper()
		return get[NodeResponse](w, "POST", path, SetIPRequest{a}).Node.IPAddresses
	}
	if got := strings.Join(set("100.64.0.77"), " "); got != "100.64.0.77 fd7a:115c:a1e0::1" {
		t.Errorf("addresses = %s", got)
	}
	if a := w.lastAudit(); a.Action != "node.addresses" || a.Target != "node:1" || !strings.Contains(string(a.Before), "100.64.0.1") || !strings.Contains(string(a.After), "100.64.0.77") {
		t.Errorf("audit = %s %s %s %s", a.Action, a.Target, a.Before, a.After)
	}
	if got := strings.Join(set("fd7a:115c:a1e0::4d"), " "); got != "100.64.0.77 fd7a:115c:a1e0::4d" {
		t.Errorf("addresses = %s", got)
	}
	if n := w.replica.Current().Node(id); n.IPv4.String() != "100.64.0.77" || n.IPv6.String() != "fd7a:115c:a1e0::4d" {
		t.Errorf("the snapshot has %v and %v", n.IPv4, n.IPv6)
	}
	audits := w.lastAudit().Number
	set("::ffff:100.64.0.77")
	if now := w.lastAudit().Number; now != audits {
		t.Errorf("the address that the node has wrote audit row %d", now)
	}
	w.refused(409, "another node has the address", "POST", path, SetIPRequest{w.replica.Current().Node(other).IPv4.String()})
	// 100.64.0.1 was given up a moment ago.
	get[NodeResponse](w, "POST", fmt.Sprintf("%s/node/%d/ip", own, other), SetIPRequest{"100.64.0.1"})
	for _, bad := range []string{"", "here", "100.64.0.9/32", "10.0.0.1", "100.64.0.0", "100.127.255.255", "100.100.100.100", "100.115.92.7", "fd7a:115c:a1e0::53", "fd7a:115c:a1e0::7%1", "2001:db8::1"} {
		w.refused(400, "body.ipAddress", "POST", path, SetIPRequest{bad})
	}
	w.refused(404, "no node has the id 99", "POST", own+"/node/99/ip", SetIPRequest{"100.64.0.5"})
}

func TestTaggedNodeLosesUserAndExpiry(t *testing.T) {
	w := newWorld(t)
	id := w.addNode("server", w.alice, nil)
	path := nodePath(id) + "/tags"
	n := get[NodeResponse](w, "POST", path, SetTagsRequest{Tags: []string{"tag:web", "tag:db", "tag:web"}}).Node
	if n.User.ID != TaggedUserID || n.Expiry != nil || strings.Join(n.Tags, " ") != "tag:db tag:web" {
		t.Errorf("tagged = %+v", n)
	}
	if rec := w.replica.Current().Node(id); rec.User != 0 {
		t.Errorf("the row's user = %d, want none", rec.User)
	}
	w.refused(400, "body.tags", "POST", path, SetTagsRequest{})
	w.refused(400, "tag:nobody has no owner", "POST", path, SetTagsRequest{Tags: []string{"tag:nobody"}})
	w.refused(400, "body.tags[0]", "POST", path, SetTagsRequest{Tags: []string{"web"}})
	w.refused(400, "body.tags[1]", "POST", path, SetTagsRequest{Tags: []string{"tag:a", "tag:ü"}})
}

func TestApproveRoutes(t *testing.T) {
	w := newWorld(t)
	id := w.addNode("router", w.alice, nil, "10.0.0.0/8", "192.168.1.0/24", "0.0.0.0/0")
	path := nodePath(id) + "/approve_routes"
	approve := func(routes ...string) *Node {
		return get[NodeResponse](w, "POST", path, ApproveRoutesRequest{Routes: routes}).Node
	}
	if n := approve("192.168.1.0/24", "10.0.0.0/8"); fmt.Sprint(n.ApprovedRoutes, n.AvailableRoutes, n.SubnetRoutes) !=
		"[10.0.0.0/8 192.168.1.0/24] [10.0.0.0/8 192.168.1.0/24 0.0.0.0/0] [10.0.0.0/8 192.168.1.0/24]" {
		t.Errorf("approved = %v, available = %v, subnet = %v", n.ApprovedRoutes, n.AvailableRoutes, n.SubnetRoutes)
	}
	if n := approve("::/0"); fmt.Sprint(n.ApprovedRoutes) != "[0.0.0.0/0 ::/0]" {
		t.Errorf("one exit route approves %v, want both families", n.ApprovedRoutes)
	}
	if n := approve(); len(n.ApprovedRoutes) != 0 {
		t.Errorf("approved = %v, want none", n.ApprovedRoutes)
	}
	w.refused(400, "does not advertise 172.16.0.0/12", "POST", path, ApproveRoutesRequest{Routes: []string{"172.16.0.0/12"}})
	for _, bad := range []string{"127.0.0.0/8", "169.254.169.254/32", "224.0.0.0/4", "100.64.0.0/10", "100.64.1.1/32", "64.0.0.0/2", "0.0.0.0/1", "::1/128", "fe80::/64", "fd7a:115c:a1e0::/48", "100.100.100.100/32"} {
		w.refused(400, "cannot be routed", "POST", path, ApproveRoutesRequest{Routes: []string{bad}})
	}
	w.refused(400, "did you mean 10.0.0.0/8", "POST", path, ApproveRoutesRequest{Routes: []string{"10.1.0.0/8"}})
}

// What is approved may be sent back while its router does not advertise it.
func TestApprovedRouteMayStayWhileNotAdvertised(t *testing.T) {
	w := newWorld(t)
	id := w.addNode("router", w.alice, nil, "10.0.0.0/8")
	path := nodePath(id) + "/approve_routes"
	get[NodeResponse](w, "POST", path, ApproveRoutesRequest{Routes: []string{"10.0.0.0/8"}})
	w.do(func(tx *db.Tx) error { return tx.PutNodeState(id, db.NodeState{}) })
	n := get[NodeResponse](w, "POST", path, ApproveRoutesRequest{Routes: []string{"10.0.0.0/8"}}).Node
	if fmt.Sprint(n.ApprovedRoutes, n.SubnetRoutes) != "[10.0.0.0/8] []" {
		t.Errorf("approved = %v, subnet = %v", n.ApprovedRoutes, n.SubnetRoutes)
	}
}

func TestNodeDelete(t *testing.T) {
	w := newWorld(t)
	id := w.addNode("gone", w.alice, nil)
	path := nodePath(id)
	get[EmptyResponse](w, "DELETE", path, nil)
	w.refused(404, "no node", "GET", path, nil)
	w.refused(404, "no node", "DELETE", path, nil)
	if a := w.lastAudit(); a.Action != "node.delete" || !strings.Contains(string(a.Before), `"gone"`) || len(a.After) > 0 && string(a.After) != "null" {
		t.Errorf("audit = %s %s %s", a.Action, a.Before, a.After)
	}
}

func TestBackfillIPs(t *testing.T) {
	w := newWorld(t)
	id := w.addNode("old", w.alice, nil)
	w.do(func(tx *db.Tx) error {
		n, err := tx.Node(id)
		if err != nil {
			return err
		}
		n.IPv6 = netip.Addr{}
		return tx.PutNode(n)
	})
	w.refused(400, "confirmed", "POST", "/api/v1/node/backfillips", nil)
	out := get[BackfillIPsResponse](w, "POST", "/api/v1/node/backfillips?confirmed=true", nil)
	if len(out.Changes) != 1 || !strings.Contains(out.Changes[0], "IPv6 address fd7a:115c:a1e0::") {
		t.Errorf("changes = %q", out.Changes)
	}
	if n := w.replica.Current().Node(id); !testPools.IPv6.Contains(n.IPv6) || n.IPv4.String() != "100.64.0.1" {
		t.Errorf("addresses = %v %v", n.IPv4, n.IPv6)
	}
	if rec := w.send("POST", "/api/v1/node/backfillips?confirmed=true", nil); strings.TrimSpace(rec.Body.String()) != `{"changes":[]}` {
		t.Errorf("second backfill = %s", rec.Body)
	}
}

// Each act of the interface leaves one audit row that names the key. The routes are those of the server: a new one has to be here.
func TestNoActWithoutAudit(t *testing.T) {
	w := newLoginWorld(t)
	id := w.addNode("host", w.alice, nil, "10.0.0.0/8")
	w.clock.Add(int64(time.Second))
	login, ssh, rejected, pretended := testAuthID[:31]+"A", testAuthID[:31]+"B", testAuthID[:31]+"C", testAuthID[:31]+"D"
	w.askAs(login, db.AuthRequestRegister)
	w.askAs(ssh, db.AuthRequestSSH)
	w.askAs(rejected, db.AuthRequestRegister)
	w.do(func(tx *db.Tx) error {
		n, err := tx.Node(id)
		if err != nil {
			return err
		}
		n.IPv6 = netip.Addr{} // for backfillips
		return tx.PutNode(n)
	})
	routes := newServer(w.config).routes()
	pending := map[string]bool{}
	err := chi.Walk(routes, func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		if method != http.MethodGet {
			pending[method+" "+route] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	// These only look.
	delete(pending, "POST /api/v1/policy/check")
	delete(pending, "POST /api/signalbox/v1/policy/diff")
	// These need nodes that answer: TestCallANode.
	delete(pending, "POST /api/signalbox/v1/node/{id}/ping")
	delete(pending, "POST /api/signalbox/v1/node/{id}/c2n")
	for _, act := range []struct{ method, path, body, action string }{
		{"POST", "/api/v1/user", `{"name":"bob"}`, "user.create"},
		{"POST", "/api/v1/user/2/rename/rob", "", "user.rename"},
		{"DELETE", "/api/v1/user/2", "", "user.delete"},
		{"POST", "/api/v1/preauthkey", `{"user":"1"}`, "authkey.create"},
		{"POST", "/api/v1/preauthkey/expire", `{"id":"1"}`, "authkey.expire"},
		{"DELETE", "/api/v1/preauthkey?id=1", "", "authkey.delete"},
		{"POST", "/api/v1/apikey", "{}", "apikey.create"},
		{"POST", "/api/v1/apikey/expire", `{"id":"2"}`, "apikey.expire"},
		{"DELETE", "/api/v1/apikey/x?id=2", "", "apikey.delete"},
		{"POST", "/api/v1/apikey", "{}", "apikey.create"},
		{"DELETE", "/api/v1/apikey?id=3", "", "apikey.delete"},
		{"POST", "/api/v1/node/backfillips?confirmed=true", "", "node.addresses"},
		{"POST", "/api/v1/node/1/rename/new", "", "node.rename"},
		{"POST", "/api/v1/node/1/approve_routes", `{"routes":["10.0.0.0/8"]}`, "node.routes"},
		{"POST", "/api/signalbox/v1/node/1/ip", `{"ipAddress":"100.64.5.5"}`, "node.addresses"},
		{"POST", "/api/v1/node/1/expire", "", "node.expire"},
		{"POST", "/api/v1/node/1/tags", `{"tags":["tag:a"]}`, "node.tags"},
		{"POST", "/api/v1/auth/register", `{"user":"alice","authId":"` + login + `"}`, "node.register"},
		{"POST", "/api/v1/auth/approve", `{"authId":"` + ssh + `"}`, "ssh.approve"},
		{"POST", "/api/v1/auth/reject", `{"authId":"` + rejected + `"}`, "register.reject"},
		{"POST", "/api/v1/debug/node", `{"user":"alice","key":"` + pretended + `","name":"test","routes":[]}`, "debug.node"},
		{"POST", "/api/v1/node/register?user=alice&key=" + pretended, "", "node.register"},
		{"PUT", "/api/v1/policy", `{"policy":"{}"}`, "policy.set"},
		{"POST", "/api/signalbox/v1/policy/versions/1/rollback", "", "policy.rollback"},
		{"DELETE", nodePath(id), "", "node.delete"},
	} {
		var before int64
		if a := w.lastAudit(); a != nil {
			before = a.Number
		}
		get[map[string]any](w, act.method, act.path, act.body)
		a := w.lastAudit()
		if a == nil || a.Number != before+1 || a.Action != act.action || a.Actor.Kind != "apikey" || a.Actor.KeyID == "" || a.Actor.Source == "" {
			t.Errorf("%s %s: audit row after %d: %+v, want %s", act.method, act.path, before, a, act.action)
		}
		match := chi.NewRouteContext()
		path, _, _ := strings.Cut(act.path, "?")
		if !routes.Match(match, act.method, path) {
			t.Fatalf("%s %s: no such route", act.method, path)
		}
		delete(pending, act.method+" "+match.RoutePattern())
	}
	for route := range pending {
		t.Errorf("%s: no act here shows that it is audited", route)
	}
	err = w.store.View(context.Background(), func(r *db.Reader) error {
		_, err := r.In(w.tailnet).VerifyAudit()
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
