package noise

import (
	"net/http"
	"runtime/debug"
	"testing"
	"time"

	"tailscale.com/types/key"
)

func TestStrangersWaitWhileMemoryIsTight(t *testing.T) {
	now := time.Now()
	g := newRig(t, echo, func(c *Config) { c.Now = func() time.Time { return now } })
	connect := func(k key.MachinePrivate) error {
		nc, err := g.dial(k, currentVersion)
		if err == nil {
			nc.Close()
		}
		return err
	}
	if err := connect(key.NewMachine()); err != nil {
		t.Fatalf("without a limit: %v", err)
	}
	before := debug.SetMemoryLimit(1 << 20)
	defer debug.SetMemoryLimit(before)
	now = now.Add(time.Second)
	if err := connect(key.NewMachine()); err != statusError(http.StatusServiceUnavailable) {
		t.Errorf("a stranger beyond the limit: %v", err)
	}
	if err := connect(g.node()); err != nil {
		t.Errorf("a node beyond the limit: %v", err)
	}
	debug.SetMemoryLimit(before)
	now = now.Add(time.Second)
	if err := connect(key.NewMachine()); err != nil {
		t.Errorf("after the limit was lifted: %v", err)
	}
}
