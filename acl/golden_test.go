package acl_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/signalbox-net/signalbox/acl/tailnetfile"
)

// goldenDir holds what the hosted service answered to policies; the cases are
// kept outside the repository.
const goldenDir = "../../shared/goldens/cases"

// baseline capabilities are given to every node by the server, not by the
// policy.
var baseline = map[string]bool{
	"https://tailscale.com/cap/file-sharing": true, "https://tailscale.com/cap/ssh": true,
	"https://tailscale.com/cap/tailnet-lock": true, "probe-udp-lifetime": true, "ssh-behavior-v1": true,
	"ssh-env-vars": true, "store-appc-routes": true, "tailnet-display-name": true,
	"https://tailscale.com/cap/is-owner": true,
}

type goldenCase struct {
	ID      string          `json:"id"`
	Policy  string          `json:"policy"`
	Tailnet json.RawMessage `json:"tailnet"`
	Expect  struct {
		Code        int                       `json:"code"`
		Error       string                    `json:"error"`
		ErrorScored *bool                     `json:"error_scored"`
		Nodes       map[string]map[string]any `json:"nodes"`
	} `json:"expect"`
}

func TestGoldens(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(goldenDir, "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Skipf("no cases in %s: the answers of the hosted service are not part of this repository", goldenDir)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var doc struct {
			Cases []goldenCase `json:"cases"`
		}
		if err := json.Unmarshal(b, &doc); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		for _, c := range doc.Cases {
			t.Run(c.ID, func(t *testing.T) { c.run(t) })
		}
	}
}

func (c *goldenCase) run(t *testing.T) {
	out, ok, err := tailnetfile.CompileJSON(c.Tailnet, []byte(c.Policy))
	if err != nil {
		t.Fatal(err)
	}
	if valid := c.Expect.Code == 200; valid != ok {
		t.Fatalf("accepted: got %v, want %v; output %s", ok, valid, out)
	}
	if !ok {
		c.rejected(t, out)
		return
	}
	var got struct {
		Nodes map[string]map[string]any `json:"nodes"`
	}
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	for host, want := range c.Expect.Nodes {
		for fact, value := range want {
			w, g := normalFact(fact, value, value), normalFact(fact, got.Nodes[host][fact], value)
			if !reflect.DeepEqual(g, w) {
				t.Errorf("%s %s:\ngot  %s\nwant %s\npolicy %s", host, fact, text(g), text(w), c.Policy)
			}
		}
	}
}

func (c *goldenCase) rejected(t *testing.T, out []byte) {
	var r tailnetfile.Rejection
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatal(err)
	}
	if (c.Expect.ErrorScored == nil || *c.Expect.ErrorScored) && r.Error != c.Expect.Error {
		t.Errorf("message: got %q, want %q; policy %s", r.Error, c.Expect.Error, c.Policy)
	}
	if len(r.Errors) == 0 {
		t.Errorf("no place is named; policy %s", c.Policy)
	}
	for _, e := range r.Errors {
		if e.Line < 1 || e.Column < 1 || e.Message == "" {
			t.Errorf("error without a place or message: %+v", e)
		}
	}
}

func text(v any) string {
	b, _ := json.Marshal(v)
	return string(b)
}

// normalFact removes what is not part of the contract: order where it has no
// meaning, null against an empty list, baseline capabilities.
func normalFact(fact string, v, want any) any {
	switch fact {
	case "packet_filter_rules":
		return each(v, normalRule)
	case "ssh_rules":
		return each(v, normalSSH)
	case "cap_map":
		return normalCaps(v)
	case "peers":
		out := map[string]any{}
		wanted, _ := want.(map[string]any)
		peers, _ := v.(map[string]any)
		for host, p := range peers {
			peer, _ := p.(map[string]any)
			o := map[string]any{"cap_map": normalCaps(peer["cap_map"])}
			w, _ := wanted[host].(map[string]any)
			if scored, ok := w["routes_scored"].(bool); !ok || scored {
				o["allowed_ips"], o["primary_routes"] = sorted(peer["allowed_ips"]), sorted(peer["primary_routes"])
			}
			out[host] = o
		}
		return out
	}
	return sorted(v)
}

func each(v any, f func(map[string]any) any) []any {
	out := []any{}
	list, _ := v.([]any)
	for _, x := range list {
		m, _ := x.(map[string]any)
		out = append(out, f(m))
	}
	return out
}

// sorted is a list as sorted JSON texts.
func sorted(v any) []string {
	out := []string{}
	list, _ := v.([]any)
	for _, x := range list {
		out = append(out, text(x))
	}
	slices.Sort(out)
	return out
}

func normalRule(r map[string]any) any {
	ports := each(r["DstPorts"], func(d map[string]any) any {
		return fmt.Sprint(d["IP"], " ", text(d["Ports"]))
	})
	slices.SortFunc(ports, func(a, b any) int { return strings.Compare(a.(string), b.(string)) })
	return map[string]any{
		"SrcIPs": sorted(r["SrcIPs"]), "IPProto": sorted(r["IPProto"]), "DstPorts": ports,
		"CapGrant": each(r["CapGrant"], func(g map[string]any) any {
			caps := map[string]any{}
			m, _ := g["CapMap"].(map[string]any)
			for name, values := range m {
				list, _ := values.([]any)
				caps[name] = append([]any{}, list...)
			}
			return map[string]any{"Dsts": sorted(g["Dsts"]), "CapMap": caps}
		}),
	}
}

func normalSSH(r map[string]any) any {
	action := map[string]any{}
	m, _ := r["action"].(map[string]any)
	for k, v := range m {
		if v != nil && v != false && v != "" && v != 0.0 {
			action[k] = v
		}
	}
	if url, ok := action["holdAndDelegate"].(string); ok {
		vars := 0
		for _, v := range []string{"$SRC_NODE_ID", "$DST_NODE_ID", "$LOCAL_USER"} {
			if strings.Contains(url, v) {
				vars++
			}
		}
		action["holdAndDelegate"] = vars
	}
	env, _ := r["acceptEnv"].([]any)
	return map[string]any{
		"principals": slices.Compact(sorted(r["principals"])), "sshUsers": r["sshUsers"],
		"action": action, "acceptEnv": append([]any{}, env...),
	}
}

func normalCaps(v any) map[string][]any {
	out := map[string][]any{}
	m, _ := v.(map[string]any)
	for name, values := range m {
		list, _ := values.([]any)
		if baseline[name] || name == "default-auto-update" && len(list) == 1 && list[0] == false {
			continue
		}
		out[name] = append([]any{}, list...)
	}
	return out
}
