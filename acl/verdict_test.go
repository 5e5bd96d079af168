package acl

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"tailscale.com/tailcfg"
)

// office is a small tailnet for worked examples: two people, a server, two
// routers of one subnet.
func office() *Tailnet {
	return &Tailnet{
		Domains: []string{"example.com"},
		Users: []User{
			{ID: 1, Name: "ann", Email: "ann@example.com", Role: "admin"},
			{ID: 2, Name: "bob", Email: "bob@example.com"},
			{ID: 3, Name: "newcomer", Email: "new@example.com"},
		},
		Nodes: []Node{
			{ID: 1, Hostname: "ann-pc", User: 1, IPv4: netip.MustParseAddr("100.64.0.1"), OS: "macOS"},
			{ID: 2, Hostname: "bob-pc", User: 2, IPv4: netip.MustParseAddr("100.64.0.2"), OS: "linux"},
			{ID: 3, Hostname: "srv", Tags: []string{"tag:srv"}, IPv4: netip.MustParseAddr("100.64.0.3")},
			router(4, "r1", "tag:r1"), router(5, "r2", "tag:r2"),
		},
	}
}

func router(id int, name, tag string) Node {
	lan := netip.MustParsePrefix("10.1.0.0/16")
	return Node{
		ID: tailcfg.NodeID(id), Hostname: name, Tags: []string{tag}, IPv4: netip.MustParseAddr(fmt.Sprint("100.64.0.", id)),
		RoutableIPs: []netip.Prefix{lan}, ApprovedRoutes: []netip.Prefix{lan},
	}
}

const officePolicy = `{
	"groups": {"group:ops": ["ann@example.com"]},
	"tagOwners": {"tag:srv": ["group:ops"], "tag:r1": [], "tag:r2": ["tag:srv"]},
	"postures": {"posture:linux": ["node:os == 'linux'"]},
	"acls": [
		{"action": "accept", "src": ["group:ops"], "dst": ["tag:srv:22,443"]},
		{"action": "accept", "src": ["autogroup:member"], "srcPosture": ["posture:linux"], "dst": ["tag:srv:80"]},
	],
	"grants": [
		{"src": ["ann@example.com"], "dst": ["10.1.0.0/16"], "ip": ["tcp:5432"], "via": ["tag:r2"]},
		{"src": ["bob@example.com"], "dst": ["10.1.0.0/16"], "ip": ["tcp:5432"]},
	],
	"ssh": [{"action": "check", "src": ["group:ops"], "dst": ["tag:srv"], "users": ["root"]}],
}`

func mustCompile(t *testing.T, tn *Tailnet, src string) (*Policy, *Access) {
	t.Helper()
	p, err := Parse([]byte(src))
	if err != nil {
		t.Fatal(err)
	}
	a, err := Compile(p, tn)
	if err != nil {
		t.Fatal(err)
	}
	return p, a
}

// ask explains FROM -> TO:PORT over TCP by names.
func ask(t *testing.T, a *Access, from, to string, port uint16) *Verdict {
	t.Helper()
	f, err := a.Endpoints(from)
	if err != nil {
		t.Fatal(err)
	}
	d, err := a.Endpoints(to)
	if err != nil {
		t.Fatal(err)
	}
	return a.Explain(Query{From: f[0], To: d[0], Port: port})
}

func TestExplainNamesTheDecidingRule(t *testing.T) {
	tn := office()
	_, a := mustCompile(t, tn, officePolicy)
	v := ask(t, a, "ann-pc", "srv", 443)
	if !v.Allowed || len(v.Rules) != 1 {
		t.Fatalf("got %+v", v)
	}
	r := v.Rules[0]
	if r.Line != 6 || r.Column != 3 || r.Path != "acls[0]" || !slices.Equal(r.Src, []string{"group:ops"}) || r.Dst != "tag:srv" || r.Ports != "22,443" ||
		r.Text != `{"action": "accept", "src": ["group:ops"], "dst": ["tag:srv:22,443"]}` {
		t.Errorf("rule: got %+v", r)
	}
	if len(v.SSH) != 1 || !v.SSH[0].Check || v.SSH[0].Line != 13 || !slices.Equal(v.SSH[0].Users, []string{"root"}) {
		t.Errorf("ssh: got %+v", v.SSH)
	}
}

