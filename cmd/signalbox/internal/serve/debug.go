package serve

import (
	"encoding/json"
	"net/http"
	"net/http/pprof"
	"sort"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/signalbox-net/signalbox/control/netmap"
)

// debugHandler is the metrics and debug listener's. It is on an address of its own and never inside Noise or on the main listener.
func (s *server) debugHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics(), promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /debug/snapshot", s.debugSnapshot)
	mux.HandleFunc("GET /debug/sessions", s.debugSessions)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return mux
}

// metrics reads counters where they are kept, at the moment of a scrape.
func (s *server) metrics() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "signalbox", Name: name, Help: help}, f))
	}
	count := func(name, help string, f func() int64) {
		r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "signalbox", Name: name, Help: help}, func() float64 { return float64(f()) }))
	}
	p := &s.control.Poll.Stats
	gauge("revision", "Revision of the snapshot in memory.", func() float64 { return float64(s.replica.Current().Revision()) })
	gauge("nodes", "Nodes of the tailnet.", func() float64 { return float64(s.replica.Current().Len()) })
	gauge("sessions", "Open map streams.", func() float64 { return float64(p.Sessions.Load()) })
	gauge("sessions_waiting", "Streams that wait to send their first map.", func() float64 { return float64(p.Waiting.Load()) })
	gauge("oldest_session_revision_lag", "Revisions that the slowest stream is behind.", s.lag)
	gauge("healthy", "1 when every health check passes.", s.healthy)
	count("full_maps_total", "Full maps sent.", p.FullMaps.Load)
	count("deltas_total", "Deltas sent.", p.Deltas.Load)
	count("map_bytes_total", "Bytes written to map streams.", p.Bytes.Load)
	count("sessions_stalled_total", "Streams dropped because their reader made no progress.", p.Stalled.Load)
	count("sessions_replaced_total", "Streams ended by a newer one of the same node.", p.Replaced.Load)
	count("reports_total", "Reports taken from clients.", p.Updates.Load)
	count("frame_cache_hits_total", "Shared frames found ready.", func() int64 { return frames(func(c netmap.Count) int64 { return c.Hits }) })
	count("frame_cache_misses_total", "Shared frames made.", func() int64 { return frames(func(c netmap.Count) int64 { return c.Misses }) })
	gauge("connections", "Open connections of all listeners.", func() float64 { return float64(s.guard.Open()) })
	for name, get := range map[string]func() int64{
		"noise_handshakes_total": func() int64 { return s.control.Noise.Counts().Handshakes },
		"noise_malformed_total":  func() int64 { return s.control.Noise.Counts().Malformed },
		"noise_limited_total":    func() int64 { return s.control.Noise.Counts().Limited },
		"noise_busy_total":       func() int64 { return s.control.Noise.Counts().Busy },
	} {
		count(name, "Noise handshakes by outcome.", get)
	}
	return r
}

// frames adds up what is known of all kinds of kept frames.
func frames(get func(netmap.Count) int64) (n int64) {
	for k := range netmap.Kinds {
		n += get(netmap.Frames.Count(k))
	}
	return n
}

func (s *server) lag() float64 {
	now, worst := int64(s.replica.Current().Revision()), int64(0)
	for _, x := range s.control.Poll.List() {
		if r := x.Revision(); r > 0 {
			worst = max(worst, now-r)
		}
	}
	return float64(worst)
}

func (s *server) healthy() float64 {
	for _, f := range s.checks() {
		if f(nil) != nil {
			return 0
		}
	}
	return 1
}

func (s *server) debugSnapshot(w http.ResponseWriter, r *http.Request) {
	snap := s.replica.Current()
	type node struct {
		ID     int64  `json:"id"`
		Slot   int    `json:"slot"`
		Name   string `json:"name"`
		Online bool   `json:"online"`
		Peers  int    `json:"peers"`
	}
	out := struct {
		Revision int64  `json:"revision"`
		Layout   uint64 `json:"layout"`
		Policy   string `json:"policyError,omitempty"`
		Nodes    []node `json:"nodes"`
	}{Revision: int64(snap.Revision()), Layout: snap.Layout(), Nodes: []node{}}
	if err := snap.Policy().Err; err != nil {
		out.Policy = err.Error()
	}
	for slot, n := range snap.Nodes() {
		if n != nil {
			out.Nodes = append(out.Nodes, node{int64(n.ID), slot, n.FQDN, n.State.Online, snap.Access().Row(slot).Count()})
		}
	}
	writeJSON(w, out)
}

func (s *server) debugSessions(w http.ResponseWriter, r *http.Request) {
	type session struct {
		Node     int64     `json:"node"`
		Revision int64     `json:"revision"`
		Written  int64     `json:"written"`
		Started  time.Time `json:"started"`
	}
	out := []session{}
	for _, x := range s.control.Poll.List() {
		out = append(out, session{int64(x.Node()), x.Revision(), x.Written(), x.Started})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Node < out[j].Node })
	writeJSON(w, out)
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(v)
}
