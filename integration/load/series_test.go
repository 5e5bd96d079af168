package main

import (
	"context"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files of testdata")

// golden compares with a file of testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("differs from %s (go test -update writes it anew):\n%s", path, got)
	}
}

// model is a run that follows known laws: v is how many others a node sees.
func model(scenario string, n int) record {
	part := map[string]float64{"allow-all": 1, "acls": .25, "self": .1}[scenario]
	v, N := float64(n)*part, float64(n)
	rss := func(fixed, each float64) int64 { return 40_000_000 + int64(fixed+each*N) }
	client := func(r int64) int64 { return (r - 40_000_000) / int64(n) }
	f := &figures{
		Run: fmt.Sprintf("%s %d", scenario, n), Scenario: scenario, Nodes: n, Sample: min(n, 100), Peers: v, IdleRSS: 40_000_000,
		Join: &joining{Joined: n, PerSecond: 200, Converged: N / 200, ServerCPU: N * (.004 + 1e-6*v), BytesClient: int64(2000 + 130*v),
			PeakRSS: rss(1e7, 1e5), Revisions: n},
		Change:   &change{Changes: 20, P50: 5 + .02*v, P99: 10 + .05*v, Max: 11 + .05*v, AckP50: 3, CPU: 3 + .03*v, BytesClient: 134 * part, Revisions: 20},
		Burst:    &burst{Changes: 100, AllSeen: .1, ServerCPU: 100 * (.0005 + 2e-6*v), Revisions: 4},
		Presence: &outage{Offline: 2.01, Online: .02},
		Policy:   &edit{Edits: 3, Viewers: n, P50: .01, Last: .02 + 1e-5*N, CPU: .01 + 4e-5*N, BytesClient: 198},
		Restart:  &restart{Listening: .1, AllRight: 2 + N/500, ServerCPU: N * (.001 + 5e-7*v), BytesClient: int64(3000 + 125*v), PeakRSS: rss(1e7, 1e5), Frames: int64(2 * n)},
		Steady: &steady{Wall: 10, ServerCPU: 10 * (.001 + 1e-6*N), RSS: rss(8e6, 70e3), RSSClient: client(rss(8e6, 70e3)), TrimmedRSS: rss(5e6, 50e3),
			TrimmedClient: client(rss(5e6, 50e3)), LiveClient: 45_000, Goroutines: 3*n + 36},
		Empty: &empty{Listening: .1 + 2e-5*N, TrimmedRSS: rss(0, 5000)},
	}
	return record{Run: f.Run, Flags: "--scenario " + scenario + " --nodes " + strconv.Itoa(n), Scenario: scenario, Nodes: n, Turn: 1,
		Start: time.Date(2026, 1, 2, 3, 4, n%60, 0, time.UTC), Wall: 20, Others: .03, Build: "0123456789ab", Commit: "abcdef012345", Machine: "Go 1.26.8, 2 cores", Figures: f}
}

func models() []record {
	var out []record
	for _, n := range []int{50, 200, 500, 1000, 2000, 5000, 10000} {
		out = append(out, model("allow-all", n))
	}
	for _, n := range []int{200, 500, 1000, 2000} {
		out = append(out, model("acls", n), model("self", n))
	}
	return out
}

func TestWrongListIsRefusedByLine(t *testing.T) {
	for _, c := range []struct{ list, want string }{
		{"", "empty"},
		{"# only words\n", "empty"},
		{"x --nodes 5", `line 1: "x"`},
		{"0 --nodes 5", `line 1: "0"`},
		{"1 --nodes 5\n1 --nodes 1", "line 2: 1 nodes"},
		{"1 --nods 5", "line 1: flag provided but not defined: -nods"},
		{"1 5", `line 1: unexpected argument "5"`},
		{"1 --scenario some", `line 1: scenario "some"`},
		{"1 --phases nap", `line 1: phase "nap"`},
		{"1 --nodes 5 --json x", "line 1: --bin and --json"},
		{"1 --nodes 5\n\n2 --nodes 5 --steady 1s # longer", `line 3: a second "allow-all 5"`},
	} {
		if _, err := parseList(c.list); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %q", c.list, err, c.want)
		}
	}
}

