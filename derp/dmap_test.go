package derp

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"tailscale.com/tailcfg"
)

const yamlMap = `# two own relays
regions:
  900:
    regionid: 900
    regioncode: home
    regionname: At home
    nodes:
      - name: 900a
        regionid: 900
        hostname: relay.example
        ipv4: 192.0.2.1
        ipv6: none
        stunport: 0
        stunonly: false
        derpport: 0
        canport80: true
  901:
    regionid: 901
    regioncode: away
    regionname: Away
    nodes:
      - name: 901a
        regionid: 901
        hostname: 192.0.2.2
        certname: sha256-raw:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff
        stunport: -1
        derpport: 8443
`

func TestMapFilesInBothForms(t *testing.T) {
	m, err := ParseMap([]byte(yamlMap))
	if err != nil {
		t.Fatal(err)
	}
	want := &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{
		900: {RegionID: 900, RegionCode: "home", RegionName: "At home", Nodes: []*tailcfg.DERPNode{{
			Name: "900a", RegionID: 900, HostName: "relay.example", IPv4: "192.0.2.1", IPv6: "none", CanPort80: true,
		}}},
		901: {RegionID: 901, RegionCode: "away", RegionName: "Away", Nodes: []*tailcfg.DERPNode{{
			Name: "901a", RegionID: 901, HostName: "192.0.2.2", STUNPort: -1, DERPPort: 8443,
			CertName: "sha256-raw:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff",
		}}},
	}}
	if !reflect.DeepEqual(m, want) {
		t.Errorf("YAML: got %s", asJSON(t, m))
	}
	for _, indent := range []string{"", "\t"} {
		b, err := json.MarshalIndent(want, "", indent)
		if err != nil {
			t.Fatal(err)
		}
		if m, err := ParseMap(b); err != nil || !reflect.DeepEqual(m, want) {
			t.Errorf("JSON indented by %q: %v, %v", indent, m, err)
		}
	}
	m, err = ParseMap([]byte("regions:\n  1: null\nomitDefaultRegions: true\nhomeparams:\n  regionscore:\n    900: 0.5\n"))
	if err != nil {
		t.Fatal(err)
	}
	if r, ok := m.Regions[1]; !ok || r != nil || !m.OmitDefaultRegions || m.HomeParams.RegionScore[900] != 0.5 {
		t.Errorf("got %s", asJSON(t, m))
	}
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestBadMapsSayWhy(t *testing.T) {
	for name, tc := range map[string]struct{ old, new, want string }{
		"key differs":      {"regionid: 900\n    regioncode", "regionid: 901\n    regioncode", "region 900: RegionID is 901"},
		"node differs":     {"regionid: 900\n        hostname", "regionid: 7\n        hostname", `node "900a": RegionID is 7`},
		"same name":        {"name: 901a", "name: 900a", `"900a" stands in regions 900 and 901`},
		"no name":          {"name: 901a", `name: ""`, "no Name"},
		"no host":          {"hostname: relay.example", `hostname: ""`, "host name is empty"},
		"host with port":   {"hostname: relay.example", "hostname: relay.example:443", "neither a DNS name"},
		"host with scheme": {"hostname: relay.example", "hostname: https://relay.example", "neither a DNS name"},
		"bad IPv4":         {"ipv4: 192.0.2.1", "ipv4: 2001:db8::1", "IPv4"},
		"bad IPv6":         {"ipv6: none", "ipv6: 192.0.2.1", "IPv6"},
		"STUN port":        {"stunport: -1", "stunport: -2", "STUNPort"},
		"relay port":       {"derpport: 8443", "derpport: 70000", "DERPPort"},
		"upper-case pin":   {"aabbccddeeff0011", "AABBCCDDEEFF0011", "lower-case hex"},
		"short pin":        {"sha256-raw:00", "sha256-raw:", "lower-case hex"},
		"misspelt key":     {"canport80: true", "canport8: true", "canport8"},
		"wrong type":       {"stunonly: false", "stunonly: maybe", "STUNOnly"},
		"region zero":      {"  900:\n", "  0:\n", "out of range"},
		"region twice":     {"  901:\n", "  900:\n", "already defined"},
		"both spellings":   {"  901:\n", "  900.0:\n", "900 stands twice"},
		"word as region":   {"  901:\n", "  abc:\n", "abc"},
		"not YAML":         {"regions:", "regions: [", "parse DERP map"},
	} {
		doc := strings.Replace(yamlMap, tc.old, tc.new, 1)
		if doc == yamlMap {
			t.Fatalf("%s: nothing replaced", name)
		}
		if _, err := ParseMap([]byte(doc)); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: err = %v, want %q", name, err, tc.want)
		}
	}
	for doc, want := range map[string]string{
		"":                                       "empty",
		"# only a comment":                       "empty",
		"[]":                                     "parse DERP map",
		"7":                                      "parse DERP map",
		`{"Regions":{}} {}`:                      "follows",
		"regions: {1: {regionid: 1, nodes: []}}": "no nodes",
		"regions: {1: {regionid: 1, nodes: [null]}}": "null",
		"homeparams: {regionscore: {1: -1}}":         "positive",
		"regions: {1: {regionid: 1, regioncode: \"a\\u0007\", nodes: [{name: a, regionid: 1, hostname: a}]}}": "control",
	} {
		if _, err := ParseMap([]byte(doc)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: err = %v, want %q", doc, err, want)
		}
	}
}

