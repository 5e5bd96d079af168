package control_test

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// witness is a peer of a hostile node with two ways to see that all is well.
type witness struct {
	g      *rig
	stream *controltest.Stream
	honest *controltest.Client
	reader *controltest.Client
}

func (g *rig) witness() *witness {
	g.Helper()
	w := &witness{g: g, reader: g.join("witness"), honest: g.join("honest")}
	w.stream = w.reader.Poll()
	return w
}

// check holds that news still reaches the witness, on its open stream and in a fresh map.
func (w *witness) check(t *testing.T) {
	t.Helper()
	w.honest.HomeDERP++
	w.honest.Report()
	want := w.honest.HomeDERP
	news := func(v *controltest.View) bool { return v.Peer("honest") != nil && v.Peer("honest").HomeDERP == want }
	w.stream.Wait("news of an honest peer", news)
	fresh, status := w.reader.Stream(func(r *tailcfg.MapRequest) { r.ReadOnly = true })
	if fresh == nil {
		t.Fatalf("status %d", status)
	}
	fresh.Wait("a whole map", news)
	fresh.Close()
}

func TestHostileHostNames(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	w := g.witness()
	names := []string{
		"", " ", ".", "-", strings.Repeat("h", 255), strings.Repeat("h", 50_000), strings.Repeat("日", 200), "日本語", "münchen", "\x00", "a\x00b", "a\nb\r\n", "\x1b[31mred",
		"\u202eevil", "\u2028", "<script>alert(1)</script>", "'; DROP TABLE nodes; --", "../../etc/passwd", "a.b.c.d", "witness", "WITNESS", "honest", "localhost", "wpad",
		"isatap", "reserved-label", "xn--80ak6aa92e", "*", "%00", "100.64.0.1", "::1", strings.Repeat("-", 70), strings.Repeat("a-", 50),
	}
	taken := map[string]bool{"localhost": true, "wpad": true, "isatap": true, "reserved-label": true, "witness": true, "honest": true}
	attacker := g.join("attacker")
	seen := map[string]int{}
	for i, name := range names {
		// By registration, and by report.
		c := g.NewClient(name).Join(g.key)
		attacker.Info.Hostname = name
		attacker.Report()
		for _, id := range []tailcfg.NodeID{c.ID(), attacker.ID()} {
			g.WaitNode(id, "the name that was sent", func(n *tailnet.Node) bool { return n != nil })
			n := g.Replica.Current().Node(id)
			l := n.GivenName
			if taken[l] || l == "" || len(l) > 63 || strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || len(n.Hostname) > 255 {
				t.Errorf("name %d, %.40q, became %q (%d bytes are kept)", i, name, l, len(n.Hostname))
			}
		}
		seen[g.Replica.Current().Node(c.ID()).GivenName]++
		w.check(t)
	}
	for name, n := range seen {
		if n > 1 {
			t.Errorf("%d nodes are named %s", n, name)
		}
	}
	w.stream.Look(func(v *controltest.View) {
		if v.Peer("honest").ID != w.honest.ID() || len(v.Peers) != len(names)+2 {
			t.Errorf("%d peers; honest is %d", len(v.Peers), v.Peer("honest").ID)
		}
	})
}

// The name of an extra record is nobody's, also when the record came while the server was running.
func TestHostileNodeCannotTakeTheNameOfARecord(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	g.Update(func(tx *db.Tx) error {
		_, err := tx.PutSetting(tailnet.SettingExtraRecords, []byte(`[{"Name": "Grafana.mesh.test.", "Value": "100.64.9.9"}, {"Name": "wiki.elsewhere.test", "Value": "100.64.9.8"}]`))
		return err
	})
	joined, reporter := g.join("grafana"), g.join("reporter")
	reporter.Info.Hostname = "grafana"
	reporter.Report()
	reporter.Close()
	again := g.join("again")
	again.Rekey()
	again.Info.Hostname = "grafana"
	again.Join(g.key)
	for what, c := range map[string]*controltest.Client{"registration": joined, "report": reporter, "registration again": again} {
		g.WaitNode(c.ID(), "the name that was sent", func(n *tailnet.Node) bool { return n.Hostname == "grafana" })
		if n := g.Replica.Current().Node(c.ID()); !strings.HasPrefix(n.GivenName, "grafana-") {
			t.Errorf("%s: a node is named %q", what, n.GivenName)
		}
	}
	wiki := g.join("wiki")
	if n := g.Replica.Current().Node(wiki.ID()); n.GivenName != "wiki" {
		t.Errorf("a record elsewhere reserved a name: %q", n.GivenName)
	}
}