// The list measures all that is promised, three times but for the largest.
func TestListOfTheDocsHasEveryTarget(t *testing.T) {
	list, err := parseList(defaultList)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range targets {
		i := slices.IndexFunc(list, func(e entry) bool { return e.kind == want.scenario && e.nodes == want.nodes })
		switch {
		case want.nodes == 0:
		case i < 0:
			t.Errorf("%s: %s %d is not in the list", want.what, want.scenario, want.nodes)
		case list[i].runs != 3 && want.nodes < 10000:
			t.Errorf("%s: %d runs of %s", want.what, list[i].runs, list[i].name)
		}
	}
	for _, e := range list {
		if e.nodes >= 2000 && e.views == e.nodes {
			t.Errorf("%s: decodes all maps, which measures the tool", e.name)
		}
	}
}

func TestTurnsAreInterleaved(t *testing.T) {
	list, err := parseList("2 --nodes 5\n1 --nodes 6\n3 --nodes 7")
	if err != nil {
		t.Fatal(err)
	}
	names := func(done ...record) string {
		var out []string
		for _, p := range pending(list, done) {
			out = append(out, fmt.Sprintf("%d:%d", p.nodes, p.n))
		}
		return strings.Join(out, " ")
	}
	if got, want := names(), "5:1 6:1 7:1 5:2 7:2 7:3"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := names(record{Flags: "--nodes 6", Turn: 1}, record{Flags: "--nodes 5", Turn: 2}), "5:1 7:1 7:2 7:3"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// A series that was cut off goes on with the run that was under way. Runs
// that failed stay, and are not made again.
func TestSeriesGoesOnWhereItWasCut(t *testing.T) {
	list, err := parseList("2 --nodes 5\n1 --nodes 6")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "new", "figures.jsonl")
	ctx, cut := context.WithCancel(t.Context())
	var made []string
	one := func(_ context.Context, p turn) record {
		made = append(made, fmt.Sprintf("%d:%d", p.nodes, p.n))
		r := record{Run: p.name, Flags: p.flags, Scenario: p.kind, Nodes: p.nodes, Turn: p.n, Build: "b", Figures: model(p.kind, p.nodes).Figures}
		switch len(made) {
		case 2:
			r.Figures, r.Failed = nil, "it fell over"
		case 3:
			cut()
		}
		return r
	}
	s := &series{list: list, path: path, build: "b", measure: one, log: io.Discard}
	if _, err := s.run(ctx); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	// The machine stopped while it wrote a line.
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(f, `{"run":"allow-all 5","flags":"--no`)
	f.Close()
	records, err := s.run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(made, " "), "5:1 6:1 5:2 5:2"; got != want {
		t.Errorf("made %s, want %s", got, want)
	}
	read, _, err := readRecords(path)
	if err != nil || len(read) != 3 || len(records) != 3 {
		t.Fatal(len(read), len(records), err)
	}
	text := report(read)
	for _, want := range []string{"| allow-all 6 | 1, **1 failed** | failed |", "1 of 3 runs failed", "- allow-all 6, turn 1: it fell over"} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
	s.build = "c"
	if _, err := s.run(t.Context()); err == nil || !strings.Contains(err.Error(), "another server (b, and this is c)") {
		t.Errorf("another server's figures were taken: %v", err)
	}
}

func TestDamagedFileIsRefusedByLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for _, text := range []string{"{\"run\":\"a\",\"turn\":1,\"failed\":\"x\"}\nnonsense\n", "{\"run\":\"a\",\"turn\":1,\"failed\":\"x\"}\n{}\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := readRecords(path); err == nil || !strings.Contains(err.Error(), ":2:") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestReasonOfAFailure(t *testing.T) {
	good, bad, short := model("self", 50).Figures, model("self", 50).Figures, model("self", 50).Figures
	bad.Faults = map[string]kind{"refused": {Count: 2}, "session broken": {Count: 1}}
	short.Join.Joined = 49
	exit := errors.New("exit status 2")
	for _, c := range []struct {
		f     *figures
		ended error
		said  string
		want  string
	}{
		{good, nil, "", ""},
		{bad, errors.New("exit status 1"), "", "refused: 2; session broken: 1"},
		{short, nil, "", "not all joined"},
		{good, exit, "12:00 join\nload: policy edit: no\n", "policy edit: no"},
		{nil, exit, "panic: oh\n\ngoroutine 1 [running]:\n\tmain.go\n", "panic: oh"},
		{nil, errors.New("signal: killed"), "12:00 join\n", "signal: killed: 12:00 join"},
		{nil, nil, "", "no figures"},
	} {
		if got := reason(c.f, c.ended, c.said); got != c.want {
			t.Errorf("%v %q: got %q, want %q", c.ended, c.said, got, c.want)
		}
	}
}

// Two good runs of three hide no wrong view, no broken session and no fault.
func TestMediansHideNothingBad(t *testing.T) {
	runs := []*figures{model("self", 50).Figures, model("self", 50).Figures, model("self", 50).Figures}
	for i, f := range runs {
		f.Join.ServerCPU, f.Join.Goroutines = []float64{3, 1, 2}[i], []int{7, 9, 8}[i]
	}
	runs[1].Join.Broken, runs[1].Join.Joined, runs[1].Restart.WentOffline, runs[1].Change.Missing = 4, 48, 1, 3
	runs[1].Faults = map[string]kind{"session broken": {Count: 4}}
	runs[2].Policy = nil
	m := medians(runs)
	if m.Join.ServerCPU != 2 || m.Join.Goroutines != 8 {
		t.Errorf("medians %v and %v, want 2 and 8", m.Join.ServerCPU, m.Join.Goroutines)
	}
	if m.Join.Broken != 4 || m.Join.Joined != 48 || m.Restart.WentOffline != 1 || m.Change.Missing != 3 || broken(m) != 4 {
		t.Errorf("hidden: %+v, %+v, %+v, %v", m.Join, m.Restart, m.Change, m.Faults)
	}
	if m.Policy == nil || m.Policy.CPU != runs[0].Policy.CPU || m.Run != "self 50" {
		t.Errorf("policy %+v of %q", m.Policy, m.Run)
	}
	if joinCPU(runs[0]) == joinCPU(m) || !math.IsNaN(policyCPU(runs[2])) {
		t.Error("the runs themselves were changed")
	}
}

func TestVerdicts(t *testing.T) {
	one := func(change func(*record)) string {
		r := model("allow-all", 500)
		change(&r)
		return verdicts(rows([]record{r}))
	}
	for name, c := range map[string]struct {
		change func(*record)
		want   string
	}{
		"met":     {func(r *record) {}, "| joined, and every view right | allow-all 500 | 4 s | 2.50 s | 1 | met |"},
		"not met": {func(r *record) { r.Figures.Join.Converged = 4.1 }, "| joined, and every view right | allow-all 500 | 4 s | 4.10 s | 1 | **not met** |"},
		"not in time": {func(r *record) { r.Figures.Join.Converged, r.Figures.Join.Wrong = 0, 3 },
			"| joined, and every view right | allow-all 500 | 4 s | - | 1 | **not met**: no figure |"},
		"failed":       {func(r *record) { r.Failed = "x" }, "| joined, and every view right | allow-all 500 | 4 s | 2.50 s | 1 | **not met**: 1 of 1 runs failed |"},
		"not measured": {func(r *record) {}, "| joined, and every view right | acls 500 | 5 s | - | 0 | not measured |"},
		"nothing broken": {func(r *record) {},
			"| sessions broken by the server, in all runs | all | 0 | 0 | 1 | met |"},
		"broken": {func(r *record) { r.Figures.Faults = map[string]kind{"session broken": {Count: 2}} },
			"| sessions broken by the server, in all runs | all | 0 | 2 | 1 | **not met** |"},
	} {
		if got := one(c.change); !strings.Contains(got, c.want+"\n") {
			t.Errorf("%s: want\n%s\nin%s", name, c.want, got)
		}
	}
}

