package netmap_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/netmap"
)

// A ping says nothing but itself, and a client cannot take it for a KeepAlive, however short it is.
func TestPingIsNoKeepAlive(t *testing.T) {
	for n := range 200 {
		p := &tailcfg.PingRequest{URL: strings.Repeat("u", n), URLIsNoise: n%2 == 0, Types: "c2n", Payload: []byte("GET / HTTP/1.1\r\n\r\n")}
		if n%3 == 0 {
			p = &tailcfg.PingRequest{URL: p.URL}
		}
		wire := netmap.Wire(netmap.Ping(p), false)
		if len(wire) == len(netmap.KeepAliveWire(false)) {
			t.Errorf("a ping of an address of %d bytes has the length of a KeepAlive", n)
		}
		z, err := controltest.ReadMessage(bytes.NewReader(wire))
		m := new(tailcfg.MapResponse)
		if err == nil {
			err = controltest.Decode(z, m)
		}
		if err != nil {
			t.Fatal(err)
		}
		want, _ := json.Marshal(&tailcfg.MapResponse{PingRequest: p})
		if got, _ := json.Marshal(m); !bytes.Equal(got, want) {
			t.Fatalf("it reads %s, want %s", got, want)
		}
	}
}
