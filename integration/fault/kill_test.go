package fault

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/integration/sim"
)

// number reads a number from the environment.
func number(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(cmp.Or(os.Getenv(name), strconv.FormatUint(otherwise, 10)), 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

func TestKill9Loop(t *testing.T) {
	t.Parallel()
	s := StartServer(t)
	rounds := number(t, "SIGNALBOX_FAULT_ROUNDS", 30)
	if raced {
		rounds = min(rounds, 5)
	}
	seed := number(t, "SIGNALBOX_FAULT_SEED", uint64(time.Now().UnixNano()))
	t.Logf("seed %d; set SIGNALBOX_FAULT_SEED to repeat it", seed)
	w := newStorm(s, seed)
	ctx := t.Context()

	watcher := prepareStorm(t, w)
	noiseKey := s.Sim().Key
	for round := range rounds {
		srv := s.Sim()
		if srv.Key != noiseKey {
			t.Fatalf("round %d: the server has another Noise key", round)
		}
		conn, err := srv.Dial(ctx, watcher)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		stream, err := conn.Poll(ctx)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		go stream.Watch(ctx, w.watch)

		busy := w.after(10 + w.intN(30))
		storming, calm := context.WithCancel(ctx)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			w.run(storming, srv)
		}()
		// The server has had something to do, however slow the machine is. From then on any moment will do.
		select {
		case <-busy:
		case <-ended:
			t.Fatalf("round %d: the server was gone after %d writes, before it was killed", round, w.acks)
		}
		<-time.After(time.Duration(w.intN(50_000)) * time.Microsecond)
		s.Kill()
		calm()
		<-ended
		<-stream.Done()
		conn.Close()

		s.Start()
		verify(t, w, fmt.Sprintf("round %d", round))
		repeatInterrupted(t, w)
	}
	t.Logf("%d writes were acknowledged in %d rounds, %d of them edits of the policy", w.acks, rounds, w.policies.Load())
}

// prepareStorm makes what the storm builds on and returns a machine that
// watches it.
func prepareStorm(t *testing.T, w *storm) *sim.Machine {
	t.Helper()
	ctx := t.Context()
	w.book.Begin("policy", policyText(0))
	if err := w.server.setPolicy(ctx, policyText(0)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ann", "bob"} {
		w.owners[name] = w.server.NewUser(name)
		k, err := w.server.createKey(ctx, w.owners[name], true, w.base.Add(-time.Duration(len(w.owners))*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		w.reusable[name] = k.Key
	}
	j := &joiner{machine: sim.NewMachine("watcher"), key: w.reusable["ann"], owner: "ann"}
	if err := w.register(ctx, w.server.Sim(), j); err != nil {
		t.Fatal(err)
	}
	shown, err := w.shown(ctx)
	if err != nil {
		t.Fatal(err)
	}
	// What a new server has by itself is where the book begins.
	for name, value := range shown {
		w.book.Begin(name, value)
		w.book.Done(name)
	}
	return j.machine
}

// verify holds the server, which has just started, to the book.
func verify(t *testing.T, w *storm, when string) {
	t.Helper()
	var spends []*joiner // registrations whose answer is missing
	for _, j := range w.joiners {
		if sure, _, open := w.book.Value(j.fact()); sure == "" && open && j.keyFact != "" {
			spends = append(spends, j)
		}
	}
	shown, err := w.shown(t.Context())
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	w.wrong = append(w.wrong, w.book.Check(shown)...)
	for _, j := range spends {
		spent, joined := shown[j.keyFact] == "used", shown[j.fact()] != ""
		if spent != joined {
			w.wrong = append(w.wrong, fmt.Sprintf("%s: key used %v, node there %v", j.machine.Hostname, spent, joined))
		}
	}
	broken, err := inspect(t.Context(), w.server.Database())
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	lost, err := w.lostReports(t.Context())
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	w.wrong = append(w.wrong, append(broken, lost...)...)
	for _, line := range w.wrong {
		t.Errorf("%s: %s", when, line)
	}
	if t.Failed() {
		t.FailNow()
	}
}

// repeatInterrupted has the machines that got no answer ask again, and makes
// all nodes ready for the next round.
func repeatInterrupted(t *testing.T, w *storm) {
	t.Helper()
	srv := w.server.Sim()
	var ready []*joiner
	for _, j := range w.joiners {
		if was, _, _ := w.book.Value(j.fact()); was == "" {
			if w.addrs[j.fact()] != "" {
				continue // it was deleted
			}
			if err := w.register(t.Context(), srv, j); err != nil {
				t.Fatalf("%s repeats its registration: %v", j.machine.Hostname, err)
			}
		} else if j.machine.Hostname+" of "+j.owner == was && w.addrs[j.fact()] == "" {
			t.Errorf("%s was never shown", j.machine.Hostname)
		}
		ready = append(ready, j)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ready = ready
	if len(w.wrong) > 0 {
		t.Fatal(w.wrong)
	}
}
