package integration

import (
	"fmt"
	"testing"

	"tailscale.com/ipn"
)

// BenchmarkTailscaleUp is a person's wait: `tailscale up` with an auth key on a
// machine that was never logged in, from the command's start to its end, when
// the client is running. STUN answers, so the client's netcheck is short.
//
//	go test -run '^$' -bench TailscaleUp -benchtime 10x ./integration
func BenchmarkTailscaleUp(b *testing.B) {
	lab := Open(b)
	server := lab.Server(b, ServerConfig{})
	key := server.Key(b, "admin", "--reusable")
	for _, version := range Versions {
		b.Run(version, func(b *testing.B) {
			i := 0
			for b.Loop() {
				b.StopTimer()
				i++
				c := lab.Client(b, ClientConfig{Version: version, Name: fmt.Sprintf("up%d", i)})
				b.StartTimer()
				c.Tailscale(b, "up", "--login-server", server.URL, "--auth-key", key)
				b.StopTimer()
				if st := c.Status(b); st.BackendState != ipn.Running.String() {
					b.Fatalf("up ended in state %s", st.BackendState)
				}
				c.Kill()
				b.StartTimer()
			}
		})
	}
}
