package derp

import (
	"expvar"
	"sync/atomic"

	"tailscale.com/metrics"
)

// Metrics is a reading of the relay's counters. All but the gauges only grow.
type Metrics struct {
	Connections int64 // gauge: admitted connections now
	Clients     int64 // gauge: keys with at least one of them

	Admitted   uint64 // connections admitted
	Denied     uint64 // keys that Config.Admit refused after they were proved
	Failed     uint64 // connections that ended without admission, Denied included
	Limited    uint64 // upgrades refused because their source had too many open
	Duplicates uint64 // admissions while the key had a connection already
	Evicted    uint64 // connections closed because their key had too many
	Revoked    uint64 // connections closed by Revoke
	WebSockets uint64 // upgrades by WebSocket
	FastStarts uint64 // native upgrades without a 101

	BytesReceived, BytesSent     int64 // relayed, headers excluded
	PacketsReceived, PacketsSent int64

	STUNPackets   uint64 // datagrams received
	STUNReplies   uint64 // of them answered, STUNErrors included
	STUNMalformed uint64 // not a proper binding request
	STUNLimited   uint64 // over the limit of their source
	STUNErrors    uint64 // replies that could not be sent
}

type counters struct {
	connections atomic.Int64

	admitted, denied, failed, limited atomic.Uint64
	duplicates, evicted, revoked      atomic.Uint64
	webSockets, fastStarts            atomic.Uint64
}

type stunCounters struct {
	packets, replies, malformed, limited, writeErrors atomic.Uint64
}

// Metrics reads the counters.
func (s *Server) Metrics() Metrics {
	m := Metrics{
		Connections:   s.stats.connections.Load(),
		Admitted:      s.stats.admitted.Load(),
		Denied:        s.stats.denied.Load(),
		Failed:        s.stats.failed.Load(),
		Limited:       s.stats.limited.Load(),
		Duplicates:    s.stats.duplicates.Load(),
		Evicted:       s.stats.evicted.Load(),
		Revoked:       s.stats.revoked.Load(),
		WebSockets:    s.stats.webSockets.Load(),
		FastStarts:    s.stats.fastStarts.Load(),
		STUNPackets:   s.stun.stats.packets.Load(),
		STUNReplies:   s.stun.stats.replies.Load(),
		STUNMalformed: s.stun.stats.malformed.Load(),
		STUNLimited:   s.stun.stats.limited.Load(),
		STUNErrors:    s.stun.stats.writeErrors.Load(),
	}
	if set, ok := s.relay.ExpVar(false).(*metrics.Set); ok {
		read := func(name string) int64 {
			v, _ := set.Get(name).(*expvar.Int)
			if v == nil {
				return 0
			}
			return v.Value()
		}
		m.BytesReceived, m.BytesSent = read("bytes_received"), read("bytes_sent")
		if local, ok := set.Get("gauge_clients_local").(expvar.Func); ok {
			n, _ := local.Value().(int)
			m.Clients = int64(n)
		}
		m.PacketsReceived, m.PacketsSent = read("packets_received"), read("packets_sent")
	}
	return m
}
