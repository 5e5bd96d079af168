package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

//go:embed series.txt
var defaultList string

// verbs all work on the file of a series; the empty verb is a single run.
var verbs = map[string]func(context.Context, []string) (ok bool, err error){
	"series": runSeries, "tables": showTables, "plot": drawPlots, "paper": showPaper, "docs": fillDocs,
}

// An entry is a configuration of a series.
type entry struct {
	flags string // as in the list
	runs  int
	name  string
	nodes int
	views int
	kind  string // the scenario
}

// parseList reads lines of a number of runs and the flags of a run. # begins
// a comment.
func parseList(text string) ([]entry, error) {
	var out []entry
	for i, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		runs, err := strconv.Atoi(fields[0])
		if err != nil || runs < 1 {
			return nil, fmt.Errorf("line %d: %q: want a number of runs, then flags", i+1, fields[0])
		}
		o, err := parse(fields[1:], flag.ContinueOnError)
		if err == nil {
			_, err = newScenario(o.scenario, o.nodes)
		}
		switch {
		case err != nil:
			return nil, fmt.Errorf("line %d: %w", i+1, err)
		case o.binary != "signalbox" || o.jsonPath != "":
			return nil, fmt.Errorf("line %d: --bin and --json are the series' own", i+1)
		}
		e := entry{strings.Join(fields[1:], " "), runs, o.name, o.nodes, o.sample, o.scenario}
		if slices.ContainsFunc(out, func(x entry) bool { return x.name == e.name }) {
			return nil, fmt.Errorf("line %d: a second %q; --name tells them apart", i+1, e.name)
		}
		out = append(out, e)
	}
	if len(out) == 0 {
		return nil, errors.New("the list is empty")
	}
	return out, nil
}

// A record is a line of the file: one run that came to an end, good or bad.
type record struct {
	Run      string    `json:"run"`
	Flags    string    `json:"flags"`
	Scenario string    `json:"scenario"`
	Nodes    int       `json:"nodes"`
	Turn     int       `json:"turn"` // 1 and up
	Start    time.Time `json:"start"`
	Wall     float64   `json:"wallS"`
	Others   float64   `json:"othersCores"` // cores that neither server nor tool used meanwhile
	Build    string    `json:"build"`       // digest of the server's binary
	Commit   string    `json:"commit,omitempty"`
	Machine  string    `json:"machine"`
	Failed   string    `json:"failed,omitempty"` // why; "" = all was right
	Figures  *figures  `json:"figures,omitempty"`
}

// readRecords reads the file of a series. whole is how long the part with
// complete lines is: the last line is torn when the machine stopped in the
// middle of it.
func readRecords(path string) (records []record, whole int64, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, 0, err
	}
	n := bytes.LastIndexByte(text, '\n') + 1
	for i, line := range strings.Split(strings.TrimSpace(string(text[:n])), "\n") {
		if line == "" {
			continue
		}
		var r record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			return nil, 0, fmt.Errorf("%s:%d: %w", path, i+1, err)
		}
		if r.Run == "" || r.Turn < 1 || (r.Figures == nil && r.Failed == "") {
			return nil, 0, fmt.Errorf("%s:%d: not a run of a series", path, i+1)
		}
		records = append(records, r)
	}
	return records, int64(n), nil
}

// A turn is one run to be made.
type turn struct {
	entry
	n int
}

// pending returns what is still to be run: the first run of each entry, then
// the second of each, so that what disturbs the machine for a while does not
// meet all runs of one entry.
func pending(list []entry, done []record) []turn {
	var out []turn
	for n := 1; ; n++ {
		more := false
		for _, e := range list {
			if n > e.runs {
				continue
			}
			more = true
			if !slices.ContainsFunc(done, func(r record) bool { return r.Flags == e.flags && r.Turn == n }) {
				out = append(out, turn{e, n})
			}
		}
		if !more {
			return out
		}
	}
}

// A series runs a list into a file.
type series struct {
	list    []entry
	path    string
	build   string
	measure func(context.Context, turn) record // makes one run
	log     io.Writer
}

