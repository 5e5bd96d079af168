package main

import (
	"context"
	"flag"
	"fmt"
	"math"
	"strings"
)

// A line is a cost that grows with a number: fixed + each·x.
type line struct {
	fixed, each float64
	off         float64 // largest distance of a point from it, as a part of the point; NaN = not measured
}

func (l line) at(x float64) float64 { return l.fixed + l.each*x }

// fit is the line that is nearest to the points in proportion, so that small
// N count as much as great ones. Neither part is ever below 0: a negative cost
// would make an estimate look better than it is.
func fit(xs, ys []float64) line {
	var n, sx, sy, sxx, sxy float64 // weighted by 1/y²
	for i, x := range xs {
		y := ys[i]
		w := 1 / (y * y)
		n, sx, sy, sxx, sxy = n+w, sx+w*x, sy+w*y, sxx+w*x*x, sxy+w*x*y
	}
	d := n*sxx - sx*sx
	if len(xs) < 2 || d <= 1e-9*n*sxx {
		return line{math.NaN(), math.NaN(), math.NaN()}
	}
	l := line{each: (n*sxy - sx*sy) / d}
	l.fixed = (sy - l.each*sx) / n
	if l.fixed < 0 {
		l.fixed, l.each = 0, sxy/sxx
	}
	if l.each < 0 {
		l.fixed, l.each = sy/n, 0
	}
	for i, x := range xs {
		l.off = max(l.off, math.Abs(l.at(x)-ys[i])/ys[i])
	}
	return l
}

// A unit is a measured cost, as a line over the number of nodes in allow-all,
// where each sees all others.
type unit struct {
	sign, what string // as in the formulas, and in words
	of         metric
	scale      float64 // from the metric's unit to that of the formulas
	dim        string
}

// The units that the estimate is made of. CPU is that of the server.
var units = []unit{
	{"B", "bytes of a session's start: KeepAlive, full map, its connection", restartBytes, 1, "B"},
	{"C", "CPU of a session's start: handshake, map request, full map", restartClientCPU, 1e-3, "s"},
	{"J", "CPU of a join: registration, database, session, what the others are told", joinCPU, 1e-3, "s"},
	{"D", "CPU of a change sent by itself", changeCPU, 1e-3, "s"},
	{"E", "CPU of a change among a hundred at once", burstCPU, 1e-3, "s"},
	{"P", "CPU of a policy edit that touches every filter", policyCPU, 1, "s"},
	{"K", "CPU at rest, in a second", atRest, 1e-2, "s"},
	{"M", "memory to know the nodes, no session", knownRSS, 1, "B"},
	{"S", "memory of the sessions beside that", sessionsRSS, 1, "B"},
	{"T", "start of a server that knows the nodes", startSeconds, 1, "s"},
}

// constants are costs that do not depend on N; that of the largest
// configuration counts.
var constants = []unit{
	{"b", "bytes of a change, to each client that sees the node", changeViewerBytes, 1, "B"},
	{"p", "bytes of a policy edit, to each client", policyBytes, 1, "B"},
	{"v", "revisions that a change takes", changeRevisions, 1, ""},
	{"j", "revisions that a join takes", joinRevisions, 1, ""},
}

// assumptions are what is not measured here.
type assumptions struct {
	nodes    float64
	changes  float64 // of a node in an hour: endpoints, home relay, coming and going
	edits    float64 // of the policy in an hour
	cores    float64 // of a server
	memory   float64 // of a server, bytes
	network  float64 // of a server, bytes a second
	back     float64 // seconds within which all clients shall be back after a restart of all servers
	load     float64 // part of cores and network that every day may take
	rows     float64 // change rows a second that the database takes
	commits  float64 // transactions a second that it takes
	gapEach  float64 // seconds between announcements a session while changes do not end, and at most
	gapLimit float64
}

// assumed are the defaults. The database's are those of PostgreSQL 15 on two
// cores, writers on two servers, fifty changes a transaction, fsync on.
var assumed = assumptions{
	nodes: 100_000, changes: 2, edits: 10, cores: 2, memory: 8 << 30, network: 125e6, back: 60, load: .5,
	rows: 10_600, commits: 213, gapEach: 500e-6, gapLimit: .5,
}

// An estimate is the table for one number of peers that a node sees.
type estimate struct {
	servers float64
	cells   []string
}

