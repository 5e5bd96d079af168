// Load puts N simulated Tailscale clients on one signalbox server and measures
// what that costs, and at the end of every phase checks each client's own view
// of the tailnet against what is true.
//
// A client is as close to the stock one as the server can tell: own machine,
// node and disco keys, Noise over an HTTP upgrade, HTTP/2 inside, registration
// by auth key, one streaming map request, reports of its endpoints, deltas
// applied in the client's order with the client's omissions. It shares nothing
// with the server's code, so that a misunderstanding cannot be on both sides.
//
//	go build -o /tmp/signalbox ./cmd/signalbox
//	go run ./integration/load --bin /tmp/signalbox --nodes 500
//
// It starts the server itself, in a directory of its own, or is pointed at a
// running one by --server, --key and --pid. It exits with status 1 when a view
// is wrong, the server broke a session or refused a client.
//
// The verbs series, tables, plot, paper and docs measure a list of runs into a
// file, and make tables, plots and an estimate for more nodes from that file.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

type options struct {
	nodes, sample, hold, window   int
	sources                       int
	scenario, phases, name        string
	binary, dir, config           string
	serverURL, key, apiKey        string
	metrics, profile, jsonPath    string
	pid, derp, changes, edits     int
	timeout, phaseTimeout, steady time.Duration
	keep                          bool
	env                           list
}

type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ok, err := command(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(2)
	}
	if !ok {
		os.Exit(1)
	}
}

// command runs a verb, or without one a single run. It returns false when the
// server did something wrong.
func command(ctx context.Context, args []string) (ok bool, err error) {
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		verb := verbs[args[0]]
		if verb == nil {
			return false, fmt.Errorf("verb %q: want series, tables, plot, paper, docs or none", args[0])
		}
		return verb(ctx, args[1:])
	}
	o, err := parse(args, flag.ExitOnError)
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	return o.run(ctx)
}

// parse reads and checks the flags of one run.
func parse(args []string, handling flag.ErrorHandling) (*options, error) {
	o := new(options)
	set := flag.NewFlagSet("load", handling)
	set.IntVar(&o.nodes, "nodes", 200, "number of clients")
	set.IntVar(&o.sample, "sample", 0, "decode and check only the maps of this many clients (0 = all); the others read small messages only")
	set.IntVar(&o.hold, "hold", 0, "short for --nodes N --sample 50 --phases join,change,steady")
	set.IntVar(&o.window, "window", 0, "joins under way at once (0 = 32, and 128 from 2000 nodes on)")
	set.IntVar(&o.sources, "sources", 1, "loopback addresses to connect from, 127.0.0.1 and up; each has some 28,000 ports")
	set.StringVar(&o.scenario, "scenario", "allow-all", "policy: allow-all, acls (60 rules, 20 groups, 30 tags) or self (autogroup:self, 20 users)")
	set.StringVar(&o.phases, "phases", "join,change,burst,presence,policy,steady,restart,empty", "phases to run after join")
	set.StringVar(&o.name, "name", "", "name of the run in the tables")
	set.StringVar(&o.binary, "bin", "signalbox", "the server to start")
	set.StringVar(&o.dir, "dir", "", "directory for the server's data and log (default: a temporary one, removed at the end)")
	set.StringVar(&o.config, "config", "", "configuration file for the server")
	set.Var(&o.env, "env", "NAME=VALUE for the server's environment; may be repeated")
	set.StringVar(&o.serverURL, "server", "", "measure this running server (http://HOST:PORT) instead of starting one")
	set.StringVar(&o.key, "key", "", "with --server: reusable auth key that all clients join with (scenario allow-all only)")
	set.StringVar(&o.apiKey, "api-key", "", "with --server: API key; makes users and auth keys, and sets the policy")
	set.IntVar(&o.pid, "pid", 0, "with --server: its process, for CPU and memory figures")
	set.StringVar(&o.metrics, "metrics", "", "with --server: host:port of its metrics listener")
	set.StringVar(&o.profile, "profile", "", "directory for CPU profiles of join, steady and restart, and a heap profile")
	set.StringVar(&o.jsonPath, "json", "", "write the figures as JSON to this file (- = standard output, instead of the tables)")
	set.IntVar(&o.derp, "derp", 999, "home DERP region that the clients report")
	set.IntVar(&o.changes, "changes", 20, "single endpoint changes")
	set.IntVar(&o.edits, "edits", 3, "policy edits")
	set.DurationVar(&o.steady, "steady", 10*time.Second, "length of the steady phase")
	set.DurationVar(&o.timeout, "timeout", 15*time.Minute, "end of everything")
	set.DurationVar(&o.phaseTimeout, "phase-timeout", 5*time.Minute, "end of one phase")
	set.BoolVar(&o.keep, "keep", false, "keep the temporary directory")
	if handling == flag.ContinueOnError {
		set.SetOutput(io.Discard) // the caller shows the error
	}
	if err := set.Parse(args); err != nil {
		return nil, err
	}
	if set.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	return o, o.normalise()
}