// region makes a region with one node per name.
func region(id int, names ...string) *tailcfg.DERPRegion {
	r := &tailcfg.DERPRegion{RegionID: id, RegionCode: fmt.Sprintf("r%d", id)}
	for _, n := range names {
		r.Nodes = append(r.Nodes, &tailcfg.DERPNode{Name: n, RegionID: id, HostName: "relay.example"})
	}
	return r
}

func mapOf(regions ...*tailcfg.DERPRegion) *tailcfg.DERPMap {
	m := &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{}}
	for _, r := range regions {
		m.Regions[r.RegionID] = r
	}
	return m
}

func TestLaterSourcesWin(t *testing.T) {
	own := region(999, "999a")
	url := mapOf(region(1, "1a"), region(2, "2a"), region(3, "3a"), region(999, "999x"), region(4, "999a"))
	first := mapOf(region(2, "2b"))
	second := mapOf(region(5, "5a"), region(2, "2c"))
	second.Regions[3] = nil
	m, dropped, err := merge([]layer{{"u", url, true}, {"f", first, false}, {"g", second, false}}, own)
	if err != nil {
		t.Fatal(err)
	}
	want := mapOf(own, url.Regions[1], second.Regions[2], second.Regions[5])
	if !reflect.DeepEqual(m, want) {
		t.Errorf("got %s", asJSON(t, m))
	}
	if len(dropped) != 2 {
		t.Errorf("dropped: %q, want the URL's 999 and 4", dropped)
	}
	if _, _, err := merge([]layer{{"f", mapOf(region(999, "x")), false}}, own); err == nil || !strings.Contains(err.Error(), "derp.server.region_id") {
		t.Errorf("file takes the embedded region: %v", err)
	}
	if _, _, err := merge([]layer{{"f", mapOf(region(7, "a")), false}, {"g", mapOf(region(8, "a")), false}}, own); err == nil || !strings.Contains(err.Error(), "f: node name") {
		t.Errorf("two files name a node alike: %v", err)
	}
}

// TestMergedMapsAreValid merges random maps with clashing numbers and names
// and checks that clients could use whatever comes out.
func TestMergedMapsAreValid(t *testing.T) {
	for seed := range uint64(2000) {
		rng := rand.New(rand.NewPCG(seed, 1))
		own := region(900+rng.IntN(4), "own")
		var layers []layer
		for i := range 1 + rng.IntN(4) {
			m := mapOf()
			used := map[string]bool{}
			for range rng.IntN(5) {
				id := 898 + rng.IntN(6)
				name := []string{"own", "a", "b", "c", "d", "e"}[rng.IntN(6)]
				if used[name] || m.Regions[id] != nil {
					continue
				}
				used[name] = true
				m.Regions[id] = region(id, name)
			}
			if err := validateMap(m); err != nil {
				t.Fatalf("seed %d: generator: %v", seed, err)
			}
			layers = append(layers, layer{name: fmt.Sprint(i), m: m, remote: true})
		}
		m, _, err := merge(layers, own)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if err := validateMap(m); err != nil {
			t.Fatalf("seed %d: %v in %s", seed, err, asJSON(t, m))
		}
		if m.Regions[own.RegionID] != own {
			t.Fatalf("seed %d: the embedded region was replaced", seed)
		}
	}
}

func FuzzParseMap(f *testing.F) {
	f.Add([]byte(yamlMap))
	f.Add([]byte(`{"Regions":{"1":{"RegionID":1,"Nodes":[{"Name":"1a","RegionID":1,"HostName":"a"}]}}}`))
	f.Add([]byte("regions: {1: null}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseMap(b)
		if err != nil {
			return
		}
		if err := validateMap(m); err != nil {
			t.Errorf("accepted, but: %v", err)
		}
		if _, err := json.Marshal(m); err != nil {
			t.Errorf("accepted, but cannot be sent: %v", err)
		}
	})
}
