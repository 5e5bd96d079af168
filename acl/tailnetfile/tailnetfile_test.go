package tailnetfile

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

const sample = `{
	"future_member": {"ignored": true},
	"users": [{"id": 2, "name": "bob"}, {"id": 1, "name": "ann", "email": "ann@example.com", "role": "owner"}],
	"nodes": [
		{"id": 9, "hostname": "srv", "tags": ["tag:srv"], "ipv4": "100.64.0.9", "routable_ips": ["10.0.0.0/8"],
		 "approved_routes": ["10.0.0.0/8", "10.9.0.0/16"], "services": ["svc:web"], "online": false},
		{"id": 3, "hostname": "pc", "user": "ann", "ipv6": "fd7a:115c:a1e0::3", "attributes": {"custom:x": 1}},
		{"id": 4, "hostname": "by-id", "user": "2"}],
	"services": [{"name": "svc:web", "ipv4": "100.64.9.9"}],
	"primaries": [{"prefix": "10.0.0.0/8", "node": 9}],
	"settings": {"domains": ["example.com"], "https_enabled": true, "devices_auto_updates_on": true}
}`

func TestTailnetOfAFileWithoutFormat(t *testing.T) {
	f, err := Parse([]byte(sample))
	if err != nil {
		t.Fatal(err)
	}
	tn, err := f.Tailnet()
	if err != nil {
		t.Fatal(err)
	}
	if tn.Users[0].Name != "ann" || tn.Nodes[0].ID != 3 || tn.Nodes[2].ID != 9 {
		t.Errorf("not ascending by id: %+v %+v", tn.Users, tn.Nodes)
	}
	if tn.Nodes[0].User != 1 || tn.Nodes[1].User != 2 || tn.Nodes[2].User != 0 {
		t.Errorf("owners: %+v", tn.Nodes)
	}
	srv := tn.Nodes[2]
	if len(srv.ApprovedRoutes) != 1 || srv.ApprovedRoutes[0].String() != "10.0.0.0/8" {
		t.Errorf("an approved route counts while it is advertised: got %v", srv.ApprovedRoutes)
	}
	if !srv.Offline || tn.Nodes[0].Offline || !tn.AutoUpdates || !tn.HTTPS {
		t.Errorf("got %+v", tn)
	}
	if len(tn.Services) != 1 || len(tn.Services[0].Hosts) != 1 || tn.Services[0].Hosts[0] != 9 {
		t.Errorf("services: got %+v", tn.Services)
	}
}

func TestMarshalIsStable(t *testing.T) {
	f, err := Parse([]byte(sample))
	if err != nil {
		t.Fatal(err)
	}
	once, err := f.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse(once)
	if err != nil {
		t.Fatal(err)
	}
	twice, err := again.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(once, twice) {
		t.Errorf("got\n%s\nthen\n%s", once, twice)
	}
	if !strings.Contains(string(once), `"format": "signalbox-tailnet"`) || strings.Index(string(once), `"pc"`) > strings.Index(string(once), `"srv"`) {
		t.Errorf("got\n%s", once)
	}
}

func TestBadFilesAreRefused(t *testing.T) {
	for src, want := range map[string]string{
		`{`:                           "parse tailnet file",
		`{"format": "other"}`:         `format "other"`,
		`{"version": 2}`:              "newer",
		`{"nodes": [{"hostname":1}]}`: "parse tailnet file",
		`{"nodes": [{"id": 1, "hostname": "a", "user": "nobody"}]}`:                                                 "no user",
		`{"nodes": [{"id": 0, "hostname": "a", "tags": ["tag:x"]}]}`:                                                "positive",
		`{"nodes": [{"id": 1, "hostname": "a", "tags": ["tag:x"], "ipv4": "fd00::1"}]}`:                             "no IPv4 address",
		`{"nodes": [{"id": 1, "hostname": "a", "tags": ["tag:x"]}, {"id": 1, "hostname": "b", "tags": ["tag:x"]}]}`: "two nodes",
	} {
		_, _, err := CompileJSON([]byte(src), []byte("{}"))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", src, err, want)
		}
	}
}

// TestRejectionNamesPlaces: the bare message is the decisive one, and every
// fault has a place.
func TestRejectionNamesPlaces(t *testing.T) {
	out, ok, err := CompileJSON([]byte(`{"nodes": []}`), []byte("{\"acls\": [\n\t{\"action\": \"accept\", \"src\": [\"tag:a\", \"tag:b\"], \"dst\": [\"*:*\"]}]}"))
	if err != nil || ok {
		t.Fatalf("got ok %v, err %v", ok, err)
	}
	var r Rejection
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatal(err)
	}
	want := []Fault{
		{2, 31, "acls[0].src[0]", `src=tag not found: "tag:a"`},
		{2, 40, "acls[0].src[1]", `src=tag not found: "tag:b"`},
	}
	if r.Error != want[0].Message || len(r.Errors) != 2 || r.Errors[0] != want[0] || r.Errors[1] != want[1] {
		t.Errorf("got %s", out)
	}
}