// What a selector stands for is told where its name alone does not.
func TestExplainTellsExpansionsAndPostures(t *testing.T) {
	tn := office()
	_, a := mustCompile(t, tn, `{
	"groups": {"group:ops": ["ann@example.com", "bob@"]},
	"hosts": {"lan": "10.1.0.0/16"},
	"ipsets": {"ipset:db": ["10.1.2.0/24", "10.1.3.7"]},
	"tagOwners": {"tag:srv": []},
	"postures": {"posture:linux": ["node:os == 'linux'"], "posture:mac": ["node:os == 'macOS'"]},
	"acls": [
		{"action": "accept", "src": ["group:ops", "autogroup:admin", "user:*@example.com", "ann@example.com"], "dst": ["lan:1"]},
		{"action": "accept", "src": ["group:ops", "100.64.0.0/24"], "srcPosture": ["posture:linux", "posture:mac"], "dst": ["autogroup:tagged:2"]},
		{"action": "accept", "src": ["group:ops"], "dst": ["ipset:db:3"]},
		{"action": "accept", "src": ["group:ops"], "srcPosture": ["posture:linux"], "dst": ["tag:srv:4"]},
	]}`)
	for _, c := range []struct {
		from, to                string
		port                    uint16
		src, srcMeans, postures []string
		dst, dstMeans           string
	}{
		{"ann-pc", "10.1.9.9", 1, []string{"group:ops", "autogroup:admin", "user:*@example.com", "ann@example.com"},
			[]string{"ann@example.com", "ann@example.com", "ann@example.com", ""}, nil, "lan", "10.1.0.0/16"},
		{"bob-pc", "srv", 2, []string{"group:ops", "100.64.0.0/24"}, []string{"bob@", ""}, []string{"posture:linux"}, "autogroup:tagged", "tag:srv"},
		{"ann-pc", "10.1.2.200", 3, []string{"group:ops"}, []string{"ann@example.com"}, nil, "ipset:db", "10.1.2.0/24"},
	} {
		v := ask(t, a, c.from, c.to, c.port)
		if !v.Allowed || len(v.Rules) != 1 {
			t.Fatalf("%s -> %s:%d: got %+v", c.from, c.to, c.port, v)
		}
		r := v.Rules[0]
		if !slices.Equal(r.Src, c.src) || !slices.Equal(r.SrcMeans, c.srcMeans) || r.Dst != c.dst || r.DstMeans != c.dstMeans || !slices.Equal(r.Postures, c.postures) {
			t.Errorf("%s -> %s:%d: got %+v, want %+v", c.from, c.to, c.port, r, c)
		}
	}
	v := ask(t, a, "ann-pc", "srv", 4)
	if v.Allowed || len(v.Near) < 2 || v.Near[1].Dst != "tag:srv" || !slices.Equal(v.Near[1].SrcMeans, []string{"ann@example.com"}) {
		t.Errorf("denied: got %+v", v.Near)
	}
}

