package serve

import (
	"context"
	"errors"
	"math"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/signalbox-net/signalbox/control/netmap"
	"github.com/signalbox-net/signalbox/db"
)

const namespace = "signalbox"

// times are what has to be noted when it happens. A nil one notes nothing.
type times struct{ commit, fanOut prometheus.Histogram }

func newTimes() *times {
	make := func(name, help string) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: namespace, Name: name, Help: help, Buckets: prometheus.ExponentialBuckets(0.0005, 2, 16)})
	}
	return &times{
		commit: make("commit_seconds", "From the beginning of a transaction until it is on disk."),
		fanOut: make("fan_out_seconds", "From an announcement until the last stream that had something to write for it has written it."),
	}
}

func (t *times) committed(d time.Duration) {
	if t != nil {
		t.commit.Observe(d.Seconds())
	}
}

func (t *times) fannedOut(d time.Duration) {
	if t != nil {
		t.fanOut.Observe(d.Seconds())
	}
}

// A registry registers values that are read where they are kept, at the moment of a scrape.
type registry struct{ *prometheus.Registry }

func (r registry) gauge(name, help string, f func() float64) {
	r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: namespace, Name: name, Help: help}, f))
}

func (r registry) count(name, help string, f func() int64) {
	r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help}, func() float64 { return float64(f()) }))
}

// metrics is all that /metrics shows.
func (s *server) metrics() *prometheus.Registry {
	r := registry{prometheus.NewRegistry()}
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if s.times != nil {
		r.MustRegister(s.times.commit, s.times.fanOut)
	}
	s.healthMetrics(r)
	s.streamMetrics(r)
	s.frameMetrics(r)
	s.noiseMetrics(r)
	if s.relay != nil {
		r.MustRegister(relayMetrics{s.relay})
	}
	s.callMetrics(r)
	return r.Registry
}

func truth(ok bool) float64 {
	if ok {
		return 1
	}
	return 0
}

func (s *server) healthMetrics(r registry) {
	r.gauge("healthy", "1 when every health check passes, as of the last look at the database.", func() float64 {
		for _, f := range s.checks() {
			if f(context.Background()) != nil {
				return 0
			}
		}
		return truth(s.store.Fault() == nil)
	})
	for name, f := range s.checks() {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: namespace, Name: "check", Help: "1 when this health check passes.", ConstLabels: prometheus.Labels{"check": name},
		}, func() float64 { return truth(f(context.Background()) == nil) }))
	}
	r.gauge("policy_allows_all", "1 when the policy in effect has neither acls nor grants, which allows everything to everybody.", func() float64 {
		p := s.replica.Current().Policy()
		return truth(p.Err == nil && p.Parsed != nil && p.Parsed.AllowsAll())
	})
	r.gauge("database_healthy", "1 when the last statement or commit met no fault of the storage.", func() float64 { return truth(s.store.Fault() == nil) })
	r.gauge("database_refuses_writes", "1 while the database was found damaged and takes no writes.", func() float64 {
		return truth(errors.Is(s.store.Fault(), db.ErrCorrupt))
	})
	r.gauge("revision", "Revision of the snapshot in memory.", func() float64 { return float64(s.replica.Current().Revision()) })
	r.gauge("revision_lag", "Revisions that the snapshot in memory is behind the database; NaN while that cannot be asked.", s.behind)
	r.gauge("servers_alive", "Servers on this database whose last sign of life is younger than 90 s.", func() float64 { return float64(s.control.Alive()) })
	r.gauge("nodes", "Nodes of the tailnet.", func() float64 { return float64(s.replica.Current().Len()) })
}

// behindIn bounds how long a scrape waits for the database.
const behindIn = time.Second

// behind asks the database for its newest revision.
func (s *server) behind() float64 {
	ctx, cancel := context.WithTimeout(context.Background(), behindIn)
	defer cancel()
	var rev db.Revision
	err := s.store.View(ctx, func(r *db.Reader) (err error) {
		rev, err = r.In(s.tailnet).Revision()
		return err
	})
	if err != nil {
		return math.NaN()
	}
	return float64(max(0, rev-s.replica.Current().Revision()))
}