func TestReportIsGolden(t *testing.T) { golden(t, "report.md", report(models())) }

func TestPaperIsGolden(t *testing.T) {
	golden(t, "paper.md", paper(rows(models()), assumed, []float64{1000, assumed.nodes - 1}))
}

func TestPlotIsGolden(t *testing.T) { golden(t, "change-time.svg", charts[2].svg(rows(models()))) }

func TestFit(t *testing.T) {
	nan := math.NaN()
	for _, c := range []struct {
		xs, ys      []float64
		fixed, each float64
	}{
		{[]float64{10, 100, 10000}, []float64{7, 25, 2005}, 5, .2},
		{[]float64{1, 2, 3}, []float64{4, 4, 4}, 4, 0},
		{[]float64{1, 2}, []float64{1, 4}, 0, 1.2},   // would begin below 0
		{[]float64{1, 2}, []float64{4, 2}, 2.4, 0},   // would fall
		{[]float64{1}, []float64{4}, nan, nan},       // no line through a point
		{[]float64{5, 5}, []float64{4, 2}, nan, nan}, // nor through two at one place
		{[]float64(nil), []float64(nil), nan, nan},
	} {
		l := fit(c.xs, c.ys)
		same := func(a, b float64) bool { return math.IsNaN(a) && math.IsNaN(b) || math.Abs(a-b) < 1e-9 }
		if !same(l.fixed, c.fixed) || !same(l.each, c.each) {
			t.Errorf("%v %v: got %+v, want %v + %v x", c.xs, c.ys, l, c.fixed, c.each)
		}
	}
}

// The estimate agrees with the laws of the model, worked out by hand.
func TestEstimateByHand(t *testing.T) {
	all := rows(models())
	lines, fixed := map[string]line{}, map[string]float64{}
	for _, u := range units {
		lines[u.sign] = u.line(all)
	}
	for _, u := range constants {
		fixed[u.sign] = u.largest(all)
	}
	e := assumed.estimate(lines, fixed, 1000)
	got := map[string]string{}
	for i, d := range demands {
		if _, again := got[d.what]; !again {
			got[d.what] = e.cells[i]
		}
	}
	for what, want := range map[string]string{
		"full map of a client":                     "128 KB",   // 3000 + 125·1000
		"restart of all: bytes":                    "12.8 GB",  // 100,000 times that
		"restart of all: CPU":                      "150 s",    // 100,000·(1 ms + 0.5 µs·1000)
		"servers for that":                         "2",        // 150 s / 2 cores / 60 s
		"memory to know all nodes, each server":    "540 MB",   // 40 MB + 5,000·100,000
		"memory of all sessions":                   "4.50 GB",  // 5 MB + 45,000·100,000
		"changes a second R":                       "55.6/s",   // 100,000·2/3600
		"deltas a second":                          "55,556/s", // each sees 0.56 changes a second, fewer than announcements
		"**servers S**":                            "4",        // 2.1 cores of changes over half of two cores, and one
		"policy edit: CPU of each server":          "4.01 s",   // 10 ms + 40 µs·100,000
		"all join anew: CPU":                       "500 s",    // 100,000·(4 ms + 1 µs·1000)
		"database: read by servers, rows a second": "222/s",
	} {
		if got[what] != want {
			t.Errorf("%s: got %s, want %s", what, got[what], want)
		}
	}
	if many := assumed.estimate(lines, fixed, assumed.nodes-1); many.servers < 10*e.servers {
		t.Errorf("%v servers when all see all, %v when each sees 1000", many.servers, e.servers)
	}
	// Without figures nothing is made up.
	if text := paper(nil, assumed, []float64{1000}); strings.Count(text, "not measured") < 20 {
		t.Errorf("an estimate from nothing:\n%s", text)
	}
}

