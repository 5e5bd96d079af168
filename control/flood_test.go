package control_test

import (
	"fmt"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/noise"
	"github.com/signalbox-net/signalbox/control/tailnet"
)

// heap is the heap in use after a collection.
func heap() int64 {
	var m runtime.MemStats
	for range 3 {
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse)
}

// The handlers are called as Noise calls them, so that the count is theirs alone; what handshakes leave behind is measured in package noise.
func TestTenThousandRandomKeysLeaveNothingBehind(t *testing.T) {
	g := start(t, controltest.Options{})
	g.join("a")
	attempt := func(i int) {
		// From as many addresses and no more than 200 a second, since others would soon be refused unexamined.
		g.Clock.Advance(6 * time.Millisecond)
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18 + byte(i>>16), byte(i >> 8), byte(i)}), 1)
		peer := noise.Conn{Machine: key.NewMachine().Public(), Version: 142, Remote: from}
		nk := key.NewNode().Public().String()
		for path, body := range map[string]string{
			"/machine/register": `{"Version": 142, "NodeKey": "` + nk + `", "Auth": {"AuthKey": "tskey-auth-guess"}, "Hostinfo": {"Hostname": "x"}}`,
			"/machine/map":      `{"Version": 142, "NodeKey": "` + nk + `", "Stream": true}`,
		} {
			r, err := http.NewRequestWithContext(noise.WithPeer(t.Context(), peer), "POST", path, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			w := &discard{header: http.Header{}}
			if path == "/machine/map" {
				g.Poll.ServeHTTP(w, r)
			} else {
				g.Register.ServeHTTP(w, r)
			}
			if want := map[string]int{"/machine/register": 0, "/machine/map": http.StatusUnauthorized}[path]; w.status != want {
				t.Fatalf("%s: status %d", path, w.status)
			}
		}
	}
	for i := range 200 {
		attempt(i)
	}
	before := heap()
	attempts := 10_000
	if slow {
		attempts = 2000
	}
	for i := range attempts {
		attempt(i)
	}
	if grown := heap() - before; grown > 1<<20 {
		t.Errorf("%d attempts with random keys left %d bytes", attempts, grown)
	}
}

type discard struct {
	header http.Header
	status int
}

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) Write(p []byte) (int, error) { return len(p), nil }
func (d *discard) WriteHeader(status int)      { d.status = status }

func TestFiveHundredJoinsFromOneAddress(t *testing.T) {
	g := start(t, controltest.Options{})
	joins, reconnects := 500, 5000
	if testing.Short() || slow {
		joins, reconnects = 200, 200
	}
	clients := make([]*controltest.Client, joins)
	each(128, joins, func(i int) {
		c := g.NewClient(fmt.Sprintf("c%d", i))
		clients[i] = c
		resp, status := c.Register(c.RegisterRequest(g.key))
		if resp == nil || resp.Error != "" {
			t.Errorf("join %d: status %d %+v", i, status, resp)
			return
		}
		if status, text := c.Do("POST", "/machine/map", c.MapRequest()); status != http.StatusOK {
			t.Errorf("report %d: status %d %q", i, status, text)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	if n := g.Replica.Current().Len(); n != joins {
		t.Errorf("%d nodes", n)
	}
	// All come back again and again, as after restarts of a switch.
	var refused atomic.Int64
	each(128, joins, func(i int) {
		c := clients[i]
		for range reconnects / joins {
			c.Close()
			resp, status := c.Register(c.RegisterRequest(""))
			if resp == nil || !resp.MachineAuthorized {
				refused.Add(1)
				t.Errorf("reconnect of %d: status %d %+v", i, status, resp)
				return
			}
		}
		c.Close()
	})
	if c := g.Noise.Counts(); c.Limited+c.Busy > 0 || refused.Load() > 0 {
		t.Errorf("refusals: %+v, %d", c, refused.Load())
	}
	g.WaitNode(clients[0].ID(), "a living server", func(n *tailnet.Node) bool { return n != nil })
}

// each calls f for 0 to n-1, so many at once.
func each(atOnce, n int, f func(int)) {
	var wg sync.WaitGroup
	var next atomic.Int64
	for range atOnce {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	wg.Wait()
}

func TestNodesOfManyConnectionsKeepOneStream(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.join("a")
	g.join("b")
	var streams []*controltest.Stream
	for range 20 {
		st, status := a.On(g.Server).Stream(func(r *tailcfg.MapRequest) {})
		if st == nil {
			t.Fatalf("status %d", status)
		}
		streams = append(streams, st)
	}
	for _, st := range streams[:len(streams)-1] {
		st.WaitEnd()
	}
	streams[len(streams)-1].Wait("peers", func(v *controltest.View) bool { return len(v.Peers) == 1 })
}