func (o *options) normalise() error {
	if o.hold > 0 {
		o.nodes, o.phases = o.hold, "join,change,steady"
		if o.sample == 0 {
			o.sample = 50
		}
	}
	if o.sample == 0 || o.sample > o.nodes {
		o.sample = o.nodes
	}
	if o.window == 0 {
		o.window = 32
		if o.nodes >= 2000 {
			o.window = 128
		}
	}
	// Leave room for ports that connections of a killed server still occupy.
	o.sources = max(o.sources, (o.nodes+19999)/20000)
	if o.sources > 250 {
		return fmt.Errorf("%d source addresses: want at most 250", o.sources)
	}
	if o.name == "" {
		o.name = fmt.Sprintf("%s %d", o.scenario, o.nodes)
	}
	known := []string{"join", "change", "burst", "presence", "policy", "steady", "restart", "empty"}
	for _, p := range o.list() {
		if !slices.Contains(known, p) {
			return fmt.Errorf("phase %q: want some of %s", p, strings.Join(known, ", "))
		}
	}
	if o.nodes < 2 || o.nodes > 60000 {
		return fmt.Errorf("%d nodes: want 2 to 60000", o.nodes)
	}
	if o.serverURL != "" && o.key == "" && o.apiKey == "" {
		return errors.New("--server needs --key or --api-key")
	}
	if o.serverURL != "" && o.apiKey == "" && o.scenario != "allow-all" {
		return errors.New("with --key alone only the scenario allow-all can be checked")
	}
	return nil
}

func (o *options) list() []string { return strings.Split(o.phases, ",") }

func (o *options) has(phase string) bool { return slices.Contains(o.list(), phase) }

// run returns false when the server did something wrong.
func (o *options) run(ctx context.Context) (bool, error) {
	if err := raiseFileLimit(o.nodes); err != nil {
		return false, err
	}
	sc, err := newScenario(o.scenario, o.nodes)
	if err != nil {
		return false, err
	}
	s, cleanup, err := o.prepare()
	if err != nil {
		return false, err
	}
	defer cleanup()
	r, err := o.begin(ctx, s, sc)
	if err != nil {
		return false, err
	}
	defer s.kill()
	defer r.fleet.close()
	// Figures of a run that did not come to its end are figures too.
	failed := o.measure(ctx, r)
	ok, err := o.report(r)
	return ok, errors.Join(failed, err)
}

// prepare describes the server; cleanup removes what it leaves.
func (o *options) prepare() (s *server, cleanup func(), err error) {
	if o.serverURL != "" {
		s, err = attach(o.serverURL, o.apiKey, o.metrics, o.pid)
		return s, func() {}, err
	}
	cleanup = func() {}
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "signalbox-load-"); err != nil {
			return nil, nil, err
		}
		if !o.keep {
			cleanup = func() { os.RemoveAll(o.dir) }
		}
	} else if err = os.MkdirAll(o.dir, 0o700); err != nil {
		return nil, nil, err
	}
	if strings.Contains(o.binary, "/") {
		if o.binary, err = filepath.Abs(o.binary); err != nil {
			return nil, nil, err
		}
	}
	s, err = newServer(o.binary, o.dir, o.config, o.env)
	return s, cleanup, err
}

