package main

import (
	"fmt"
	"time"
)

// figures are the results of one run. Durations are in milliseconds or seconds
// as named, sizes in bytes.
type figures struct {
	Run      string   `json:"run"`
	Command  string   `json:"command"`
	Scenario string   `json:"scenario"`
	Nodes    int      `json:"nodes"`
	Sample   int      `json:"sample"` // clients that decode their maps
	Peers    float64  `json:"peers"`  // that the average client may see
	IdleRSS  int64    `json:"idleRss"`
	IdleLive int64    `json:"idleLive"`
	Join     *joining `json:"join,omitempty"`
	Change   *change  `json:"change,omitempty"`
	Burst    *burst   `json:"burst,omitempty"`
	Presence *outage  `json:"presence,omitempty"`
	Policy   *edit    `json:"policy,omitempty"`
	Restart  *restart `json:"restart,omitempty"`
	Steady   *steady  `json:"steady,omitempty"`

	Faults     map[string]kind `json:"faults"`
	Warnings   map[string]kind `json:"warnings"`
	Complaints int             `json:"serverComplaints"` // warnings and errors in the server's log
}

type joining struct {
	Joined      int     `json:"joined"`
	PerSecond   float64 `json:"perSecond"`
	RegisterP50 float64 `json:"registerP50Ms"`
	RegisterP99 float64 `json:"registerP99Ms"`
	JoinP50     float64 `json:"joinP50Ms"`
	JoinP99     float64 `json:"joinP99Ms"`
	Converged   float64 `json:"convergedS"` // from the first dial to the last view right; 0 = not in time
	Wrong       int     `json:"wrong"`      // views not right when time was up
	ServerCPU   float64 `json:"serverCpuS"`
	LoadCPU     float64 `json:"loadCpuS"`
	PeakRSS     int64   `json:"peakRss"`
	Goroutines  int     `json:"goroutines"`
	BytesClient int64   `json:"bytesClient"`
	Frames      int64   `json:"frames"`
	Broken      int     `json:"broken"`
}

type change struct {
	Changes     int     `json:"changes"`
	P50         float64 `json:"p50Ms"`
	P99         float64 `json:"p99Ms"`
	Max         float64 `json:"maxMs"`
	AckP50      float64 `json:"ackP50Ms"`
	CPU         float64 `json:"cpuMsChange"`
	BytesClient float64 `json:"bytesClientChange"`
	Missing     int     `json:"missing"` // deliveries that did not come in time
}

type burst struct {
	Changes   int     `json:"changes"`
	AllSeen   float64 `json:"allSeenS"`
	ServerCPU float64 `json:"serverCpuS"`
	Missing   int     `json:"missing"`
}

type outage struct {
	Offline        float64 `json:"offlineMaxS"`
	Online         float64 `json:"onlineMaxS"`
	OfflineMissing int     `json:"offlineMissing"`
	OnlineMissing  int     `json:"onlineMissing"`
}

type edit struct {
	Edits       int     `json:"edits"`
	Viewers     int     `json:"viewers"` // whose filter an edit changes
	P50         float64 `json:"p50S"`
	Last        float64 `json:"lastS"`
	Ack         float64 `json:"ackS"`
	CPU         float64 `json:"cpuSEdit"`
	BytesClient float64 `json:"bytesClientEdit"`
	Missing     int     `json:"missing"`
}

type restart struct {
	Listening   float64 `json:"listeningS"`
	FirstMapP50 float64 `json:"firstMapP50S"`
	FirstMapMax float64 `json:"firstMapMaxS"`
	AllRight    float64 `json:"allRightS"` // 0 = not in time
	Wrong       int     `json:"wrong"`
	ServerCPU   float64 `json:"serverCpuS"`
	LoadCPU     float64 `json:"loadCpuS"`
	PeakRSS     int64   `json:"peakRss"`
	BytesClient int64   `json:"bytesClient"`
	Frames      int64   `json:"frames"`
	Broken      int     `json:"broken"`
	WentOffline int     `json:"wentOffline"` // nodes some viewer was told are offline
}