// paper is the estimate for so many nodes, from the units of the file.
func paper(all []row, a assumptions, peers []float64) string {
	line, constant := map[string]line{}, map[string]float64{}
	var out strings.Builder
	put := func(format string, args ...any) { fmt.Fprintf(&out, format+"\n", args...) }
	put("| Unit | | fixed | each node | off by at most |\n|---|---|---|---|---|")
	for _, u := range units {
		l := u.line(all)
		line[u.sign] = l
		put("| %s(x) | %s | %s | %s | %s |", u.sign, u.what, quantity(l.fixed, u.dim), quantity(l.each, u.dim), percent(math.Round(1000*l.off)/1000))
	}
	put("\n| Constant | | |\n|---|---|---|")
	for _, u := range constants {
		constant[u.sign] = u.largest(all)
		put("| %s | %s | %s |", u.sign, u.what, quantity(constant[u.sign], u.dim))
	}
	put("\n| Assumed | |\n|---|---|")
	put("| nodes N | %s |", thousands(a.nodes))
	put("| changes of a node in an hour: endpoints, home relay, coming and going | %s |", three(a.changes))
	put("| policy edits in an hour | %s |", three(a.edits))
	put("| a server | %s cores as measured, %s of memory, %s/s of network |", three(a.cores), quantity(a.memory, "B"), quantity(a.network, "B"))
	put("| all clients are back after a restart of all servers | within %s s |", three(a.back))
	put("| cores and network that the everyday load may take | %s |", percent(a.load))
	put("| the database | %s transactions and %s change rows a second |", thousands(a.commits), thousands(a.rows))

	var columns []estimate
	heads := ""
	for _, v := range peers {
		columns = append(columns, a.estimate(line, constant, v))
		heads += fmt.Sprintf(" | each sees %s", thousands(v))
	}
	put("\n| What | Formula%s |\n|---|---%s|", heads, strings.Repeat("|---", len(peers)))
	for i, d := range demands {
		cells := ""
		for _, c := range columns {
			cells += " | " + c.cells[i]
		}
		put("| %s | %s%s |", d.what, d.formula, cells)
	}
	return out.String()
}

func (u unit) points(all []row) (xs, ys []float64) {
	for _, r := range all {
		if y := u.of(r.f) * u.scale; r.f.Scenario == "allow-all" && r.failed == 0 && y > 0 {
			xs, ys = append(xs, float64(r.f.Nodes)), append(ys, y)
		}
	}
	return xs, ys
}

func (u unit) line(all []row) line { return fit(u.points(all)) }

func (u unit) largest(all []row) float64 {
	_, ys := u.points(all) // rows come in the order of their nodes
	if len(ys) == 0 {
		return math.NaN()
	}
	return ys[len(ys)-1]
}

// A demand is a line of the estimate.
type demand struct{ what, formula, dim string }

// demands are computed, in this order, by assumptions.estimate. V is how many
// others a node sees, n = N/S the sessions of a server, R = N·changes/3600 the
// changes in a second, g = min(500 µs·n, 0.5 s) the server's time between
// announcements while changes do not end; ° is the fixed part of a unit and ′
// the part of each node. A change costs its server D° and each server that
// follows it E°; each delta D′, and each change in a delta E′.
var demands = []demand{
	{"full map of a client", "B(V)", "B"},
	{"restart of all: bytes", "N·B(V)", "B"},
	{"restart of all: CPU", "N·C(V)", "s"},
	{"servers for that", "max(N·C(V)/cores, N·B(V)/network) / time", ""},
	{"memory to know all nodes, each server", "M(N)", "B"},
	{"memory of all sessions", "S(N)", "B"},
	{"servers for that", "S(N) / (memory·¾ − M(N))", ""},
	{"changes a second R", "N·changes/3600", "/s"},
	{"deltas a second", "N·min(R·V/N, 1/g)", "/s"},
	{"changes: CPU", "deltas·D′ + R·V·E′ + R·(D° + S·E°) + K(N)", "cores"},
	{"changes: bytes", "R·V·b", "B/s"},
	{"servers for that", "max(CPU/cores, bytes/network) / everyday part", ""},
	{"**servers S**", "1 + the most of these: one may fail", ""},
	{"all restart: back after", "max(N·C(V)/cores, N·B(V)/network) / S + T(N)", "s"},
	{"one dies: its clients are back after", "max(n·C(V)/cores, n·B(V)/network) / (S−1)", "s"},
	{"at rest, of a server's cores", "changes: CPU / (S·cores)", "%"},
	{"network of a server", "changes: bytes / S", "B/s"},
	{"policy edit: CPU of each server", "at most P(N)", "s"},
	{"policy edits: bytes a day", "24·edits·N·p", "B"},
	{"all join anew: CPU", "N·J(V)", "s"},
	{"all join anew: database", "N·j / commits", "s"},
	{"database: change rows a second", "R", "/s"},
	{"of what it takes", "R / rows", "%"},
	{"database: transactions a second", "at most min(R·v, commits)", "/s"},
	{"database: read by servers, rows a second", "R·S", "/s"},
	{"restart of all: attachments a second", "N / time", "/s"},
	{"of what it takes", "N / time / rows", "%"},
}