func TestExplainNamesWhatIsMissing(t *testing.T) {
	tn := office()
	_, a := mustCompile(t, tn, officePolicy)
	for _, c := range []struct {
		from, to string
		port     uint16
		line     int
		fails    string
	}{
		{"ann-pc", "srv", 25, 6, "tcp port 25 is not among the ports 22,443"},
		{"bob-pc", "srv", 22, 6, "the source bob-pc (100.64.0.2, bob@example.com) is not in src [group:ops]"},
		{"ann-pc", "srv", 80, 6, "tcp port 80 is not among the ports 22,443"},
		{"bob-pc", "10.1.2.3", 22, 11, "tcp port 22 is not among the ports tcp:5432"},
	} {
		v := ask(t, a, c.from, c.to, c.port)
		if v.Allowed || len(v.Near) == 0 {
			t.Errorf("%s -> %s:%d: got %+v", c.from, c.to, c.port, v)
			continue
		}
		if n := v.Near[0]; n.Line != c.line || !slices.Equal(n.Fails, []string{c.fails}) {
			t.Errorf("%s -> %s:%d: nearest is line %d, %q; want line %d, %q", c.from, c.to, c.port, n.Line, n.Fails, c.line, c.fails)
		}
	}
	v := ask(t, a, "ann-pc", "srv", 80)
	want := `posture:linux needs node:os == 'linux', and node:os is "macOS"`
	if !slices.ContainsFunc(v.Near, func(n NearMiss) bool { return slices.Equal(n.Fails, []string{want}) }) {
		t.Errorf("posture: got %+v, want %q", v.Near, want)
	}
}

func TestExplainFollowsRoutesAndVia(t *testing.T) {
	tn := office()
	_, a := mustCompile(t, tn, officePolicy)
	for from, receiver := range map[string]string{"ann-pc": "r2", "bob-pc": "r1"} {
		v := ask(t, a, from, "10.1.2.3", 5432)
		if !v.Allowed || tn.Nodes[v.Receiver].Hostname != receiver || v.Route.String() != "10.1.0.0/16" || v.Via != (from == "ann-pc") {
			t.Errorf("%s: got %+v", from, v)
		}
	}
	if v := ask(t, a, "srv", "10.1.2.3", 5432); v.Allowed || !strings.Contains(v.Reason, "no router offers a route") {
		t.Errorf("srv: got %+v", v)
	}
	if v := ask(t, a, "ann-pc", "224.0.0.1", 1); v.Allowed || !strings.Contains(v.Reason, "multicast") {
		t.Errorf("multicast: got %+v", v)
	}
}

func TestReverseQuestions(t *testing.T) {
	tn := office()
	_, a := mustCompile(t, tn, officePolicy)
	render := func(list []Opening) []string {
		var out []string
		for _, o := range list {
			name := o.Range
			if o.Slot >= 0 {
				name = tn.Nodes[o.Slot].Hostname
			}
			out = append(out, fmt.Sprint(name, " ", o.Ports, " ", o.Lines))
		}
		slices.Sort(out)
		return out
	}
	ann, _ := a.Endpoints("ann-pc")
	if got, want := render(a.ReachableFrom(ann[0])), []string{"10.1.0.0/16 [tcp:5432] [10]", "srv [22,443] [6]"}; !slices.Equal(got, want) {
		t.Errorf("reachable: got %q, want %q", got, want)
	}
	srv, _ := a.Endpoints("srv")
	if got, want := render(a.WhoReaches(srv[0])), []string{"ann-pc [22,443] [6]", "bob-pc [80] [7]"}; !slices.Equal(got, want) {
		t.Errorf("who reaches: got %q, want %q", got, want)
	}
	lan, _ := a.Endpoints("10.1.9.9")
	if got, want := render(a.WhoReaches(lan[0])), []string{"ann-pc [tcp:5432] [10]", "bob-pc [tcp:5432] [11]"}; !slices.Equal(got, want) {
		t.Errorf("who reaches the subnet: got %q, want %q", got, want)
	}
}

