package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A chart is a plot of cost against the number of nodes, both axes
// logarithmic: a cost that grows with a power of N is a straight line, and the
// power its slope.
type chart struct {
	file  string // without .svg
	title string
	unit  string // of the y axis; B is shown as B, KB, MB
	kinds []kindOfCurve
}

// kindOfCurve is drawn for each scenario: the first kind solid, the second
// dashed.
type kindOfCurve struct {
	name string
	of   metric
}

var charts = []chart{
	{"join-cpu", "Join: server CPU a node", "ms", []kindOfCurve{{"", joinCPU}}},
	{"join-time", "From the first dial until every view is right", "s", []kindOfCurve{{"", joinSeconds}}},
	{"change-time", "Endpoint change until a viewer has it", "ms", []kindOfCurve{{"p99", changeP99}, {"p50", changeP50}}},
	{"change-cpu", "Endpoint change: server CPU", "ms", []kindOfCurve{{"", changeCPU}}},
	{"policy-time", "Policy edit until the last viewer has it", "s", []kindOfCurve{{"", policySeconds}}},
	{"policy-cpu", "Policy edit: server CPU", "s", []kindOfCurve{{"", policyCPU}}},
	{"restart-time", "SIGKILL and start until every view is right", "s", []kindOfCurve{{"", restartSeconds}}},
	{"restart-cpu", "SIGKILL and start: server CPU", "s", []kindOfCurve{{"", restartCPU}}},
	{"bytes", "Bytes to a client", "B", []kindOfCurve{{"join", joinBytes}, {"restart", restartBytes}}},
	{"memory", "Memory a connected client", "B", []kindOfCurve{{"trimmed", trimClient}, {"at rest", rssClient}}},
}

// A curve is one line of a chart.
type curve struct {
	name     string
	scenario int // colour and shape
	dashed   bool
	points   []point
}

type point struct {
	x, y   float64
	failed bool   // a run of it failed
	note   string // shown under the pointer
}

// curves are the lines of a chart that have points.
func (c *chart) curves(rows []row) []curve {
	var out []curve
	for s, scenario := range scenarios {
		for k, kind := range c.kinds {
			line := curve{name: strings.TrimRight(scenario+", "+kind.name, ", "), scenario: s, dashed: k > 0}
			for _, r := range rows {
				// Logarithms need numbers above 0.
				if y := kind.of(r.f); r.f.Scenario == scenario && y > 0 {
					note := fmt.Sprintf("%s: %s, runs: %s", r.f.Run, c.label(y), strings.ReplaceAll(r.count(), "*", ""))
					line.points = append(line.points, point{float64(r.f.Nodes), y, r.failed > 0, note})
				}
			}
			if len(line.points) > 0 {
				out = append(out, line)
			}
		}
	}
	return out
}

// slope is the power of N that a curve grows with: the straight line through
// the logarithms (least squares). NaN if there is only one N.
func (c curve) slope() float64 {
	var n, sx, sy, sxx, sxy float64
	for _, p := range c.points {
		x, y := math.Log(p.x), math.Log(p.y)
		n, sx, sy, sxx, sxy = n+1, sx+x, sy+y, sxx+x*x, sxy+x*y
	}
	d := n*sxx - sx*sx
	if d < 1e-9 {
		return math.NaN()
	}
	return (n*sxy - sx*sy) / d
}

func (c curve) legend() string {
	if s := c.slope(); !math.IsNaN(s) {
		return fmt.Sprintf("%s: N^%.2f", c.name, s)
	}
	return c.name
}

// label renders a value of the y axis.
func (c *chart) label(v float64) string {
	if c.unit == "B" {
		return size(int64(math.Round(v)))
	}
	return three(v) + " " + c.unit
}

// An axis maps values to a stretch of pixels by their logarithms.
type axis struct {
	ticks    []float64 // 1, 2, 5, 10, ...: the first and the last are the ends
	from, to float64   // pixels
}

// newAxis covers all values, and at least one step.
func newAxis(values []float64, from, to float64) axis {
	lo, hi := slices.Min(values), slices.Max(values)
	a := axis{from: from, to: to}
	for e := math.Floor(math.Log10(lo)); ; e++ {
		for _, m := range []float64{1, 2, 5} {
			t := m * math.Pow(10, e)
			if t <= lo*(1+1e-9) {
				a.ticks = a.ticks[:0] // the last one at or below lo is the end
			}
			a.ticks = append(a.ticks, t)
			if t >= hi*(1-1e-9) && len(a.ticks) > 1 {
				return a
			}
		}
	}
}

func (a axis) at(v float64) float64 {
	lo, hi := math.Log(a.ticks[0]), math.Log(a.ticks[len(a.ticks)-1])
	return a.from + (a.to-a.from)*(math.Log(v)-lo)/(hi-lo)
}

// labelled says which ticks have a label: all, or whole powers of ten when
// there are many.
func (a axis) labelled(t float64) bool {
	l := math.Log10(t)
	return len(a.ticks) <= 10 || math.Abs(l-math.Round(l)) < 1e-6
}

// The picture's size, and the place of the plot in it.
const (
	width, height            = 800, 400
	left, right, top, bottom = 76, 540, 44, 346
)

