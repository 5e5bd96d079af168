package serve

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/signalbox-net/signalbox/derp"
)

// relayMetrics shows the counters of the relay and of STUN, all of one moment.
type relayMetrics struct{ relay *derp.Server }

type relayMetric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	of   func(derp.Metrics) float64
}

var relayMetricList = []relayMetric{
	newRelayMetric("relay_connections", prometheus.GaugeValue, "Open relay connections of admitted devices.", func(m derp.Metrics) float64 { return float64(m.Connections) }),
	newRelayMetric("relay_admitted_total", prometheus.CounterValue, "Relay connections admitted.", func(m derp.Metrics) float64 { return float64(m.Admitted) }),
	newRelayMetric("relay_denied_total", prometheus.CounterValue, "Relay connections of keys that are no living device's.", func(m derp.Metrics) float64 { return float64(m.Denied) }),
	newRelayMetric("relay_failed_total", prometheus.CounterValue, "Relay connections that ended without admission, denied ones included.", func(m derp.Metrics) float64 { return float64(m.Failed) }),
	newRelayMetric("relay_limited_total", prometheus.CounterValue, "Relay connections refused because their source had too many.", func(m derp.Metrics) float64 { return float64(m.Limited) }),
	newRelayMetric("relay_duplicates_total", prometheus.CounterValue, "Relay connections of a key that had one already.", func(m derp.Metrics) float64 { return float64(m.Duplicates) }),
	newRelayMetric("relay_revoked_total", prometheus.CounterValue, "Relay connections closed because the device lost its right to them.", func(m derp.Metrics) float64 { return float64(m.Revoked) }),
	newRelayMetric("relay_received_bytes_total", prometheus.CounterValue, "Bytes of packets that came to the relay.", func(m derp.Metrics) float64 { return float64(m.BytesReceived) }),
	newRelayMetric("relay_sent_bytes_total", prometheus.CounterValue, "Bytes of packets that the relay passed on.", func(m derp.Metrics) float64 { return float64(m.BytesSent) }),
	newRelayMetric("stun_packets_total", prometheus.CounterValue, "Datagrams that came to the STUN ports.", func(m derp.Metrics) float64 { return float64(m.STUNPackets) }),
	newRelayMetric("stun_replies_total", prometheus.CounterValue, "STUN requests answered.", func(m derp.Metrics) float64 { return float64(m.STUNReplies) }),
	newRelayMetric("stun_limited_total", prometheus.CounterValue, "STUN requests over the limit of their source.", func(m derp.Metrics) float64 { return float64(m.STUNLimited) }),
}

func newRelayMetric(name string, kind prometheus.ValueType, help string, of func(derp.Metrics) float64) relayMetric {
	return relayMetric{prometheus.NewDesc(namespace+"_"+name, help, nil, nil), kind, of}
}

// Describe is for prometheus.Collector.
func (relayMetrics) Describe(out chan<- *prometheus.Desc) {
	for _, m := range relayMetricList {
		out <- m.desc
	}
}

// Collect is for prometheus.Collector.
func (r relayMetrics) Collect(out chan<- prometheus.Metric) {
	now := r.relay.Metrics()
	for _, m := range relayMetricList {
		out <- prometheus.MustNewConstMetric(m.desc, m.kind, m.of(now))
	}
}