// lag is how far the slowest stream is behind.
func (s *server) lag() float64 {
	now, worst := int64(s.replica.Current().Revision()), int64(0)
	for _, x := range s.control.Poll.List() {
		if r := x.Revision(); r > 0 {
			worst = max(worst, now-r)
		}
	}
	return float64(worst)
}

func (s *server) streamMetrics(r registry) {
	p := &s.control.Poll.Stats
	r.gauge("sessions", "Open map streams.", func() float64 { return float64(p.Sessions.Load()) })
	r.gauge("sessions_waiting", "Streams that wait to send their first map.", func() float64 { return float64(p.Waiting.Load()) })
	r.gauge("full_map_in_flight_bytes", "Estimated bytes of first maps that are being made and handed over.", func() float64 { return float64(p.InFlight.Load()) })
	r.gauge("full_map_in_flight_limit_bytes", "Bound of the same, which makes streams wait.", func() float64 { return float64(s.control.Poll.Room()) })
	r.gauge("oldest_session_revision_lag", "Revisions that the slowest stream is behind.", s.lag)
	r.count("full_maps_total", "Full maps sent.", p.FullMaps.Load)
	r.count("deltas_total", "Deltas sent.", p.Deltas.Load)
	r.count("map_bytes_total", "Bytes written to map streams.", p.Bytes.Load)
	r.count("sessions_stalled_total", "Streams dropped because their reader made no progress.", p.Stalled.Load)
	r.count("sessions_replaced_total", "Streams ended by a newer one of the same node.", p.Replaced.Load)
	r.count("reports_total", "Reports taken from clients.", p.Updates.Load)
}

func (s *server) frameMetrics(r registry) {
	f := netmap.Frames
	r.gauge("frame_cache_bytes", "Bytes of kept frames, with what it takes to find them.", func() float64 { return float64(f.Bytes()) })
	r.gauge("frame_cache_limit_bytes", "Bound of the same.", func() float64 { return float64(f.Limit()) })
	for k := range netmap.Kinds {
		label := prometheus.Labels{"kind": k.String()}
		count := func(name, help string, get func(netmap.Count) int64) {
			r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help, ConstLabels: label},
				func() float64 { return float64(get(f.Count(k))) }))
		}
		count("frame_cache_hits_total", "Shared frames found ready.", func(c netmap.Count) int64 { return c.Hits })
		count("frame_cache_misses_total", "Shared frames made.", func(c netmap.Count) int64 { return c.Misses })
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: namespace, Name: "frame_cache_entries", Help: "Kept frames.", ConstLabels: label},
			func() float64 { return float64(f.Count(k).Entries) }))
	}
}

func (s *server) noiseMetrics(r registry) {
	n := s.control.Noise
	r.gauge("connections", "Open connections of all listeners.", func() float64 { return float64(s.guard.Open()) })
	r.gauge("noise_connections", "Open Noise connections.", func() float64 { return float64(n.Counts().Open) })
	r.gauge("noise_handshakes_waiting", "Handshakes that wait for a processor.", func() float64 { return float64(n.Counts().Waiting) })
	r.count("noise_handshakes_total", "Handshakes that succeeded.", func() int64 { return n.Counts().Handshakes })
	r.count("noise_malformed_total", "Handshakes refused: not well-formed.", func() int64 { return n.Counts().Malformed })
	r.count("noise_limited_total", "Handshakes refused: over the limit of their source.", func() int64 { return n.Counts().Limited })
	r.count("noise_busy_total", "Handshakes refused: no room.", func() int64 { return n.Counts().Busy })
}

func (s *server) callMetrics(r registry) {
	r.gauge("routers_unhealthy", "Subnet routers that do not answer probes.", s.unhealthy)
	r.count("node_calls_total", "Calls that this server's streams have said to nodes.", s.control.C2N.Calls.Load)
	r.count("node_calls_unanswered_total", "Calls to nodes that got no answer.", s.control.C2N.Unanswered.Load)
}

func (s *server) unhealthy() (n float64) {
	for _, node := range s.replica.Current().Nodes() {
		if node != nil && node.State.Unhealthy {
			n++
		}
	}
	return n
}