func TestHostileHostinfoCannotHurtPeers(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	w := g.witness()
	attacker := g.join("attacker")
	many := 10_000
	for name, change := range map[string]func(*tailcfg.MapRequest){
		"10,000 routes": func(r *tailcfg.MapRequest) {
			for i := range many {
				r.Hostinfo.RoutableIPs = append(r.Hostinfo.RoutableIPs, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 1}), 24))
			}
		},
		"10,000 services": func(r *tailcfg.MapRequest) {
			for i := range many {
				r.Hostinfo.Services = append(r.Hostinfo.Services, tailcfg.Service{Proto: tailcfg.PeerAPI4, Port: uint16(i), Description: "d"})
			}
		},
		"10,000 tags": func(r *tailcfg.MapRequest) {
			for i := range many {
				r.Hostinfo.RequestTags = append(r.Hostinfo.RequestTags, fmt.Sprintf("tag:x%d", i))
			}
		},
		"10,000 endpoints": func(r *tailcfg.MapRequest) {
			for i := range many {
				r.Endpoints = append(r.Endpoints, netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}), 1))
			}
		},
		"giant strings": func(r *tailcfg.MapRequest) {
			s := strings.Repeat("\u0000\ufffdä", 20_000)
			h := r.Hostinfo
			h.OS, h.OSVersion, h.Package, h.DeviceModel, h.App, h.SSH_HostKeys = s, s, s, s, s, []string{s, s}
			h.Location = &tailcfg.Location{Country: s[:9000], City: s[:9000]}
		},
		"reserved routes": func(r *tailcfg.MapRequest) {
			for _, p := range []string{"0.0.0.0/8", "127.0.0.0/8", "100.64.0.0/10", "100.100.100.100/32", "169.254.169.254/32", "224.0.0.0/4", "fe80::/10", "fd7a:115c:a1e0::/48"} {
				r.Hostinfo.RoutableIPs = append(r.Hostinfo.RoutableIPs, netip.MustParsePrefix(p))
			}
		},
		"no Hostinfo":    func(r *tailcfg.MapRequest) { r.Hostinfo = nil },
		"empty Hostinfo": func(r *tailcfg.MapRequest) { r.Hostinfo = new(tailcfg.Hostinfo) },
	} {
		t.Run(name, func(t *testing.T) {
			req := attacker.MapRequest()
			change(req)
			status, text := attacker.Do("POST", "/machine/map", req)
			if status != http.StatusOK && status != http.StatusRequestEntityTooLarge {
				t.Errorf("status %d %q", status, text)
			}
			w.check(t)
			if h := g.Replica.Current().Node(attacker.ID()).State.Hostinfo; name == "reserved routes" && len(h.RoutableIPs) > 0 {
				t.Errorf("routes %v are kept", h.RoutableIPs)
			}
			w.stream.Look(func(v *controltest.View) {
				p := v.Peer("attacker")
				if p == nil {
					p = v.Peers[attacker.ID()]
				}
				if p == nil || len(p.Endpoints) > 32 || len(p.AllowedIPs) > 2 || p.Hostinfo.Services().Len() > 3 || len(p.Tags) > 0 {
					t.Errorf("the peer is %+v", p)
				}
			})
		})
	}
	// The same in registrations, by strangers too.
	for _, k := range []string{g.key, ""} {
		c := g.NewClient("bomb")
		for i := range 1500 {
			c.Info.RoutableIPs = append(c.Info.RoutableIPs, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24))
		}
		if resp, status := c.Register(c.RegisterRequest(k)); resp == nil || resp.Error != "" {
			t.Errorf("status %d %+v", status, resp)
		}
	}
	w.check(t)
}

