package acl_test

import (
	"bytes"
	"flag"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"os"

	"github.com/rogpeppe/go-internal/txtar"
	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/acl/tailnetfile"
	"tailscale.com/tailcfg"
)

var update = flag.Bool("update", false, "write what the compiler says into the want files of testdata")

// TestCases runs testdata/*.txtar: a tailnet, a policy, and what the compiler
// is to make of it. Several policies may share the tailnet: NAME.policy is
// compared with NAME.want. Lines of want are described at dump.
func TestCases(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) { runCases(t, file) })
	}
}

func runCases(t *testing.T, file string) {
	ar, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	section := func(name string) int {
		return slices.IndexFunc(ar.Files, func(f txtar.File) bool { return f.Name == name })
	}
	i := section("tailnet.json")
	if i < 0 {
		t.Fatal("tailnet.json is missing")
	}
	doc, err := tailnetfile.Parse(ar.Files[i].Data)
	if err != nil {
		t.Fatal(err)
	}
	tn, err := doc.Tailnet()
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(ar.Files); i++ {
		name, ok := strings.CutSuffix(ar.Files[i].Name, ".policy")
		if !ok {
			continue
		}
		got := outcome(tn, ar.Files[i].Data)
		w := section(name + ".want")
		switch {
		case *update && w < 0:
			ar.Files = slices.Insert(ar.Files, i+1, txtar.File{Name: name + ".want", Data: []byte(got)})
		case *update:
			ar.Files[w].Data = []byte(got)
		case w < 0:
			t.Errorf("%s.want is missing", name)
		case !bytes.Equal(ar.Files[w].Data, []byte(got)):
			t.Errorf("%s:\ngot\n%s\nwant\n%s", name, got, ar.Files[w].Data)
		}
	}
	if *update {
		if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// outcome is the dump of the compiled policy, or its errors and failed tests
// as LINE:COLUMN PATH: MESSAGE.
func outcome(tn *acl.Tailnet, src []byte) string {
	var b strings.Builder
	x := acl.Examine(src, tn)
	for _, e := range x.Errors {
		fmt.Fprintf(&b, "error %d:%d %s: %s\n", e.Line, e.Column, e.Path, e.Message)
	}
	for _, e := range x.Failed {
		fmt.Fprintf(&b, "failed %d:%d %s: %s\n", e.Line, e.Column, e.Path, e.Message)
	}
	if b.Len() > 0 {
		return b.String()
	}
	a := x.Access
	for _, w := range acl.Warnings(x.Policy, tn) {
		fmt.Fprintf(&b, "warning %d:%d %s: %s\n", w.Line, w.Column, w.Path, w.Message)
	}
	for slot := range tn.Nodes {
		dump(&b, tn, a, slot)
	}
	return b.String()
}

// dump writes one node's view:
//
//	NODE
//		in SOURCES -> DESTINATIONS [proto N]     a filter rule
//		app SOURCES -> ADDRESSES CAP=VALUES      a capability rule
//		ssh ACTION SOURCES as USERS              an SSH rule
//		attr CAP=VALUES                          an own capability
//		self PREFIXES                            own allowed IPs, primary routes marked *
//		sees PEER[EXTRA PREFIXES]...             visible peers
//		approves ...                             auto-approved routes and services
func dump(b *strings.Builder, tn *acl.Tailnet, a *acl.Access, slot int) {
	fmt.Fprintf(b, "%s\n", tn.Nodes[slot].Hostname)
	for _, r := range a.Filter(slot).Rules {
		for _, g := range r.CapGrant {
			for _, name := range sortedNames(g.CapMap) {
				fmt.Fprintf(b, "\tapp %s -> %s %s=%s\n", strings.Join(r.SrcIPs, " "), join(g.Dsts), name, values(g.CapMap[tailcfg.PeerCapability(name)]))
			}
		}
		if len(r.DstPorts) == 0 {
			continue
		}
		fmt.Fprintf(b, "\tin %s ->", strings.Join(r.SrcIPs, " "))
		for _, d := range r.DstPorts {
			fmt.Fprintf(b, " %s:%d-%d", d.IP, d.Ports.First, d.Ports.Last)
		}
		if len(r.IPProto) > 0 {
			fmt.Fprintf(b, " proto %v", r.IPProto)
		}
		b.WriteString("\n")
	}
	for _, r := range a.SSH(slot).Rules {
		dumpSSH(b, &r)
	}
	for _, name := range sortedNames(a.Caps(slot).Map) {
		if name != "default-auto-update" {
			fmt.Fprintf(b, "\tattr %s=%s\n", name, values(a.Caps(slot).Map[tailcfg.NodeCapability(name)]))
		}
	}
	self := a.Self(slot)
	fmt.Fprint(b, "\tself")
	for _, p := range self.AllowedIPs {
		fmt.Fprintf(b, " %v", p)
		if slices.Contains(self.PrimaryRoutes, p) {
			b.WriteString("*")
		}
	}
	b.WriteString("\n")
	dumpPeers(b, tn, a, slot)
	if got := a.AutoApproves(slot); len(got) > 0 {
		fmt.Fprintf(b, "\tapproves %s\n", join(got))
	}
	if got := a.AutoApprovesServices(slot); len(got) > 0 {
		fmt.Fprintf(b, "\tapproves %s\n", strings.Join(got, " "))
	}
}

func dumpSSH(b *strings.Builder, r *acl.SSHRule) {
	action := "accept"
	if r.Check {
		action = fmt.Sprintf("check(%v)", r.CheckPeriod)
		if r.CheckAlways {
			action = "check(always)"
		}
	}
	fmt.Fprintf(b, "\tssh %s", action)
	for _, p := range r.Principals {
		fmt.Fprintf(b, " %s", p.NodeIP)
	}
	b.WriteString(" as")
	for _, u := range sortedNames(r.SSHUsers) {
		fmt.Fprintf(b, " %s=%s", u, r.SSHUsers[u])
	}
	if rec := r.Accepted.Recorders; len(rec) > 0 {
		fmt.Fprintf(b, " recorded by %s", join(rec))
		if r.Accepted.OnRecordingFailure != nil {
			b.WriteString(" or refused")
		}
	}
	b.WriteString("\n")
}

func dumpPeers(b *strings.Builder, tn *acl.Tailnet, a *acl.Access, slot int) {
	fmt.Fprint(b, "\tsees")
	views := a.Views(slot)
	for peer := range tn.Nodes {
		v := a.Base(peer)
		if i, ok := slices.BinarySearch(views.Slots, peer); ok {
			v = views.Peers[i]
		}
		if peer == slot || !a.Row(slot).Has(peer) {
			continue
		}
		fmt.Fprintf(b, " %s", tn.Nodes[peer].Hostname)
		base := a.Base(peer).AllowedIPs
		var extra []string
		for _, p := range v.AllowedIPs {
			if !slices.Contains(base, p) {
				extra = append(extra, p.String())
			}
		}
		for _, p := range base {
			if !slices.Contains(v.AllowedIPs, p) {
				extra = append(extra, "-"+p.String())
			}
		}
		if len(extra) > 0 {
			fmt.Fprintf(b, "[%s]", strings.Join(extra, " "))
		}
	}
	b.WriteString("\n")
}

func sortedNames[K ~string, V any](m map[K]V) []string {
	var out []string
	for k := range m {
		out = append(out, string(k))
	}
	slices.Sort(out)
	return out
}

func join[T fmt.Stringer](list []T) string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = v.String()
	}
	return strings.Join(out, " ")
}

func values(list []tailcfg.RawMessage) string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = string(v)
	}
	return "[" + strings.Join(out, ",") + "]"
}