// run makes the runs that the file lacks. A run during which ctx ended is not
// written: it will be made another time.
func (s *series) run(ctx context.Context) ([]record, error) {
	done, whole, err := readRecords(s.path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for _, r := range done {
		if r.Build != s.build {
			return nil, fmt.Errorf("%s holds runs of another server (%s, and this is %s): move it away to measure anew", s.path, r.Build, s.build)
		}
	}
	if err := os.MkdirAll(filepath.Dir(s.path), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(s.path, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(whole); err != nil {
		return nil, err
	}
	if _, err := f.Seek(whole, io.SeekStart); err != nil {
		return nil, err
	}
	left := pending(s.list, done)
	for i, t := range left {
		fmt.Fprintf(s.log, "%s run %d of %d: %s, turn %d\n", time.Now().Format("15:04:05"), i+1, len(left), t.name, t.n)
		r := s.measure(ctx, t)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if r.Failed != "" {
			fmt.Fprintf(s.log, "%s, turn %d FAILED: %s\n", t.name, t.n, r.Failed)
		}
		line, err := json.Marshal(r)
		if err == nil {
			_, err = f.Write(append(line, '\n'))
		}
		if err == nil {
			err = f.Sync()
		}
		if err != nil {
			return nil, err
		}
		done = append(done, r)
	}
	return done, nil
}

// runSeries is the verb series.
func runSeries(ctx context.Context, args []string) (bool, error) {
	set := flag.NewFlagSet("load series", flag.ExitOnError)
	path := set.String("json", "docs/plots/figures.jsonl", "file of the figures, one line a run; runs that it has are not made again")
	list := set.String("list", "", "file with the runs to make (default: integration/load/series.txt as built in)")
	binary := set.String("bin", "signalbox", "the server to start")
	commit := set.String("commit", "", "what the server was built from, for the tables")
	docs := set.String("docs", "", "at the end do what the verb docs does")
	set.Parse(args)
	text := defaultList
	if *list != "" {
		own, err := os.ReadFile(*list)
		if err != nil {
			return false, err
		}
		text = string(own)
	}
	entries, err := parseList(text)
	if err != nil {
		return false, err
	}
	m := &machine{commit: *commit}
	if m.binary, err = filepath.Abs(*binary); err != nil {
		return false, err
	}
	if err := m.describe(); err != nil {
		return false, err
	}
	s := &series{list: entries, path: *path, build: m.build, measure: m.measure, log: os.Stderr}
	records, err := s.run(ctx)
	if err != nil {
		return false, err
	}
	fmt.Print(report(records))
	if *docs != "" {
		err = writeDocs(*docs, records)
	}
	return !slices.ContainsFunc(records, func(r record) bool { return r.Failed != "" }), err
}

// A machine makes runs, each in a process of its own, so that none inherits
// another's memory, and the end of one is not the end of the series.
type machine struct {
	binary, build, commit, text string
}

// describe finds out what is measured, and on what.
func (m *machine) describe() error {
	text, err := os.ReadFile(m.binary)
	if err != nil {
		return err
	}
	m.build = fmt.Sprintf("%x", sha256.Sum256(text))[:12]
	info, err := buildinfo.ReadFile(m.binary)
	if err != nil {
		return err
	}
	m.text = fmt.Sprintf("%s, %d cores", strings.Replace(info.GoVersion, "go", "Go ", 1), runtime.NumCPU())
	cpu, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(cpu)) {
		if name, model, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
			m.text += " of " + strings.TrimSpace(model)
			break
		}
	}
	return nil
}

func (m *machine) measure(ctx context.Context, t turn) record {
	r := record{Run: t.name, Flags: t.flags, Scenario: t.kind, Nodes: t.nodes, Turn: t.n, Start: time.Now().UTC().Truncate(time.Second),
		Build: m.build, Commit: m.commit, Machine: m.text}
	before, start := busy(), time.Now()
	var own time.Duration
	r.Figures, own, r.Failed = m.child(ctx, t)
	wall := time.Since(start)
	r.Wall = wall.Seconds()
	r.Others = max(0, (busy()-before-own).Seconds()) / wall.Seconds()
	return r
}

// child runs the tool itself. own is the CPU time of tool and server.
func (m *machine) child(ctx context.Context, t turn) (f *figures, own time.Duration, failed string) {
	dir, err := os.MkdirTemp("", "signalbox-series-")
	if err != nil {
		return nil, 0, err.Error()
	}
	defer os.RemoveAll(dir)
	self, err := os.Executable()
	if err != nil {
		return nil, 0, err.Error()
	}
	out := filepath.Join(dir, "figures.json")
	cmd := exec.CommandContext(ctx, self, append(strings.Fields(t.flags), "--bin", m.binary, "--json", out)...)
	// Asked to stop it ends its server and removes its files.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	var said bytes.Buffer
	cmd.Stderr = io.MultiWriter(os.Stderr, &said)
	ended := cmd.Run()
	if cmd.ProcessState != nil {
		own = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	if text, err := os.ReadFile(out); err == nil {
		f = new(figures)
		if err := json.Unmarshal(text, f); err != nil {
			return nil, own, err.Error()
		}
		f.Command = "load " + t.flags // without the names of temporary files
	}
	return f, own, reason(f, ended, said.String())
}

// reason is why a run failed: what its views said, or else its last words.
func reason(f *figures, ended error, said string) string {
	if f != nil && f.wrong() != "" {
		return f.wrong()
	}
	if ended == nil {
		if f == nil {
			return "no figures"
		}
		return ""
	}
	lines := strings.Split(strings.TrimSpace(said), "\n")
	for _, l := range slices.Backward(lines) {
		if why, ok := strings.CutPrefix(l, "load: "); ok {
			return why
		}
		if strings.HasPrefix(l, "panic: ") || strings.HasPrefix(l, "fatal error: ") {
			return l
		}
	}
	return fmt.Sprintf("%v: %s", ended, lines[len(lines)-1])
}

// busy is the CPU time that all processes of the machine have used, and that
// its host took away (proc(5), /proc/stat).
func busy() time.Duration {
	const hertz = 100 // USER_HZ, on every architecture
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	s := bufio.NewScanner(bytes.NewReader(text))
	s.Scan()
	f := strings.Fields(s.Text())
	var ticks int64
	for _, i := range []int{1, 2, 3, 8} { // user, nice, system, steal
		if i < len(f) {
			n, _ := strconv.ParseInt(f[i], 10, 64)
			ticks += n
		}
	}
	return time.Duration(ticks) * time.Second / hertz
}

// rows puts the runs of each configuration together, scenarios after each
// other, by the number of nodes.
func rows(records []record) []row {
	byFlags := map[string][]record{}
	for _, r := range records {
		byFlags[r.Flags] = append(byFlags[r.Flags], r)
	}
	var out []row
	for _, group := range byFlags {
		r, all := row{runs: len(group)}, []*figures(nil)
		for _, x := range group {
			if x.Failed != "" {
				r.failed++
			}
			if x.Figures != nil {
				all = append(all, x.Figures)
			}
		}
		r.f = medians(all)
		r.f.Run, r.f.Scenario, r.f.Nodes = group[0].Run, group[0].Scenario, group[0].Nodes
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b row) int {
		return cmp.Or(cmp.Compare(order(a.f.Scenario), order(b.f.Scenario)), cmp.Compare(a.f.Nodes, b.f.Nodes), cmp.Compare(a.f.Run, b.f.Run))
	})
	return out
}

var scenarios = []string{"allow-all", "acls", "self"}

func order(scenario string) int { return slices.Index(scenarios, scenario) }

// report is all tables of a series.
func report(records []record) string {
	all := rows(records)
	return origin(records) + "\nTargets:\n" + verdicts(all) + tables(all) + failures(records)
}

// origin says what was measured where and when, and how quiet it was there.
func origin(records []record) string {
	if len(records) == 0 {
		return ""
	}
	first, last, others := records[0].Start, records[0].Start, 0.0
	for _, r := range records {
		if r.Start.Before(first) {
			first = r.Start
		}
		if r.Start.After(last) {
			last = r.Start
		}
		others = max(others, r.Others)
	}
	r := records[0]
	commit := ""
	if r.Commit != "" {
		commit = "commit " + r.Commit + ", "
	}
	return fmt.Sprintf("%d runs from %s to %s: %sbinary %s, %s. Other processes used at most %.2f cores during a run.\n",
		len(records), first.Format("2006-01-02 15:04"), last.Format("2006-01-02 15:04 MST"), commit, r.Build, r.Machine, others)
}

// failures lists the runs that failed, and says so when there are none.
func failures(records []record) string {
	var out []string
	for _, r := range records {
		if r.Failed != "" {
			out = append(out, fmt.Sprintf("- %s, turn %d: %s", r.Run, r.Turn, r.Failed))
		}
	}
	if len(out) == 0 {
		return fmt.Sprintf("\nAll %d runs ended with every checked view right after every phase, no session broken by the server and no client refused.\n", len(records))
	}
	return fmt.Sprintf("\n%d of %d runs failed:\n\n%s\n", len(out), len(records), strings.Join(out, "\n"))
}

// fromFile reads the flag --json of a verb that only looks at the file.
func fromFile(set *flag.FlagSet, args []string) ([]record, error) {
	path := set.String("json", "docs/plots/figures.jsonl", "file of the figures")
	set.Parse(args)
	records, _, err := readRecords(*path)
	return records, err
}

// showTables is the verb tables.
func showTables(_ context.Context, args []string) (bool, error) {
	records, err := fromFile(flag.NewFlagSet("load tables", flag.ExitOnError), args)
	if err == nil {
		fmt.Print(report(records))
	}
	return true, err
}