func TestEndpointsAreSingle(t *testing.T) {
	tn := office()
	tn.Nodes[0].FQDN = "ann-pc.mesh.example.com."
	_, a := mustCompile(t, tn, `{
	"groups": {"group:ops": ["ann@example.com"]}, "hosts": {"lan": "10.1.0.0/16", "db": "10.1.2.3", "one": "10.1.2.4/32"},
	"tagOwners": {"tag:srv": [], "tag:none": []}, "ipsets": {"ipset:x": ["10.1.0.0/16"]}, "acls": []}`)
	for name, want := range map[string]int{"ann-pc.mesh.example.com": 0, "Ann-PC.mesh.example.com.": 0, "ann-pc": 0, "db": -1, "one": -1} {
		if e, err := a.Endpoints(name); err != nil || e[0].Slot != want {
			t.Errorf("%s: got %v, %v", name, e, err)
		}
	}
	for name, want := range map[string]string{
		"lan": `"lan" is 10.1.0.0/16: name one address`, "10.1.0.0/16": `"10.1.0.0/16" is a range: name one address`,
		"ann@example.com": `"ann@example.com" is not one device: name ann-pc`, "bob@": `"bob@" is not one device: name bob-pc`,
		"newcomer@": `"newcomer@" is not one device, and no device is meant`, "tag:srv": `"tag:srv" is not one device: name srv`,
		"tag:none": `"tag:none" is not one device, and no device is meant`, "group:ops": `"group:ops" is not one device: name ann-pc`,
		"autogroup:tagged": `"autogroup:tagged" is not one device: name one of srv, r1, r2`, "ipset:x": `"ipset:x" is not one device: name one address`,
		"ann-pc.other.example.com": "no node, host", "ghost@example.com": "no node, host", "tag:ghost": "no node, host",
	} {
		if _, err := a.Endpoints(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", name, err, want)
		}
	}
}

func TestEndpointsRefuseAmbiguousNames(t *testing.T) {
	tn := office()
	tn.Nodes[1].Hostname = "ann-pc"
	_, a := mustCompile(t, tn, officePolicy)
	if _, err := a.Endpoints("ann-pc"); err == nil || !strings.Contains(err.Error(), "names 2 nodes") {
		t.Errorf("got %v", err)
	}
	if _, err := a.Endpoints("nothing"); err == nil {
		t.Error("an unknown name was found")
	}
	if e, err := a.Endpoints("2"); err != nil || e[0].Slot != 1 {
		t.Errorf("by id: got %v, %v", e, err)
	}
}

func TestMayTag(t *testing.T) {
	tn := office()
	p, _ := mustCompile(t, tn, officePolicy)
	for _, c := range []struct {
		user tailcfg.UserID
		tags []string
		want string
		may  bool
	}{
		{1, nil, "tag:srv", true},                  // by group
		{2, nil, "tag:srv", false},                 //
		{1, nil, "tag:r1", true},                   // no owners: admins
		{2, nil, "tag:r1", false},                  //
		{1, nil, "tag:r2", true},                   // owner of the owning tag
		{0, []string{"tag:srv"}, "tag:r2", true},   // holder of the owning tag
		{0, []string{"tag:r2"}, "tag:srv", false},  //
		{0, []string{"tag:srv"}, "tag:srv", false}, // holding a tag is not owning it
		{1, nil, "tag:undefined", false},
		{99, nil, "tag:srv", false},
	} {
		if got := p.MayTag(tn, c.user, c.tags, c.want); got != c.may {
			t.Errorf("user %d with %v wants %s: got %v", c.user, c.tags, c.want, got)
		}
	}
	cycle, _ := mustCompile(t, tn, `{"acls": [], "tagOwners": {"tag:a": ["tag:b"], "tag:b": ["tag:a"]}}`)
	if cycle.MayTag(tn, 1, nil, "tag:a") {
		t.Error("a cycle of owners owns itself")
	}
}

func TestIPPools(t *testing.T) {
	tn := office()
	p, _ := mustCompile(t, tn, `{"acls": [], "nodeAttrs": [{"target": ["autogroup:admin"], "ipPool": ["100.81.0.0/16"]}]}`)
	if got := p.IPPools(tn, &Node{User: 1}); len(got) != 1 || got[0].String() != "100.81.0.0/16" {
		t.Errorf("admin: got %v", got)
	}
	if got := p.IPPools(tn, &Node{User: 2}); len(got) != 0 {
		t.Errorf("member: got %v", got)
	}
}

