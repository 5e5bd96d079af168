package fault

import (
	"net/http"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/integration/postgres"
	"github.com/signalbox-net/signalbox/integration/sim"
)

// outage is how long servers are without their database, which tests sit out
// beside each other.
const outage = 30 * time.Second

// TestPostgresAway stops PostgreSQL below two servers and starts it again.
func TestPostgresAway(t *testing.T) {
	swift(t)
	t.Parallel()
	Binary(t)
	x := StartSite(t, postgres.Start(t))
	a, b := x.meet(t)
	end := neverOffline(t, b.streams[0], "guest-0-0", "guest-0-1", "guest-1-1")
	endA := neverOffline(t, a.streams[0], "guest-0-1", "guest-1-0", "guest-1-1")
	again := a.conns[1].Machine()

	x.DB.Stop()
	stopped := time.Now()
	var both sync.WaitGroup
	for _, p := range []*party{a, b} {
		both.Go(func() { p.refusesWrites(t) })
		both.Go(func() { p.server.unhealthy(t) })
	}
	both.Wait()
	t.Logf("writes of every kind were refused %v after the stop", time.Since(stopped).Round(time.Millisecond))
	// A known machine that comes again is served from what the server knows,
	// here by the server that did not have it.
	conn, st := visit(t, x.B.Sim(), again, "")
	defer conn.Close()
	await(t, "a map while the database is away", st, patience, func(v *sim.View) bool { return len(v.Peers) == 3 })
	// Its stream at the first server is left behind, which that server finds out when the database is back.
	a.streams, b.streams = a.streams[:1], append(b.streams, st)
	<-time.After(outage - time.Since(stopped))
	for _, p := range []*party{a, b} {
		p.unbroken(t)
	}

	x.DB.Start()
	started := time.Now()
	a.recovers(t)
	t.Logf("writes work again %v after the start", time.Since(started).Round(time.Millisecond))
	b.alive(t, "healed-too")
	b.unbroken(t)
	a.expect(t, "the other server's new machine", func(v *sim.View) bool { return v.Peer("healed-too") != nil })
	end()
	endA()
	x.check(t, "after PostgreSQL came back")
}

// testServerCutOff cuts one server's line to PostgreSQL: nothing comes back,
// not even a refusal. That server says so and keeps its streams, the other one
// goes on, and after the cut the first has what it missed.
func testServerCutOff(t *testing.T, x *Site) {
	a, b := x.meet(t)
	end := neverOffline(t, b.streams[0], "guest-0-0", "guest-0-1", "guest-1-1")
	endA := neverOffline(t, a.streams[0], "guest-0-1", "guest-1-0", "guest-1-1")

	x.Lines[0].Cut()
	cut := time.Now()
	var all sync.WaitGroup
	all.Go(func() {
		a.refusesWrites(t)
		x.A.unhealthy(t)
	})
	all.Go(func() {
		begin := time.Now()
		if _, err := x.B.createUser(t.Context(), "meanwhile"); err != nil {
			t.Errorf("the other server: %v", err)
		}
		b.alive(t, "meanwhile")
		t.Logf("the other server took a user and a machine %v", time.Since(begin).Round(time.Millisecond))
	})
	all.Wait()
	// A known machine that comes again is served from what the server knows.
	conn, st := visit(t, x.A.Sim(), a.conns[1].Machine(), "")
	await(t, "a map while the server is cut off", st, patience, func(v *sim.View) bool { return len(v.Peers) == 3 })
	a.conns[1].Close()
	a.conns[1], a.streams[1] = conn, st
	<-time.After(outage - time.Since(cut))
	a.unbroken(t)
	x.A.unhealthy(t)
	if code, text, err := Get(t.Context(), x.B.URL+"/health"); code != http.StatusOK {
		t.Errorf("the other server's health: %d %s %v", code, text, err)
	}

	x.Lines[0].Mend()
	mended := time.Now()
	a.expect(t, "what was missed", func(v *sim.View) bool { return v.Peer("meanwhile") != nil })
	t.Logf("what was missed is there %v after the cut", time.Since(mended).Round(time.Millisecond))
	a.recovers(t)
	b.unbroken(t)
	end()
	endA()
	x.check(t, "after the cut")
}

// testPausedServer stops one server's process in the middle of everything. The
// other one goes on, and the paused one writes nothing old when it wakes.
func testPausedServer(t *testing.T, x *Site) {
	a, b := x.meet(t)
	end := neverOffline(t, b.streams[0], "guest-0-0", "guest-0-1", "guest-1-1")
	x.A.Signal(syscall.SIGSTOP)
	// guest-0-1 gives up and goes to the other server.
	_, moved := visit(t, b.srv, a.conns[1].Machine(), "")
	await(t, "its map", moved, patience, func(v *sim.View) bool { return len(v.Peers) == 3 })
	b.alive(t, "meanwhile")
	<-time.After(6 * time.Second)
	x.A.Signal(syscall.SIGCONT)
	await(t, "what was missed", a.streams[0], patience, func(v *sim.View) bool { return v.Peer("meanwhile") != nil })
	// The old stream ends now; the new one's server keeps the node.
	a.conns[1].Close()
	a.conns, a.streams = a.conns[:1], a.streams[:1]
	a.alive(t, "awake")
	<-time.After(4 * time.Second)
	if err := moved.Err(); err != nil {
		t.Errorf("the stream at the other server: %v", err)
	}
	end()
	x.check(t, "after the pause")
}
