// Package signalbox_test states which package may import which, and why.
package signalbox_test

import (
	"encoding/json"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const module = "github.com/signalbox-net/signalbox/"

// allowed lists for each part of the tree the parts of ours that it may import. A part stands for itself and all below it that has no line
// of its own.
var allowed = map[string][]string{
	"acl":                 {"acl"},                                                                                                // pure: a policy means the same everywhere
	"db":                  {"db"},                                                                                                 // durable truth, knows nobody
	"derp":                {"derp"},                                                                                               // a relay that knows no tailnet
	"control/limit":       {},                                                                                                     // counts keys, whatever they are
	"control/h2":          {},                                                                                                     // HTTP/2, whoever speaks it
	"control/noise":       {"control/limit", "control/h2"},                                                                        // a shell around any handler
	"control/tailnet":     {"acl", "db"},                                                                                          // the heart
	"control/netmap":      {"control/tailnet", "acl"},                                                                             // bytes from snapshots: never rows
	"control/register":    {"control/tailnet", "control/noise", "control/limit", "control/netmap", "acl", "db"},                   // one of the protocol's parts
	"control/poll":        {"control/tailnet", "control/noise", "control/limit", "control/netmap", "acl", "db"},                   // another
	"control/sshaction":   {"control/tailnet", "control/noise", "control/register", "acl", "db"},                                  // answers by the policy and the rows
	"control/c2n":         {"control/tailnet", "control/noise", "db"},                                                             // hands words to streams, touches none
	"control/controltest": {"control", "acl", "db"},                                                                               // for tests
	"control":             {"control", "acl", "db"},                                                                               // joins them
	"web":                 {"web", "control", "control/tailnet", "control/register", "control/c2n", "control/limit", "acl", "db"}, // parse, one call, render
	"cmd":                 {"cmd", "web", "control", "derp", "db", "acl"},                                                         // wires
	"integration":         {"integration"},                                                                                        // drives the binary from outside
}

// forbidden names foreign packages that must not come with a part, however far down, and why.
var forbidden = []struct{ part, dep, why string }{
	{"acl", "net/http", "the compiler does no I/O"},
	{"acl", "gorm.io/gorm", "the compiler does no I/O"},
	{"control/netmap", "net/http", "encoding knows no connection"},
	{"control/noise", "gorm.io/gorm", "the shell knows no tailnet"},
	{"derp", "gorm.io/gorm", "the relay knows no tailnet"},
	{"web", "github.com/signalbox-net/signalbox/control/poll", "pages and APIs never touch a client's stream"},
}

// onlyDB are the packages that nobody but db imports: rows and statements stay in there. Those who read db's records have them among their
// dependencies all the same.
var onlyDB = []string{"gorm.io/", "github.com/glebarez/", "github.com/jackc/"}

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
	Dir        string
	GoFiles    []string
}

func list(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,Deps,Dir,GoFiles", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); d.More(); {
		var p pkg
		if err := d.Decode(&p); err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
	return pkgs
}

// part is the longest line of the table that path lies under.
func part(path string) string {
	best := ""
	for p := range allowed {
		if (path == p || strings.HasPrefix(path, p+"/")) && len(p) > len(best) {
			best = p
		}
	}
	return best
}

func TestImportsGoOneWay(t *testing.T) {
	for _, p := range list(t) {
		path, ok := strings.CutPrefix(p.ImportPath, module)
		if !ok {
			continue
		}
		own := part(path)
		if own == "" {
			t.Errorf("%s lies in no part of the tree that the table knows", path)
			continue
		}
		for _, imp := range p.Imports {
			dep, ok := strings.CutPrefix(imp, module)
			if !ok || part(dep) == own {
				continue
			}
			if !permits(own, dep) {
				t.Errorf("%s imports %s: %s may import only %v", path, dep, own, allowed[own])
			}
		}
	}
}

func permits(own, dep string) bool {
	for _, a := range allowed[own] {
		if a == dep || strings.HasPrefix(dep, a+"/") && (a != "control" || own == "cmd" || own == "control" || own == "control/controltest") {
			return true
		}
	}
	return false
}

func TestForbiddenDependencies(t *testing.T) {
	for _, p := range list(t) {
		path := strings.TrimPrefix(p.ImportPath, module)
		for _, f := range forbidden {
			if path != f.part && !strings.HasPrefix(path, f.part+"/") {
				continue
			}
			for _, d := range p.Deps {
				if strings.HasPrefix(d, f.dep) {
					t.Errorf("%s depends on %s: %s", path, d, f.why)
				}
			}
		}
	}
}

func TestOnlyDBTalksToDatabases(t *testing.T) {
	found := 0
	for _, p := range list(t) {
		path := strings.TrimPrefix(p.ImportPath, module)
		if part(path) == "integration" {
			continue // looks at databases from outside, to find what a crash left there
		}
		for _, imp := range p.Imports {
			for _, driver := range onlyDB {
				switch {
				case !strings.HasPrefix(imp, driver):
				case part(path) == "db":
					found++
				default:
					t.Errorf("%s imports %s: rows and statements stay in db", path, imp)
				}
			}
		}
	}
	if found == 0 {
		t.Error("db imports none of them: the names are out of date")
	}
}

// clockless are the packages whose results depend on their arguments alone.
var clockless = []string{"acl", "control/netmap"}

func TestPurePackagesHaveNoClock(t *testing.T) {
	banned := []string{"time.Now", "time.Since", "time.Until", "time.Sleep", "time.After", "time.AfterFunc", "time.Tick", "time.NewTimer", "time.NewTicker"}
	for _, dir := range clockless {
		files, err := filepath.Glob(dir + "/*.go")
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: no files (%v)", dir, err)
		}
		for _, f := range files {
			if strings.HasSuffix(f, "_test.go") {
				continue
			}
			src, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, b := range banned {
				if strings.Contains(string(src), b+"(") {
					t.Errorf("%s uses %s", f, b)
				}
			}
		}
	}
}

func TestACLImportsNoIO(t *testing.T) {
	files, err := filepath.Glob("acl/*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if strings.HasSuffix(f, "_test.go") {
			continue
		}
		ast, err := parser.ParseFile(token.NewFileSet(), f, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, imp := range ast.Imports {
			switch path := strings.Trim(imp.Path.Value, `"`); path {
			case "os", "net", "net/http", "sync", "log", "log/slog", "sync/atomic":
				t.Errorf("%s imports %s: the compiler is pure", f, path)
			}
		}
	}
}