func TestAxisCoversAllAndIsLogarithmic(t *testing.T) {
	for _, c := range []struct{ lo, hi, first, last float64 }{
		{50, 10000, 50, 10000}, {51, 9999, 50, 10000}, {49, 10001, 20, 20000}, {.013, .4, .01, .5}, {3, 3, 2, 5}, {1, 1, 1, 2},
	} {
		a := newAxis([]float64{c.hi, c.lo}, 0, 100)
		first, last := a.ticks[0], a.ticks[len(a.ticks)-1]
		if math.Abs(first/c.first-1) > 1e-9 || math.Abs(last/c.last-1) > 1e-9 {
			t.Errorf("%v to %v: axis from %v to %v, want %v to %v", c.lo, c.hi, first, last, c.first, c.last)
		}
	}
	a := newAxis([]float64{10, 1000}, 0, 100)
	if at := a.at(100); math.Abs(at-50) > 1e-9 {
		t.Errorf("100 is at %v of an axis from 10 to 1000, want the middle", at)
	}
}

func TestSlopeIsThePowerOfN(t *testing.T) {
	var c curve
	for _, n := range []float64{50, 200, 1000, 10000} {
		c.points = append(c.points, point{x: n, y: 3 * math.Pow(n, 1.5)})
	}
	if s := c.slope(); math.Abs(s-1.5) > 1e-9 {
		t.Errorf("slope %v, want 1.5", s)
	}
	if s := (curve{points: c.points[:1]}).slope(); !math.IsNaN(s) {
		t.Errorf("one point has the slope %v", s)
	}
}

// Every plot is well-formed, names its axes and curves, has a marker for each
// measured point inside the plot, and colours for light and dark pages.
func TestPlots(t *testing.T) {
	records := models()
	records[3].Failed = "refused: 1" // allow-all 1000
	all := rows(records)
	coordinate := regexp.MustCompile(`<(?:circle cx|rect x)="([-0-9.]+)" (?:cy|y)="([-0-9.]+)"`)
	for _, c := range charts {
		text := c.svg(all)
		if err := xml.Unmarshal([]byte(text), new(struct{})); err != nil {
			t.Errorf("%s: %v", c.file, err)
		}
		curves := c.curves(all)
		if len(curves) != len(scenarios)*len(c.kinds) {
			t.Errorf("%s has %d curves", c.file, len(curves))
		}
		want := 0
		for _, l := range curves {
			want += len(l.points) + 1 // one in the legend
			if !strings.Contains(text, ">"+l.legend()+"<") || !strings.Contains(l.legend(), "N^") {
				t.Errorf("%s: no legend %q", c.file, l.legend())
			}
		}
		if got := strings.Count(text, "<title>"); got != want {
			t.Errorf("%s: %d markers, want %d", c.file, got, want)
		}
		for _, part := range []string{c.title, "nodes (N)", ">10,000<", "prefers-color-scheme:dark", `class="page"`, "aria-label="} {
			if !strings.Contains(text, part) {
				t.Errorf("%s lacks %q", c.file, part)
			}
		}
		if got := strings.Count(text, `class="c0 failed"`); got != len(c.kinds) {
			t.Errorf("%s: %d hollow markers for a failed run, want %d", c.file, got, len(c.kinds))
		}
		for _, m := range coordinate.FindAllStringSubmatch(text, -1) {
			x, _ := strconv.ParseFloat(m[1], 64)
			y, _ := strconv.ParseFloat(m[2], 64)
			if x < left-4 || x > width || y < top-4 || y > bottom+.1 {
				t.Errorf("%s: a marker at %v, %v", c.file, x, y)
			}
		}
	}
	if text := charts[0].svg(nil); text != "" {
		t.Errorf("a plot of nothing:\n%s", text)
	}
}

