package main

import (
	"fmt"
	"strings"
)

// row is a line of the tables: one configuration, with the medians of its
// runs.
type row struct {
	f            *figures // of the runs that gave figures; all phases nil if none did
	runs, failed int      // failed ones are among runs
}

func (r row) name() string {
	if r.f.Sample > 0 && r.f.Sample < r.f.Nodes {
		return fmt.Sprintf("%s, %d views", r.f.Run, r.f.Sample)
	}
	return r.f.Run
}

func (r row) count() string {
	if r.failed > 0 {
		return fmt.Sprintf("%d, **%d failed**", r.runs, r.failed)
	}
	return fmt.Sprint(r.runs)
}

// tables renders figures as Markdown tables, one for each kind of phase.
func tables(rows []row) string {
	return joinTable(rows) + changeTable(rows) + restartTable(rows) + restTable(rows)
}

// table renders the rows for which cells returns something; "" if there are
// none.
func table(title, head string, rows []row, cells func(*figures) []string) string {
	var lines []string
	for _, r := range rows {
		if c := cells(r.f); c != nil {
			lines = append(lines, fmt.Sprintf("| %s | %s | %s |", r.name(), r.count(), strings.Join(c, " | ")))
		}
	}
	if len(lines) == 0 {
		return ""
	}
	head = "| Run | runs | " + head + " |"
	return fmt.Sprintf("\n%s:\n\n%s\n%s|\n%s\n", title, head, strings.Repeat("|---", strings.Count(head, "|")-1), strings.Join(lines, "\n"))
}

func joinTable(rows []row) string {
	const head = "joined | joins/s | register p50/p99 ms | join p50/p99 ms | conv s | server CPU s (a join) | load CPU s | peak RSS MiB | B to a client | sessions broken"
	return table("Join", head, rows, func(f *figures) []string {
		j := f.Join
		if j == nil {
			return []string{"failed", "-", "-", "-", "-", "-", "-", "-", "-", "-"}
		}
		return []string{
			fmt.Sprintf("%d/%d", j.Joined, f.Nodes), fmt.Sprintf("%.0f", j.PerSecond),
			fmt.Sprintf("%.0f / %.0f", j.RegisterP50, j.RegisterP99), fmt.Sprintf("%.0f / %.0f", j.JoinP50, j.JoinP99),
			inTime(j.Converged, j.Wrong), fmt.Sprintf("%.2f (%.1f ms)", j.ServerCPU, joinCPU(f)), fmt.Sprintf("%.1f", j.LoadCPU),
			mib(j.PeakRSS), size(j.BytesClient), fmt.Sprint(j.Broken),
		}
	})
}

func changeTable(rows []row) string {
	const head = "1 change p50 / p99 / max ms | ack p50 ms | CPU ms a change | B a client a change | changes at once: all seen s, CPU s | offline / online max s | policy p50 / last s (viewers) | policy CPU s | policy B a client"
	return table("Changes", head, rows, func(f *figures) []string {
		c, b, p, e := f.Change, f.Burst, f.Presence, f.Policy
		if c == nil && b == nil && p == nil && e == nil {
			return nil
		}
		out := []string{"-", "-", "-", "-", "-", "-", "-", "-", "-"}
		if c != nil {
			out[0] = fmt.Sprintf("%.0f / %.0f / %.0f%s", c.P50, c.P99, c.Max, missed(c.Missing))
			out[1], out[2], out[3] = fmt.Sprintf("%.1f", c.AckP50), fmt.Sprintf("%.1f", c.CPU), fmt.Sprintf("%.0f B", c.BytesClient)
		}
		if b != nil {
			out[4] = fmt.Sprintf("%d: %.2f, %.2f%s", b.Changes, b.AllSeen, b.ServerCPU, missed(b.Missing))
		}
		if p != nil {
			out[5] = fmt.Sprintf("%.2f%s / %.2f%s", p.Offline, missed(p.OfflineMissing), p.Online, missed(p.OnlineMissing))
		}
		if e != nil {
			out[6] = fmt.Sprintf("%.3f / %.3f%s (%d)", e.P50, e.Last, missed(e.Missing), e.Viewers)
			out[7], out[8] = fmt.Sprintf("%.3f", e.CPU), fmt.Sprintf("%.0f B", e.BytesClient)
		}
		return out
	})
}

func restartTable(rows []row) string {
	const head = "listening s | first map p50 / max s | all right s | server CPU s | load CPU s | peak RSS MiB | B a client | map frames | sessions broken | told offline"
	return table("SIGKILL and start", head, rows, func(f *figures) []string {
		r := f.Restart
		if r == nil {
			return nil
		}
		return []string{
			fmt.Sprintf("%.2f", r.Listening), fmt.Sprintf("%.1f / %.1f", r.FirstMapP50, r.FirstMapMax), inTime(r.AllRight, r.Wrong),
			fmt.Sprintf("%.2f", r.ServerCPU), fmt.Sprintf("%.1f", r.LoadCPU), mib(r.PeakRSS), size(r.BytesClient), fmt.Sprint(r.Frames),
			fmt.Sprint(r.Broken), fmt.Sprint(r.WentOffline),
		}
	})
}

func restTable(rows []row) string {
	const head = "wall s | CPU of a core | RSS MiB | RSS a client | trimmed a client | live a client | goroutines | knowing the nodes, no session: RSS MiB"
	return table("At rest", head, rows, func(f *figures) []string {
		s, trimmed, known := f.Steady, "-", "-"
		if s == nil {
			return nil
		}
		if s.TrimmedRSS > 0 {
			trimmed = size(s.TrimmedClient)
		}
		if f.Empty != nil && f.Empty.TrimmedRSS > 0 {
			known = mib(f.Empty.TrimmedRSS)
		}
		return []string{
			fmt.Sprintf("%.0f", s.Wall), fmt.Sprintf("%.2f %%", atRest(f)), mib(s.RSS), size(s.RSSClient), trimmed, size(s.LiveClient),
			fmt.Sprint(s.Goroutines), known,
		}
	})
}

func size(n int64) string {
	switch {
	case n < 10_000:
		return fmt.Sprintf("%d B", n)
	case n < 10_000_000:
		return fmt.Sprintf("%.0f KB", float64(n)/1000)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}

func mib(n int64) string { return fmt.Sprintf("%.0f", float64(n)/(1<<20)) }

// inTime renders seconds, unless time did not suffice.
func inTime(s float64, wrong int) string {
	if wrong > 0 {
		return fmt.Sprintf("not in time (%d wrong)", wrong)
	}
	return fmt.Sprintf("%.2f", s)
}

func missed(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(" (%d missing)", n)
}
