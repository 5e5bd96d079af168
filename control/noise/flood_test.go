package noise

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"
	"tailscale.com/types/key"
)

func TestControlFrameFloodClosesTheConnection(t *testing.T) {
	for name, write := range map[string]func(*http2.Framer, uint32) error{
		"ping":     func(f *http2.Framer, _ uint32) error { return f.WritePing(false, [8]byte{}) },
		"settings": func(f *http2.Framer, _ uint32) error { return f.WriteSettings() },
		"rapid reset": func(f *http2.Framer, i uint32) error {
			// :method GET, :scheme https, :path / from HPACK's static table.
			f.WriteHeaders(http2.HeadersFrameParam{StreamID: i*2 + 1, BlockFragment: []byte{0x82, 0x87, 0x84}, EndStream: true, EndHeaders: true})
			return f.WriteRSTStream(i*2+1, http2.ErrCodeCancel)
		},
		"priority": func(f *http2.Framer, i uint32) error { return f.WritePriority(i*2+1, http2.PriorityParam{}) },
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t, echo, nil)
			nc, err := g.dial(g.node(), currentVersion)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			go io.Copy(io.Discard, nc)
			io.WriteString(nc, http2.ClientPreface)
			f := http2.NewFramer(nc, nil)
			f.WriteSettings()
			sent := 0
			for ; sent < 100_000; sent++ {
				if write(f, uint32(sent)) != nil {
					break
				}
			}
			if got := g.Counts().Flooded; got != 1 {
				t.Errorf("%d frames went through, flooded = %d", sent, got)
			}
		})
	}
}

func TestThousandsOfReconnectsFromOneAddress(t *testing.T) {
	n := 5000
	if testing.Short() {
		n = 500
	}
	g := newRig(t, echo, nil)
	keys := make([]key.MachinePrivate, 100)
	for i := range keys {
		keys[i] = g.node()
	}
	var wg sync.WaitGroup
	var next atomic.Int64
	for range 128 {
		wg.Go(func() {
			for {
				i := int(next.Add(1))
				if i > n {
					return
				}
				nc, err := g.dial(keys[i%len(keys)], currentVersion)
				if err != nil {
					t.Errorf("reconnect %d: %v", i, err)
					return
				}
				if err := bareRequest(nc, "/machine/map"); err != nil {
					t.Errorf("reconnect %d: %v", i, err)
				}
				nc.Close()
			}
		})
	}
	wg.Wait()
	if c := g.Counts(); c.Busy+c.Limited > 0 {
		t.Errorf("refusals: %+v", c)
	}
}

func heapInUse() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestTenThousandRandomKeysLeaveNoMemory(t *testing.T) {
	const alone = "NOISE_TEST_ALONE"
	if os.Getenv(alone) == "" {
		// What other tests leave behind, and give back meanwhile, would hide
		// what is measured here.
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", fmt.Sprintf("-test.short=%t", testing.Short()), "-test.v")
		cmd.Env = append(os.Environ(), alone+"=1")
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		if err != nil {
			t.Error(err)
		}
		return
	}
	n := 10_000
	if testing.Short() {
		n = 500
	}
	storm := func(g *rig, n int) {
		var wg sync.WaitGroup
		var next atomic.Int64
		for range 32 {
			wg.Go(func() {
				for next.Add(1) <= int64(n) {
					nc, err := g.dial(key.NewMachine(), currentVersion)
					if err != nil {
						t.Error(err)
						return
					}
					if err := bareRequest(nc, "/machine/whoami"); err != nil {
						t.Error(err)
					}
					nc.Close()
				}
			})
		}
		wg.Wait()
		g.stopNow()
	}
	unlimited := func(c *Config) { c.Limits.SourceBurst = 1e6 }
	storm(newRig(t, echo, unlimited), 100) // fills pools
	g := newRig(t, echo, unlimited)
	before := heapInUse()
	storm(g, n)
	after := heapInUse()
	grown := int64(after) - int64(before)
	t.Logf("heap grew by %d bytes over %d attempts", grown, n)
	if grown > 1<<20 {
		t.Error("that is more than 1 MiB")
	}
	runtime.KeepAlive(g)
}