func TestMalformedRequestsAreNeverServerErrors(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	w := g.witness()
	attacker, stranger := g.join("attacker"), g.NewClient("stranger")
	nk := attacker.Node.Public().String()
	deep := strings.Repeat(`{"Hostinfo":`, 20_000) + "1" + strings.Repeat("}", 20_000)
	bodies := map[string]struct {
		text string
		want int // of a map request of a node; 0 is any but a 5xx
	}{
		"empty":           {"", 400},
		"null":            {"null", 0},
		"not JSON":        {"hello", 400},
		"a list":          {"[]", 400},
		"a number":        {"1e999", 400},
		"truncated":       {`{"Version": 142, "NodeKey": "`, 400},
		"NUL":             {"\x00\x00", 400},
		"invalid UTF-8":   {"{\"Version\": 142, \"NodeKey\": \"" + nk + "\", \"OmitPeers\": true, \"Hostinfo\": {\"Hostname\": \"\xff\xfe\"}}", 0},
		"deep":            {deep, 400},
		"deep lists":      {strings.Repeat("[", 60_000), 400},
		"wrong types":     {`{"Version": "x", "NodeKey": 5, "Hostinfo": []}`, 400},
		"bad key":         {`{"Version": 142, "NodeKey": "nodekey:zz"}`, 400},
		"no key":          {`{"Version": 142}`, 0},
		"zero key":        {`{"Version": 142, "NodeKey": "nodekey:` + strings.Repeat("0", 64) + `"}`, 0},
		"no version":      {`{"NodeKey": "` + nk + `"}`, 0},
		"old version":     {`{"Version": 1, "NodeKey": "` + nk + `"}`, 0},
		"bad endpoints":   {`{"Version": 142, "NodeKey": "` + nk + `", "OmitPeers": true, "Endpoints": ["x", "1.2.3.4:99999"]}`, 400},
		"odd endpoints":   {`{"Version": 142, "NodeKey": "` + nk + `", "OmitPeers": true, "Endpoints": ["", "0.0.0.0:0"], "EndpointTypes": [1,2,3,4,5,99]}`, 0},
		"bad routes":      {`{"Version": 142, "NodeKey": "` + nk + `", "OmitPeers": true, "Hostinfo": {"RoutableIPs": ["1.2.3.4/99"]}}`, 400},
		"odd Hostinfo":    {`{"Version": 142, "NodeKey": "` + nk + `", "OmitPeers": true, "Hostinfo": {"RoutableIPs": ["", "10.0.0.1/8"], "NetInfo": {"PreferredDERP": -1, "DERPLatency": {"1": 1e300}}, "Services": [{}], "Location": {"Latitude": 1e300}}}`, 0},
		"null everywhere": {`{"Version": 142, "NodeKey": "` + nk + `", "OmitPeers": true, "Hostinfo": null, "Endpoints": null, "Auth": null, "Expiry": null}`, 0},
		"twice":           {`{"Version": 142, "NodeKey": "` + nk + `", "OmitPeers": true} {"Version": 1}`, 0},
		"odd expiry":      {`{"Version": 142, "NodeKey": "` + nk + `", "OmitPeers": true, "Expiry": "9999-12-31T23:59:59Z"}`, 0},
		"odd tags":        {`{"Version": 142, "NodeKey": "` + nk + `", "OmitPeers": true, "Hostinfo": {"RequestTags": ["", "tag:", "tag:\u0000", "x"]}}`, 0},
		"300 KiB":         {`{"Version": 142, "X": "` + strings.Repeat("x", 300<<10) + `"}`, 0},
		"2 MiB":           {`{"Version": 142, "X": "` + strings.Repeat("x", 2<<20) + `"}`, 413},
	}
	for name, body := range bodies {
		for _, path := range []string{"/machine/map", "/machine/register", "/machine/audit-log", "/machine/feature/query", "/machine/update-health"} {
			for who, c := range map[string]*controltest.Client{"node": attacker, "stranger": stranger} {
				status, text := c.Do("POST", path, body.text)
				if status >= 500 || len(text) > 300 && status != 200 {
					t.Errorf("%s, %s of a %s: status %d %.300q", name, path, who, status, text)
				}
				if who == "node" && body.want != 0 && status != body.want && path == "/machine/map" {
					t.Errorf("%s, %s: status %d, want %d", name, path, status, body.want)
				}
			}
		}
		w.check(t)
	}
	if status, _ := attacker.Do("POST", "/machine/register", `{"X": "`+strings.Repeat("x", 300<<10)+`"}`); status != http.StatusRequestEntityTooLarge {
		t.Errorf("register of 300 KiB: status %d", status)
	}
}

func TestFloodOfReportsIsSlowedNotLost(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	w := g.witness()
	attacker := g.join("attacker")
	attacker.Endpoints = nil
	for i := range 25 {
		attacker.HomeDERP = i + 1
		attacker.Report()
	}
	w.stream.Wait("the newest report", func(v *controltest.View) bool { return v.Peer("attacker").HomeDERP == 25 })
	w.check(t)
}

func TestRequestedTagsOfReportsGiveNothing(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	w := g.witness()
	a := g.NewClient("bobs").Join(g.AuthKey(db.AuthKey{User: g.User("bob")}))
	a.Info.RequestTags = []string{"tag:x"}
	a.Report()
	w.check(t)
	if n := g.Replica.Current().Node(a.ID()); len(n.Tags) > 0 || n.User != g.User("bob") {
		t.Errorf("the node has %v and user %d", n.Tags, n.User)
	}
}