// begin starts the server, sets the policy and makes the keys.
func (o *options) begin(ctx context.Context, s *server, sc *scenario) (*run, error) {
	start := s.noiseKey
	if s.binary != "" {
		start = s.start
	}
	serverKey, err := start(ctx)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*run, error) {
		s.kill()
		return nil, err
	}
	keys := map[owner]string{{0, -1}: o.key}
	if o.key == "" {
		// Groups of the policy name users, so these come first; keys for tags
		// need the tags to be in the policy.
		for _, u := range sc.users {
			if _, err := s.user(ctx, u); err != nil {
				return fail(err)
			}
		}
		if err := s.setPolicy(ctx, sc.policy(0)); err != nil {
			return fail(err)
		}
		if keys, err = s.createKeys(ctx, sc); err != nil {
			return fail(err)
		}
	}
	r := &run{
		server: s, limit: o.phaseTimeout, window: o.window,
		figures: &figures{Run: o.name, Command: strings.Join(os.Args, " "), Scenario: o.scenario, Nodes: o.nodes, Sample: o.sample},
		log: func(format string, args ...any) {
			fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05.000 ")+format+"\n", args...)
		},
	}
	r.fleet = newFleet(ctx, fleetConfig{
		nodes: o.nodes, sample: o.sample, sources: o.sources, scenario: sc, addr: s.addr, serverKey: serverKey, keys: keys, derp: o.derp,
		prefix: fmt.Sprintf("l%x-", time.Now().Unix()&0xffff),
	})
	for _, row := range r.fleet.sees {
		r.figures.Peers += float64(row.count()) / float64(o.nodes)
	}
	if r.figures.Peers == 0 {
		r.fleet.close()
		return fail(fmt.Errorf("%s with %d nodes: nobody sees anybody, want more nodes", o.scenario, o.nodes))
	}
	// What the start left behind is not the idle server's.
	if s.trim(ctx) != nil {
		s.live(ctx) // a server that cannot be trimmed: at least without garbage
	}
	r.figures.IdleRSS, _ = memory(s.pid)
	r.figures.IdleLive = s.live(ctx)
	return r, nil
}

func (o *options) measure(ctx context.Context, r *run) error {
	stopProfile := o.cpuProfile(ctx, r.server, "join", 0, profileTime)
	r.join(ctx)
	stopProfile()
	if o.has("change") {
		r.change(ctx, o.changes)
	}
	if o.has("burst") {
		r.burst(ctx, min(100, max(20, o.nodes/2)))
	}
	if o.has("presence") {
		r.presence(ctx)
	}
	if o.has("policy") && o.key == "" {
		if err := r.policy(ctx, o.edits); err != nil {
			return fmt.Errorf("policy edit: %w", err)
		}
	}
	if o.has("steady") {
		stopProfile := o.cpuProfile(ctx, r.server, "steady", 0, o.steady)
		r.steady(ctx, o.steady)
		stopProfile()
	}
	o.heapProfile(ctx, r.server)
	if o.has("restart") && r.server.binary != "" {
		// By then the new process listens.
		stopProfile := o.cpuProfile(ctx, r.server, "restart", 500*time.Millisecond, profileTime)
		if err := r.restart(ctx); err != nil {
			return fmt.Errorf("restart: %w", err)
		}
		stopProfile()
	}
	if o.has("empty") && r.server.binary != "" {
		if err := r.empty(ctx); err != nil {
			return fmt.Errorf("start without clients: %w", err)
		}
	}
	return nil
}

func (o *options) report(r *run) (ok bool, err error) {
	f := r.figures
	f.Faults, f.Warnings = r.fleet.faults.snapshot(), r.fleet.warnings.snapshot()
	var complaints []string
	f.Complaints, complaints = r.server.complaints()
	for _, l := range r.fleet.faults.lines() {
		r.log("FAULT %s", l)
	}
	for _, l := range r.fleet.warnings.lines() {
		r.log("warning %s", l)
	}
	for _, l := range complaints {
		r.log("server log: %s", l)
	}
	if o.jsonPath != "" {
		text, err := json.MarshalIndent(f, "", "\t")
		if err != nil {
			return false, err
		}
		if o.jsonPath == "-" {
			fmt.Printf("%s\n", text)
		} else if err := os.WriteFile(o.jsonPath, append(text, '\n'), 0o644); err != nil {
			return false, err
		}
	}
	if o.jsonPath != "-" {
		fmt.Printf("# %s: %d nodes, %.0f peers each, %d views checked; idle server %s MiB\n%s", f.Run, f.Nodes, f.Peers, f.Sample, mib(f.IdleRSS), tables([]row{{f: f, runs: 1}}))
	}
	if o.keep {
		r.log("data and log in %s", o.dir)
	}
	return f.wrong() == "", nil
}