// estimate computes the demands for nodes that see v others. Where the
// number of servers appears in what decides it (g depends on n), it is
// counted up until it suffices.
func (a assumptions) estimate(line map[string]line, constant map[string]float64, v float64) estimate {
	n := a.nodes
	start, startBytes := n*line["C"].at(v), n*line["B"].at(v)
	atOnce := max(start/a.cores, startBytes/a.network)
	forStart := math.Ceil(atOnce / a.back)
	room := a.memory*.75 - line["M"].at(n)
	forMemory := math.Ceil(line["S"].at(n) / room)
	if room <= 0 {
		forMemory = math.Inf(1)
	}
	r := n * a.changes / 3600
	bytes := r * v * constant["b"]
	// everyDay is deltas and CPU with so many servers.
	everyDay := func(servers float64) (deltas, cpu float64) {
		gap := min(a.gapEach*n/servers, a.gapLimit)
		deltas = n * min(r*v/n, 1/gap)
		sent := deltas*line["D"].each + r*v*line["E"].each
		return deltas, sent + r*(line["D"].fixed+servers*line["E"].fixed) + line["K"].at(n)
	}
	need := func(servers float64) float64 {
		_, cpu := everyDay(servers)
		return math.Ceil(max(cpu/a.cores, bytes/a.network) / a.load)
	}
	forDays := 1.0
	for forDays < n && need(forDays) > forDays {
		forDays++
	}
	servers := 1 + max(forStart, forMemory, forDays)
	deltas, cpu := everyDay(servers)
	values := []float64{
		line["B"].at(v), startBytes, start, forStart,
		line["M"].at(n), line["S"].at(n), forMemory,
		r, deltas, cpu, bytes, forDays,
		servers,
		atOnce/servers + line["T"].at(n), atOnce / servers / (servers - 1),
		cpu / servers / a.cores, bytes / servers,
		line["P"].at(n), 24 * a.edits * n * constant["p"],
		n * line["J"].at(v), n * constant["j"] / a.commits,
		r, r / a.rows, min(r*constant["v"], a.commits), r * servers,
		n / a.back, n / a.back / a.rows,
	}
	e := estimate{servers: servers}
	for i, x := range values {
		e.cells = append(e.cells, quantity(x, demands[i].dim))
	}
	return e
}

// quantity renders a value with its unit.
func quantity(v float64, dim string) string {
	switch {
	case math.IsNaN(v):
		return "not measured"
	case math.IsInf(v, 0):
		return "impossible"
	case dim == "%":
		return percent(v)
	case dim == "B/s":
		return quantity(v, "B") + "/s"
	case v == 0:
		return "0"
	case dim == "B":
		for _, u := range []struct {
			from, of float64
			name     string
		}{{1e12, 1e12, "TB"}, {1e9, 1e9, "GB"}, {1e6, 1e6, "MB"}, {1e4, 1e3, "KB"}} {
			if v >= u.from {
				return three(v/u.of) + " " + u.name
			}
		}
		return three(v) + " B"
	case dim == "s" && v < .9995e-3:
		return three(v*1e6) + " µs"
	case dim == "s" && v < .9995:
		return three(v*1e3) + " ms"
	case dim == "/s":
		return three(v) + "/s"
	}
	return strings.TrimRight(three(v)+" "+dim, " ")
}

func percent(v float64) string {
	if math.IsNaN(v) {
		return "-"
	}
	return three(100*v) + " %"
}

// showPaper is the verb paper.
func showPaper(_ context.Context, args []string) (bool, error) {
	set := flag.NewFlagSet("load paper", flag.ExitOnError)
	a := assumed
	set.Float64Var(&a.nodes, "nodes", a.nodes, "nodes")
	peers := set.Float64("peers", 1000, "others that a node sees under a policy; the second column is always all")
	set.Float64Var(&a.changes, "changes", a.changes, "changes of a node in an hour")
	set.Float64Var(&a.edits, "edits", a.edits, "policy edits in an hour")
	set.Float64Var(&a.cores, "cores", a.cores, "cores of a server")
	set.Float64Var(&a.memory, "memory", a.memory, "bytes of memory of a server")
	set.Float64Var(&a.network, "network", a.network, "bytes a second of a server's network")
	set.Float64Var(&a.back, "back", a.back, "seconds within which all are back after a restart of all servers")
	set.Float64Var(&a.load, "load", a.load, "part of cores and network for the everyday load")
	set.Float64Var(&a.rows, "rows", a.rows, "change rows a second that the database takes")
	set.Float64Var(&a.commits, "commits", a.commits, "transactions a second that the database takes")
	records, err := fromFile(set, args)
	if err == nil {
		fmt.Print(paper(rows(records), a, []float64{*peers, a.nodes - 1}))
	}
	return true, err
}