func TestNumbersAreReadable(t *testing.T) {
	for _, c := range []struct{ got, want string }{
		{three(0), "0"}, {three(.0123), "0.012"}, {three(1.234), "1.23"}, {three(56.78), "56.8"}, {three(345.6), "346"}, {three(12345), "12,345"},
		{three(1000), "1,000"}, {three(math.NaN()), "-"}, {thousands(1234567), "1,234,567"}, {thousands(999), "999"}, {thousands(-1234), "-1,234"},
		{quantity(1.26e6, "B"), "1.26 MB"}, {quantity(12_340, "B"), "12.3 KB"}, {quantity(134, "B"), "134 B"}, {quantity(2e12, "B"), "2 TB"},
		{quantity(28e-6, "s"), "28 µs"}, {quantity(.0123, "s"), "12.3 ms"}, {quantity(75, "s"), "75 s"}, {quantity(7.45e6, "B/s"), "7.45 MB/s"},
		{quantity(math.Inf(1), ""), "impossible"}, {quantity(math.NaN(), "s"), "not measured"}, {quantity(.25, "%"), "25 %"}, {quantity(0, "s"), "0"},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
	}
}

// What the page and the plots show is what the file of the measured figures
// says: nothing was edited by hand, and nothing forgotten.
func TestDocsShowTheMeasuredFigures(t *testing.T) {
	const docs = "../../docs"
	records, _, err := readRecords(docs + "/plots/figures.jsonl")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	page, err := os.ReadFile(docs + "/load.md")
	if err != nil {
		t.Fatal(err)
	}
	want, err := fill(string(page), parts(records))
	if err != nil {
		t.Fatal(err)
	}
	if want != string(page) {
		t.Error("docs/load.md is not what `load docs` makes of docs/plots/figures.jsonl")
	}
	all := rows(records)
	for _, c := range charts {
		got, err := os.ReadFile(filepath.Join(docs, "plots", c.file+".svg"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if string(got) != c.svg(all) {
			t.Errorf("docs/plots/%s.svg is not what `load docs` makes of docs/plots/figures.jsonl", c.file)
		}
	}
}

func TestDocsAreFilledBetweenTheirMarks(t *testing.T) {
	dir := t.TempDir()
	page := "# Page\n\n"
	for _, name := range []string{"targets", "series", "plots", "paper"} {
		page += "before " + name + "\n\n<!-- " + name + " -->\nold\n<!-- /" + name + " -->\n\nafter\n"
	}
	write := func(text string) {
		if err := os.WriteFile(filepath.Join(dir, "load.md"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(page)
	for range 2 { // the second time changes nothing
		if err := writeDocs(dir, models()); err != nil {
			t.Fatal(err)
		}
	}
	got, _ := os.ReadFile(filepath.Join(dir, "load.md"))
	text := string(got)
	if strings.Contains(text, "old\n") || strings.Count(text, "after\n") != 4 || strings.Count(text, "| **servers S** |") != 1 {
		t.Errorf("the page is\n%s", text)
	}
	for _, m := range regexp.MustCompile(`\]\((plots/[^)]+)\)`).FindAllStringSubmatch(text, -1) {
		if _, err := os.Stat(filepath.Join(dir, m[1])); err != nil {
			t.Error(err)
		}
	}
	if n := strings.Count(text, "](plots/"); n != len(charts) {
		t.Errorf("%d plots on the page, want %d", n, len(charts))
	}
	write("# Page without a place\n")
	if err := writeDocs(dir, models()); err == nil || !strings.Contains(err.Error(), "no place for") {
		t.Errorf("got %v", err)
	}
}