type steady struct {
	Wall       float64 `json:"wallS"`
	ServerCPU  float64 `json:"serverCpuS"`
	RSS        int64   `json:"rss"`
	RSSClient  int64   `json:"rssClient"`  // above the idle server, a client
	LiveClient int64   `json:"liveClient"` // the same of heap and stacks in use after a collection
	Goroutines int     `json:"goroutines"`
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

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

// inTime renders seconds, of which 0 means that the time did not suffice.
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

// tables renders the figures as the rows of Markdown tables.
func (f *figures) tables() string {
	out := fmt.Sprintf("# %s: %d nodes, %.0f peers each, %d views checked; idle server %s MiB\n", f.Run, f.Nodes, f.Peers, f.Sample, mib(f.IdleRSS))
	if j := f.Join; j != nil {
		out += "\n| Run | joined | joins/s | register p50/p99 ms | join p50/p99 ms | conv s | server CPU s (a join) | load CPU s | peak RSS MiB | goroutines | B to a client | sessions broken |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n"
		out += fmt.Sprintf("| %s | %d/%d | %.1f | %.0f / %.0f | %.0f / %.0f | %s | %.2f (%.1f ms) | %.1f | %s | %d | %s | %d |\n",
			f.Run, j.Joined, f.Nodes, j.PerSecond, j.RegisterP50, j.RegisterP99, j.JoinP50, j.JoinP99, inTime(j.Converged, j.Wrong),
			j.ServerCPU, 1000*j.ServerCPU/float64(max(1, j.Joined)), j.LoadCPU, mib(j.PeakRSS), j.Goroutines, size(j.BytesClient), j.Broken)
	}
	if f.Change != nil || f.Burst != nil || f.Presence != nil || f.Policy != nil {
		out += f.changeTable()
	}
	if r := f.Restart; r != nil {
		out += "\n| Run | listening s | first map p50 / max s | all right s | server CPU s | load CPU s | peak RSS MiB | B a client | map frames | sessions broken | told offline |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
		out += fmt.Sprintf("| %s | %.2f | %.2f / %.2f | %s | %.2f | %.1f | %s | %s | %d | %d | %d |\n", f.Run, r.Listening, r.FirstMapP50, r.FirstMapMax,
			inTime(r.AllRight, r.Wrong), r.ServerCPU, r.LoadCPU, mib(r.PeakRSS), size(r.BytesClient), r.Frames, r.Broken, r.WentOffline)
	}
	if s := f.Steady; s != nil {
		out += "\n| Run | wall s | server CPU s (of a core) | RSS MiB | RSS a client | live a client | goroutines |\n|---|---|---|---|---|---|---|\n"
		out += fmt.Sprintf("| %s | %.1f | %.3f (%.2f %%) | %s | %s | %s | %d |\n", f.Run, s.Wall, s.ServerCPU, 100*s.ServerCPU/s.Wall, mib(s.RSS), size(s.RSSClient), size(s.LiveClient), s.Goroutines)
	}
	return out
}

func (f *figures) changeTable() string {
	single, ack, cpu, bytes, all, presence := "-", "-", "-", "-", "-", "-"
	policy, policyCPU, policyBytes := "-", "-", "-"
	if c := f.Change; c != nil {
		single = fmt.Sprintf("%.0f / %.0f / %.0f%s", c.P50, c.P99, c.Max, missed(c.Missing))
		ack, cpu, bytes = fmt.Sprintf("%.1f", c.AckP50), fmt.Sprintf("%.1f", c.CPU), fmt.Sprintf("%.0f B", c.BytesClient)
	}
	if b := f.Burst; b != nil {
		all = fmt.Sprintf("%d: %.3f, %.3f%s", b.Changes, b.AllSeen, b.ServerCPU, missed(b.Missing))
	}
	if p := f.Presence; p != nil {
		presence = fmt.Sprintf("%.2f%s / %.2f%s", p.Offline, missed(p.OfflineMissing), p.Online, missed(p.OnlineMissing))
	}
	if e := f.Policy; e != nil {
		policy = fmt.Sprintf("%.3f / %.3f%s (%d viewers)", e.P50, e.Last, missed(e.Missing), e.Viewers)
		policyCPU, policyBytes = fmt.Sprintf("%.3f", e.CPU), fmt.Sprintf("%.0f B", e.BytesClient)
	}
	return "\n| Run | 1 change p50 / p99 / max ms | ack p50 ms | CPU ms a change | B a client a change | changes at once: all seen s, CPU s | offline / online max s | policy p50 / last s | policy CPU s | policy B a client |\n|---|---|---|---|---|---|---|---|---|---|\n" +
		fmt.Sprintf("| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |\n", f.Run, single, ack, cpu, bytes, all, presence, policy, policyCPU, policyBytes)
}
