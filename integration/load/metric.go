package main

import (
	"cmp"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// A metric is one figure of a run: NaN when the run does not have it, or
// when time did not suffice.
type metric func(*figures) float64

// of makes a metric of a phase.
func of[P any](phase func(*figures) *P, value func(*figures, *P) float64) metric {
	return func(f *figures) float64 {
		if p := phase(f); p != nil {
			return value(f, p)
		}
		return math.NaN()
	}
}

func ofJoin(v func(*figures, *joining) float64) metric {
	return of(func(f *figures) *joining { return f.Join }, v)
}

func ofChange(v func(*figures, *change) float64) metric {
	return of(func(f *figures) *change { return f.Change }, v)
}

func ofBurst(v func(*figures, *burst) float64) metric {
	return of(func(f *figures) *burst { return f.Burst }, v)
}

func ofPolicy(v func(*figures, *edit) float64) metric {
	return of(func(f *figures) *edit { return f.Policy }, v)
}

func ofRestart(v func(*figures, *restart) float64) metric {
	return of(func(f *figures) *restart { return f.Restart }, v)
}

func ofSteady(v func(*figures, *steady) float64) metric {
	return of(func(f *figures) *steady { return f.Steady }, v)
}

func ofEmpty(v func(*figures, *empty) float64) metric {
	return of(func(f *figures) *empty { return f.Empty }, v)
}

// measured is NaN for 0, which stands for what was not reached or not asked.
func measured(v float64) float64 {
	if v == 0 {
		return math.NaN()
	}
	return v
}

var (
	// joinCPU is in ms a join, and what follows in the unit of the field unless said.
	joinCPU     = ofJoin(func(f *figures, j *joining) float64 { return 1000 * j.ServerCPU / float64(max(1, j.Joined)) })
	joinSeconds = ofJoin(func(_ *figures, j *joining) float64 {
		if j.Wrong > 0 {
			return math.NaN()
		}
		return measured(j.Converged)
	})
	joinBytes     = ofJoin(func(_ *figures, j *joining) float64 { return float64(j.BytesClient) })
	joinRevisions = ofJoin(func(_ *figures, j *joining) float64 { return float64(j.Revisions) / float64(max(1, j.Joined)) })

	changeP50   = ofChange(func(_ *figures, c *change) float64 { return c.P50 })
	changeP99   = ofChange(func(_ *figures, c *change) float64 { return c.P99 })
	changeCPU   = ofChange(func(_ *figures, c *change) float64 { return c.CPU })
	changeBytes = ofChange(func(_ *figures, c *change) float64 { return c.BytesClient })
	// changeViewerBytes is per client that sees the changed node.
	changeViewerBytes = ofChange(func(f *figures, c *change) float64 { return c.BytesClient * float64(f.Nodes) / f.Peers })
	changeRevisions   = ofChange(func(_ *figures, c *change) float64 { return float64(c.Revisions) / float64(max(1, c.Changes)) })
	burstSeconds      = ofBurst(func(_ *figures, b *burst) float64 { return b.AllSeen })
	// burstCPU is in ms a change.
	burstCPU = ofBurst(func(_ *figures, b *burst) float64 { return 1000 * b.ServerCPU / float64(max(1, b.Changes)) })

	policySeconds = ofPolicy(func(_ *figures, e *edit) float64 { return e.Last })
	policyCPU     = ofPolicy(func(_ *figures, e *edit) float64 { return e.CPU })
	policyBytes   = ofPolicy(func(_ *figures, e *edit) float64 { return e.BytesClient })

	restartSeconds = ofRestart(func(_ *figures, r *restart) float64 {
		if r.Wrong > 0 {
			return math.NaN()
		}
		return measured(r.AllRight)
	})
	restartCPU = ofRestart(func(_ *figures, r *restart) float64 { return r.ServerCPU })
	// restartClientCPU is in ms a client.
	restartClientCPU = ofRestart(func(f *figures, r *restart) float64 { return 1000 * r.ServerCPU / float64(f.Nodes) })
	restartBytes     = ofRestart(func(_ *figures, r *restart) float64 { return float64(r.BytesClient) })

	// atRest is in per cent of a core.
	atRest     = ofSteady(func(_ *figures, s *steady) float64 { return 100 * s.ServerCPU / s.Wall })
	rssClient  = ofSteady(func(_ *figures, s *steady) float64 { return float64(s.RSSClient) })
	trimClient = ofSteady(func(_ *figures, s *steady) float64 { return measured(float64(s.TrimmedClient)) })
	// sessionsRSS is what sessions add to a server that knows the nodes.
	sessionsRSS = ofSteady(func(f *figures, s *steady) float64 {
		if f.Empty == nil || f.Empty.TrimmedRSS == 0 || s.TrimmedRSS == 0 {
			return math.NaN()
		}
		return float64(s.TrimmedRSS - f.Empty.TrimmedRSS)
	})
	knownRSS     = ofEmpty(func(_ *figures, e *empty) float64 { return measured(float64(e.TrimmedRSS)) })
	startSeconds = ofEmpty(func(_ *figures, e *empty) float64 { return e.Listening })

	broken metric = func(f *figures) float64 { return float64(f.Faults["session broken"].Count) }
)

// medians puts the figures of several runs together, as their tags say. Of
// two middle ones the greater counts. Faults and warnings add up.
func medians(runs []*figures) *figures {
	out := new(figures)
	values := make([]reflect.Value, len(runs))
	for i, f := range runs {
		values[i] = reflect.ValueOf(f).Elem()
	}
	putTogether(reflect.ValueOf(out).Elem(), values)
	out.Faults, out.Warnings = map[string]kind{}, map[string]kind{}
	for _, f := range runs {
		for name, k := range f.Faults {
			out.Faults[name] = kind{out.Faults[name].Count + k.Count, append(out.Faults[name].Examples, k.Examples...)}
		}
		for name, k := range f.Warnings {
			out.Warnings[name] = kind{out.Warnings[name].Count + k.Count, append(out.Warnings[name].Examples, k.Examples...)}
		}
	}
	return out
}

// putTogether sets the fields of a struct from those of others of its type. A
// phase that some runs lack counts where it is there.
func putTogether(out reflect.Value, from []reflect.Value) {
	for i := range out.NumField() {
		var fields []reflect.Value
		for _, v := range from {
			if f := v.Field(i); f.Kind() != reflect.Pointer {
				fields = append(fields, f)
			} else if !f.IsNil() {
				fields = append(fields, f.Elem())
			}
		}
		if len(fields) == 0 {
			continue
		}
		switch field := out.Field(i); field.Kind() {
		case reflect.Pointer:
			field.Set(reflect.New(field.Type().Elem()))
			putTogether(field.Elem(), fields)
		case reflect.String:
			field.Set(fields[0])
		case reflect.Int, reflect.Int64:
			slices.SortFunc(fields, func(a, b reflect.Value) int { return cmp.Compare(a.Int(), b.Int()) })
			field.Set(pick(out.Type().Field(i), fields))
		case reflect.Float64:
			slices.SortFunc(fields, func(a, b reflect.Value) int { return cmp.Compare(a.Float(), b.Float()) })
			field.Set(pick(out.Type().Field(i), fields))
		}
	}
}

func pick(f reflect.StructField, sorted []reflect.Value) reflect.Value {
	switch f.Tag.Get("runs") {
	case "min":
		return sorted[0]
	case "max":
		return sorted[len(sorted)-1]
	}
	return sorted[len(sorted)/2]
}

// A target is a figure that this project promises for a machine of two cores
// that the load tool shares.
type target struct {
	what     string
	scenario string
	nodes    int // 0 = all configurations, of which the worst counts
	limit    float64
	unit     string
	of       metric
}

var targets = []target{
	{"join, server CPU a node", "allow-all", 200, 4, "ms", joinCPU},
	{"join, server CPU a node", "allow-all", 500, 5, "ms", joinCPU},
	{"join, server CPU a node", "allow-all", 1000, 6, "ms", joinCPU},
	{"joined, and every view right", "allow-all", 500, 4, "s", joinSeconds},
	{"joined, and every view right", "acls", 500, 5, "s", joinSeconds},
	{"joined, and every view right", "allow-all", 2000, 15, "s", joinSeconds},
	{"joined, and every view right", "allow-all", 5000, 35, "s", joinSeconds},
	{"endpoint change to all, p50", "allow-all", 500, 20, "ms", changeP50},
	{"endpoint change to all, p99", "allow-all", 500, 60, "ms", changeP99},
	{"100 changes at once, seen by all", "allow-all", 500, .15, "s", burstSeconds},
	{"bytes a client a change", "allow-all", 500, 160, "B", changeBytes},
	{"policy edit, to the last", "allow-all", 500, .2, "s", policySeconds},
	{"policy edit, server CPU", "allow-all", 500, .05, "s", policyCPU},
	{"SIGKILL and start, until every view is right", "allow-all", 500, 4, "s", restartSeconds},
	{"SIGKILL and start, server CPU", "allow-all", 500, 2, "s", restartCPU},
	{"SIGKILL and start, until every view is right", "allow-all", 5000, 25, "s", restartSeconds},
	{"memory a connected client, trimmed", "allow-all", 10000, 60, "KB", func(f *figures) float64 { return trimClient(f) / 1000 }},
	{"sessions broken by the server, in all runs", "", 0, 0, "", broken},
	{"10,000 sessions held, change to all, p99", "allow-all", 10000, 1000, "ms", changeP99},
	{"10,000 sessions held, steady state, of a core", "allow-all", 10000, 2, "%", atRest},
}

// verdicts sets each target beside what was measured. A target is not met
// when one run of its configuration failed, whatever the others say.
func verdicts(rows []row) string {
	out := "\n| Target | run | at most | measured | runs | |\n|---|---|---|---|---|---|\n"
	for _, t := range targets {
		where := "all"
		if t.nodes > 0 {
			where = fmt.Sprintf("%s %d", t.scenario, t.nodes)
		}
		worst, runs, failed := math.NaN(), 0, 0
		for _, r := range rows {
			if t.nodes > 0 && (r.f.Scenario != t.scenario || r.f.Nodes != t.nodes) {
				continue
			}
			runs, failed = runs+r.runs, failed+r.failed
			if v := t.of(r.f); math.IsNaN(worst) || v > worst {
				worst = v
			}
		}
		unit := strings.TrimRight(" "+t.unit, " ")
		value, verdict := three(worst)+unit, "met"
		switch {
		case runs == 0:
			value, verdict = "-", "not measured"
		case math.IsNaN(worst):
			value, verdict = "-", "**not met**: no figure"
		case worst > t.limit:
			verdict = "**not met**"
		}
		if failed > 0 {
			verdict = fmt.Sprintf("**not met**: %d of %d runs failed", failed, runs)
		}
		out += fmt.Sprintf("| %s | %s | %s%s | %s | %d | %s |\n", t.what, where, three(t.limit), unit, value, runs, verdict)
	}
	return out
}

// three renders a number with about three digits that count.
func three(v float64) string {
	v, _ = strconv.ParseFloat(fmt.Sprintf("%.6g", v), 64) // without the noise of sums
	switch a := math.Abs(v); {
	case math.IsNaN(v):
		return "-"
	case a >= 1000:
		return thousands(v)
	case a >= 100 || v == math.Trunc(v):
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.2g", v)
}

// thousands renders a number without a fraction, in groups of three digits.
func thousands(v float64) string {
	digits := fmt.Sprintf("%.0f", v)
	for i := len(digits) - 3; i > 0 && digits[i-1] != '-'; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}