// style gives a picture a background of its own, so that it can be read on a
// page of any colour, and follows the reader's choice of light or dark.
const style = `
text{font:13px system-ui,sans-serif;fill:#1c2024}
.title{font-size:16px;font-weight:600}.end{text-anchor:end}.mid{text-anchor:middle}
.page{fill:#fff}.grid{stroke:#dde1e6}
.c0{stroke:#1f5fa8;fill:#1f5fa8}.c1{stroke:#b04a12;fill:#b04a12}.c2{stroke:#23774a;fill:#23774a}
.failed{fill:#fff;stroke-width:2}
@media (prefers-color-scheme:dark){
text{fill:#e6e8ea}.page{fill:#14171a}.grid{stroke:#343a40}
.c0{stroke:#7fb6f5;fill:#7fb6f5}.c1{stroke:#f3a76e;fill:#f3a76e}.c2{stroke:#7ed3a1;fill:#7ed3a1}
.failed{fill:#14171a}
}
polyline.c0,polyline.c1,polyline.c2{fill:none;stroke-width:2}.dashed{stroke-dasharray:6 4}
`

// svg draws the chart; "" when there is nothing to draw.
func (c *chart) svg(rows []row) string {
	curves := c.curves(rows)
	var xs, ys []float64
	for _, l := range curves {
		for _, p := range l.points {
			xs, ys = append(xs, p.x), append(ys, p.y)
		}
	}
	if len(xs) == 0 {
		return ""
	}
	x, y := newAxis(xs, left, right), newAxis(ys, bottom, top)
	var b strings.Builder
	put := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	put(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="%s">`, width, height, width, height, escape(c.alt(rows)))
	put(`<style>%s</style>`, style)
	put(`<rect class="page" width="%d" height="%d"/>`, width, height)
	put(`<text class="title" x="%d" y="24">%s</text>`, left, escape(c.title))
	for _, t := range x.ticks {
		put(`<line class="grid" x1="%.1f" y1="%d" x2="%.1f" y2="%d"/>`, x.at(t), top, x.at(t), bottom)
		if x.labelled(t) {
			put(`<text class="mid" x="%.1f" y="%d">%s</text>`, x.at(t), bottom+18, thousands(t))
		}
	}
	for _, t := range y.ticks {
		put(`<line class="grid" x1="%d" y1="%.1f" x2="%d" y2="%.1f"/>`, left, y.at(t), right, y.at(t))
		if y.labelled(t) {
			put(`<text class="end" x="%d" y="%.1f">%s</text>`, left-8, y.at(t)+4, c.label(t))
		}
	}
	put(`<text class="mid" x="%d" y="%d">nodes (N)</text>`, (left+right)/2, bottom+40)
	for i, l := range curves {
		class := fmt.Sprintf("c%d", l.scenario)
		dash := class
		if l.dashed {
			dash += " dashed"
		}
		var path []string
		for _, p := range l.points {
			path = append(path, fmt.Sprintf("%.1f,%.1f", x.at(p.x), y.at(p.y)))
		}
		put(`<polyline class="%s" points="%s"/>`, dash, strings.Join(path, " "))
		for _, p := range l.points {
			put(`%s`, marker(l.scenario, x.at(p.x), y.at(p.y), p))
		}
		at := float64(top + 12 + 24*i)
		put(`<polyline class="%s" points="%d,%.0f %d,%.0f"/>`, dash, right+16, at-4, right+46, at-4)
		put(`%s`, marker(l.scenario, right+31, at-4, point{note: l.name}))
		put(`<text x="%d" y="%.0f">%s</text>`, right+54, at, escape(l.legend()))
	}
	put(`</svg>`)
	return b.String()
}

// marker is a shape that tells scenarios apart without colours. It is hollow
// when a run failed.
func marker(scenario int, x, y float64, p point) string {
	class := fmt.Sprintf("c%d", scenario)
	if p.failed {
		class += " failed"
	}
	var shape string
	switch scenario {
	case 0:
		shape = fmt.Sprintf(`circle cx="%.1f" cy="%.1f" r="4"`, x, y)
	case 1:
		shape = fmt.Sprintf(`rect x="%.1f" y="%.1f" width="8" height="8"`, x-4, y-4)
	default:
		shape = fmt.Sprintf(`polygon points="%.1f,%.1f %.1f,%.1f %.1f,%.1f"`, x, y-5, x-5, y+4, x+5, y+4)
	}
	name, _, _ := strings.Cut(shape, " ")
	return fmt.Sprintf(`<%s class="%s"><title>%s</title></%s>`, shape, class, escape(p.note), name)
}

// alt says in words what the picture shows.
func (c *chart) alt(rows []row) string {
	var lines []string
	for _, l := range c.curves(rows) {
		lines = append(lines, l.legend())
	}
	return c.title + " (" + strings.Join(lines, "; ") + ")"
}

func escape(s string) string {
	var b bytes.Buffer
	xml.EscapeText(&b, []byte(s)) // a Buffer takes everything
	return b.String()
}

// writePlots draws what has points, and takes away what has none any more.
func writePlots(dir string, records []record) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	all := rows(records)
	for _, c := range charts {
		path := filepath.Join(dir, c.file+".svg")
		text := c.svg(all)
		var err error
		if text != "" {
			err = os.WriteFile(path, []byte(text), 0o644)
		} else if err = os.Remove(path); os.IsNotExist(err) {
			err = nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// drawPlots is the verb plot.
func drawPlots(_ context.Context, args []string) (bool, error) {
	set := flag.NewFlagSet("load plot", flag.ExitOnError)
	dir := set.String("out", "docs/plots", "directory for the plots")
	records, err := fromFile(set, args)
	if err != nil {
		return false, err
	}
	return true, writePlots(*dir, records)
}