func TestDefaultLetsPeopleReachTheirOwnDevices(t *testing.T) {
	tn := office()
	tn.Nodes = append(tn.Nodes, Node{ID: 9, Hostname: "ann-phone", User: 1, IPv4: netip.MustParseAddr("100.64.0.9")})
	p, a := mustCompile(t, tn, string(Default()))
	for slot := range tn.Nodes {
		for peer := range tn.Nodes {
			if slot == peer {
				continue
			}
			want := !tn.Nodes[slot].Tagged() && !tn.Nodes[peer].Tagged() && tn.Nodes[slot].User == tn.Nodes[peer].User
			if got := a.Row(slot).Has(peer); got != want {
				t.Errorf("%s sees %s: got %v", tn.Nodes[slot].Hostname, tn.Nodes[peer].Hostname, got)
			}
		}
	}
	if w := Warnings(p, tn); len(w) > 0 {
		t.Errorf("the default policy has warnings: %+v", w)
	}
	if f, err := Format(Default()); err != nil || string(f) != string(Default()) {
		t.Errorf("the default policy is not in standard layout (%v):\n%s", err, f)
	}
}

// TestChecksImagineMissingDevices: a policy can be tested before its people
// have joined, and with posture attributes that no device has.
func TestChecksImagineMissingDevices(t *testing.T) {
	tn := office()
	p, a := mustCompile(t, tn, `{
		"groups": {"group:new": ["new@example.com"]},
		"tagOwners": {"tag:srv": [], "tag:later": []},
		"postures": {"posture:linux": ["node:os == 'linux'"]},
		"acls": [
			{"action": "accept", "src": ["group:new"], "dst": ["tag:later:443"]},
			{"action": "accept", "src": ["ann@example.com"], "srcPosture": ["posture:linux"], "dst": ["tag:srv:80"]},
		],
		"tests": [
			{"src": "new@example.com", "accept": ["tag:later:443"], "deny": ["tag:later:80", "tag:srv:443"]},
			{"src": "group:new", "accept": ["tag:later:443"]},
			{"src": "ann@example.com", "deny": ["tag:srv:80"]},
			{"src": "ann@example.com", "srcPostureAttrs": {"node:os": "linux"}, "accept": ["tag:srv:80"]},
			{"src": "ann@example.com", "srcPostureAttrs": {"node:os": "windows"}, "deny": ["tag:srv:80"]},
			{"src": "tag:later", "deny": ["tag:srv:80"]},
		],
	}`)
	if f := Check(p, tn, a); len(f) > 0 {
		t.Errorf("got failures %+v", f)
	}
	p, a = mustCompile(t, tn, `{"tagOwners": {"tag:later": []}, "acls": [], "tests": [
		{"src": "new@example.com", "accept": ["tag:later:443"]}]}`)
	if f := Check(p, tn, a); len(f) != 1 || f[0].Line != 2 || f[0].Path != "tests[0].accept[0]" {
		t.Errorf("got failures %+v, want one at tests[0].accept[0]", f)
	}
}

func TestStoredPrimaryWinsWhileItServes(t *testing.T) {
	lan := netip.MustParsePrefix("10.1.0.0/16")
	for _, c := range []struct {
		name string
		edit func(tn *Tailnet)
		want tailcfg.NodeID
	}{
		{"lowest id by default", func(tn *Tailnet) {}, 4},
		{"stored", func(tn *Tailnet) { tn.Primaries = map[netip.Prefix]tailcfg.NodeID{lan: 5} }, 5},
		{"stored but not approved", func(tn *Tailnet) {
			tn.Primaries = map[netip.Prefix]tailcfg.NodeID{lan: 5}
			tn.Nodes[4].ApprovedRoutes = nil
		}, 4},
		{"expired", func(tn *Tailnet) { tn.Nodes[3].Expired = true }, 5},
		{"all expired", func(tn *Tailnet) { tn.Nodes[3].Expired, tn.Nodes[4].Expired = true, true }, 0},
	} {
		tn := office()
		c.edit(tn)
		_, a := mustCompile(t, tn, officePolicy)
		if got := a.Primaries()[lan]; got != c.want {
			t.Errorf("%s: got node %d, want %d", c.name, got, c.want)
		}
	}
}
