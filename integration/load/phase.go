package main

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// run is one measured run: phases in order, each ended by a check of every
// sampled view.
type run struct {
	fleet   *fleet
	server  *server
	limit   time.Duration // of one phase
	window  int           // joins under way
	figures *figures
	turn    int // makes invented endpoints and ports new
	log     func(format string, args ...any)
}

// usage is what both sides have used up to a moment.
type usage struct {
	at           time.Time
	server, load time.Duration
	in, frames   int64
	broken       int
}

func (r *run) usage() usage {
	u := usage{at: time.Now(), in: r.fleet.received(), frames: r.fleet.frames.Load(), broken: r.fleet.brokenSessions()}
	if r.server.pid != 0 {
		u.server = cpuTime(r.server.pid)
	}
	var ru unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &ru) == nil {
		u.load = time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	}
	return u
}

func (r *run) phase(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, r.limit)
}

// join brings all clients in, window at a time.
func (r *run) join(ctx context.Context) {
	ctx, cancel := r.phase(ctx)
	defer cancel()
	f, j := r.fleet, new(joining)
	r.figures.Join = j
	revision := r.server.revision(ctx)
	before, maps := r.usage(), r.fullMaps(ctx)
	var mu sync.Mutex
	var registers, joins []time.Duration
	var last time.Time
	next := make(chan *client)
	var workers sync.WaitGroup
	for range r.window {
		workers.Go(func() {
			for c := range next {
				t, err := f.join(ctx, c)
				if err != nil {
					continue // ctx ended; counted as not joined
				}
				mu.Lock()
				registers, joins, last = append(registers, t.register), append(joins, t.join), time.Now()
				mu.Unlock()
			}
		})
	}
	for _, c := range f.clients {
		select {
		case next <- c:
		case <-ctx.Done():
		}
	}
	close(next)
	workers.Wait()
	at, wrong := f.settle(ctx)
	after := r.usage()
	slices.Sort(registers)
	slices.Sort(joins)
	j.Joined, j.Wrong = len(joins), wrong
	if len(joins) > 0 {
		j.PerSecond = float64(len(joins)) / last.Sub(before.at).Seconds()
	}
	j.RegisterP50, j.RegisterP99 = ms(quantile(registers, .5)), ms(quantile(registers, .99))
	j.JoinP50, j.JoinP99 = ms(quantile(joins, .5)), ms(quantile(joins, .99))
	if wrong == 0 {
		j.Converged = at.Sub(before.at).Seconds()
	}
	j.ServerCPU, j.LoadCPU = (after.server - before.server).Seconds(), (after.load - before.load).Seconds()
	_, j.PeakRSS = memory(r.server.pid)
	j.Goroutines, j.Revisions = r.server.goroutines(ctx), r.server.revision(ctx)-revision
	j.BytesClient = (after.in - before.in) / int64(len(f.clients))
	j.Frames, j.Broken = after.frames-before.frames, after.broken-before.broken
	r.onePerSession(ctx, j, maps)
	r.check("join")
}

// check verifies all views and says so.
func (r *run) check(phase string) {
	wrong := r.fleet.verify(phase)
	r.log("%s: %d of %d views right, %d faults so far", phase, r.fleet.sample-wrong, r.fleet.sample, r.fleet.faults.total())
}

// settled checks the views after a phase that changed something; deliveries
// that are still under way get a moment.
func (r *run) settled(ctx context.Context, phase string) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	r.fleet.settle(ctx)
	r.check(phase)
}

// subjects picks n different clients that somebody sees.
func (r *run) subjects(n int) []*client {
	var out []*client
	for _, i := range rand.Perm(len(r.fleet.clients)) {
		if len(out) < n && slices.ContainsFunc(r.fleet.sees[i], func(w uint64) bool { return w != 0 }) {
			out = append(out, r.fleet.clients[i])
		}
	}
	return out
}

// move gives a client new endpoints and reports them. The watch ends when all
// viewers have them.
func (r *run) move(ctx context.Context, c *client) (w *watch, ack time.Duration, err error) {
	f := r.fleet
	f.facts.Add(1)
	turn := int(f.facts.Load() % 40000)
	next := f.endpoints(c.index, turn)
	c.update(func(f *fact) { f.endpoints = next })
	w = newWatch(len(f.clients), func(i int) bool { return f.sees[c.index].has(i) })
	w.endpoint = next[0]
	f.watches[c.index].Store(w)
	w.start = time.Now()
	err = f.reportUntilDone(ctx, c)
	return w, time.Since(w.start), err
}

// await waits for a watch, at most 30 s.
func (r *run) await(ctx context.Context, w *watch) {
	t := time.NewTimer(30 * time.Second)
	defer t.Stop()
	select {
	case <-w.done:
	case <-t.C:
	case <-ctx.Done():
	}
}

// change moves one client after the other.
func (r *run) change(ctx context.Context, n int) {
	ctx, cancel := r.phase(ctx)
	defer cancel()
	f, out := r.fleet, new(change)
	r.figures.Change = out
	var delays, acks []time.Duration
	var cpu time.Duration
	var in int64
	revision := r.server.revision(ctx)
	chosen := r.subjects(n)
	for _, c := range chosen {
		if ctx.Err() != nil {
			break
		}
		before := r.usage()
		w, ack, err := r.move(ctx, c)
		if err != nil {
			break
		}
		r.await(ctx, w)
		// What the server still does after the last delivery belongs to it.
		pause(ctx, 50*time.Millisecond)
		f.watches[c.index].Store(nil)
		after := r.usage()
		seen, missing := w.delays()
		delays, acks = append(delays, seen...), append(acks, ack)
		cpu, in = cpu+after.server-before.server, in+after.in-before.in
		out.Changes, out.Missing = out.Changes+1, out.Missing+missing
	}
	out.Revisions = r.server.revision(ctx) - revision
	if out.Changes < len(chosen) {
		f.faults.add("time is up", "%d of %d changes were made", out.Changes, len(chosen))
	}
	slices.Sort(delays)
	slices.Sort(acks)
	if out.Changes > 0 {
		out.P50, out.P99, out.Max = ms(quantile(delays, .5)), ms(quantile(delays, .99)), ms(quantile(delays, 1))
		out.AckP50 = ms(quantile(acks, .5))
		out.CPU = ms(cpu) / float64(out.Changes)
		out.BytesClient = float64(in) / float64(len(f.clients)) / float64(out.Changes)
	}
	r.missing("endpoint change", out.Missing)
	r.settled(ctx, "endpoint changes")
}

func (r *run) missing(what string, n int) {
	if n > 0 {
		r.fleet.faults.add("change not seen", "%s: %d deliveries did not come", what, n)
	}
}

// burst moves n clients at once.
func (r *run) burst(ctx context.Context, n int) {
	ctx, cancel := r.phase(ctx)
	defer cancel()
	f, out := r.fleet, new(burst)
	r.figures.Burst = out
	chosen := r.subjects(n)
	watches := make([]*watch, len(chosen))
	revision := r.server.revision(ctx)
	before := r.usage()
	var moves sync.WaitGroup
	for i, c := range chosen {
		moves.Go(func() { watches[i], _, _ = r.move(ctx, c) })
	}
	moves.Wait()
	var last time.Time
	for i, c := range chosen {
		r.await(ctx, watches[i])
		f.watches[c.index].Store(nil)
		seen, missing := watches[i].delays()
		out.Missing += missing
		if at := watches[i].start.Add(quantile(seen, 1)); at.After(last) {
			last = at
		}
	}
	out.Changes, out.AllSeen = len(chosen), last.Sub(before.at).Seconds()
	pause(ctx, 100*time.Millisecond)
	out.ServerCPU = (r.usage().server - before.server).Seconds()
	out.Revisions = r.server.revision(ctx) - revision
	r.missing("changes at once", out.Missing)
	r.settled(ctx, "changes at once")
}

// presence cuts one client off, and lets it back.
func (r *run) presence(ctx context.Context) {
	ctx, cancel := r.phase(ctx)
	defer cancel()
	out := new(outage)
	r.figures.Presence = out
	c := r.subjects(1)[0]
	out.Offline, out.OfflineMissing = r.awaitOnline(ctx, c, false, c.kill)
	r.settled(ctx, "one node offline")
	out.Online, out.OnlineMissing = r.awaitOnline(ctx, c, true, c.revive)
	r.missing("offline", out.OfflineMissing)
	r.missing("online", out.OnlineMissing)
	r.settled(ctx, "the node back")
}

// awaitOnline acts and waits until all viewers know.
func (r *run) awaitOnline(ctx context.Context, c *client, online bool, act func()) (seconds float64, missing int) {
	f := r.fleet
	w := newWatch(len(f.clients), func(i int) bool { return f.sees[c.index].has(i) })
	w.online = online
	f.watches[c.index].Store(w)
	act()
	r.await(ctx, w)
	f.watches[c.index].Store(nil)
	seen, missing := w.delays()
	return quantile(seen, 1).Seconds(), missing
}

// policy adds a rule and takes it back, n times.
func (r *run) policy(ctx context.Context, n int) error {
	ctx, cancel := r.phase(ctx)
	defer cancel()
	f, out := r.fleet, new(edit)
	r.figures.Policy = out
	var delays []time.Duration
	var cpu, ack time.Duration
	var in int64
	for range n {
		r.turn++
		port := uint16(20000 + r.turn)
		w := newWatch(len(f.clients), func(i int) bool { return f.scenario.edited(i) })
		w.port = port
		out.Viewers = int(w.left.Load())
		before := r.usage()
		w.start = before.at
		f.portWatch.Store(w)
		if err := r.server.setPolicy(ctx, f.scenario.policy(port)); err != nil {
			return err
		}
		ack += time.Since(before.at)
		r.await(ctx, w)
		pause(ctx, 50*time.Millisecond)
		after := r.usage()
		f.portWatch.Store(nil)
		seen, missing := w.delays()
		delays = append(delays, seen...)
		cpu, in = cpu+after.server-before.server, in+after.in-before.in
		out.Edits, out.Missing = out.Edits+1, out.Missing+missing
		out.Last = max(out.Last, quantile(seen, 1).Seconds())
		if err := r.server.setPolicy(ctx, f.scenario.policy(0)); err != nil {
			return err
		}
		r.awaitPortGone(ctx, port)
	}
	slices.Sort(delays)
	out.P50 = quantile(delays, .5).Seconds()
	out.Ack, out.CPU = ack.Seconds()/float64(n), cpu.Seconds()/float64(n)
	out.BytesClient = float64(in) / float64(len(f.clients)) / float64(n)
	r.missing("policy edit", out.Missing)
	r.settled(ctx, "policy edits")
	return nil
}

// awaitPortGone waits until no view has a rule with this port.
func (r *run) awaitPortGone(ctx context.Context, port uint16) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for _, c := range r.fleet.clients[:r.fleet.sample] {
		for {
			c.viewMu.Lock()
			there := c.view != nil && c.view.namesPort(port)
			c.viewMu.Unlock()
			if !there {
				break
			}
			if !pause(ctx, 5*time.Millisecond) {
				r.fleet.faults.add("rule not withdrawn", "client %d still lets port %d in", c.index, port)
				return
			}
		}
	}
	pause(ctx, 50*time.Millisecond)
}

// restart kills the server, starts it again and waits until every view, begun
// from nothing, is right.
func (r *run) restart(ctx context.Context) error {
	ctx, cancel := r.phase(ctx)
	defer cancel()
	f, out := r.fleet, new(restart)
	r.figures.Restart = out
	waits := make([]<-chan struct{}, len(f.clients))
	for i, c := range f.clients {
		waits[i] = f.awaitMap(c)
	}
	told := &slotSet{slots: map[int]bool{}}
	f.offline.Store(told)
	revision := r.server.revision(ctx)
	before := r.usage()
	f.down.Store(true)
	f.epoch.Add(1)
	r.server.kill()
	_, err := r.server.start(ctx)
	f.down.Store(false)
	if err != nil {
		return err
	}
	out.Listening = time.Since(before.at).Seconds()
	for _, w := range waits {
		select {
		case <-w:
		case <-ctx.Done():
		}
	}
	at, wrong := f.settle(ctx)
	after := r.usage()
	firsts := r.firstMaps(before.at)
	out.FirstMapP50, out.FirstMapMax = quantile(firsts, .5).Seconds(), quantile(firsts, 1).Seconds()
	if out.Wrong = wrong; wrong == 0 {
		out.AllRight = max(at.Sub(before.at).Seconds(), out.FirstMapMax)
	}
	// The process is new: all it has used is the restart's.
	out.ServerCPU, out.LoadCPU = after.server.Seconds(), (after.load - before.load).Seconds()
	_, out.PeakRSS = memory(r.server.pid)
	out.BytesClient, out.Frames = (after.in-before.in)/int64(len(f.clients)), after.frames-before.frames
	out.Broken, out.WentOffline = after.broken-before.broken, told.count()
	out.Revisions = r.server.revision(ctx) - revision
	f.offline.Store(nil)
	if out.WentOffline > 0 {
		f.faults.add("restart shown", "%d nodes were shown as offline after the restart", out.WentOffline)
	}
	r.check("restart")
	return nil
}

// firstMaps returns when each client had its first map after t, sorted.
func (r *run) firstMaps(t time.Time) []time.Duration {
	var out []time.Duration
	for _, c := range r.fleet.clients {
		c.viewMu.Lock()
		if c.full && c.firstMap.After(t) {
			out = append(out, c.firstMap.Sub(t))
		}
		c.viewMu.Unlock()
	}
	slices.Sort(out)
	return out
}

// steady lets everything rest.
func (r *run) steady(ctx context.Context, d time.Duration) {
	out := new(steady)
	r.figures.Steady = out
	before := r.usage()
	pause(ctx, d)
	after := r.usage()
	out.Wall, out.ServerCPU = after.at.Sub(before.at).Seconds(), (after.server - before.server).Seconds()
	n := int64(len(r.fleet.clients))
	out.RSS, _ = memory(r.server.pid)
	out.RSSClient = (out.RSS - r.figures.IdleRSS) / n
	out.Goroutines = r.server.goroutines(ctx)
	if r.server.trim(ctx) == nil {
		out.TrimmedRSS, _ = memory(r.server.pid)
		out.TrimmedClient = (out.TrimmedRSS - r.figures.IdleRSS) / n
	}
	out.LiveClient = (r.server.live(ctx) - r.figures.IdleLive) / n
	r.check("steady")
}

// empty ends all clients and starts the server anew: what it needs to know
// the nodes, without any session.
func (r *run) empty(ctx context.Context) error {
	ctx, cancel := r.phase(ctx)
	defer cancel()
	r.fleet.down.Store(true)
	r.fleet.close()
	r.server.kill()
	start := time.Now()
	if _, err := r.server.start(ctx); err != nil {
		return err
	}
	out := &empty{Listening: time.Since(start).Seconds()}
	if r.server.trim(ctx) == nil {
		out.TrimmedRSS, _ = memory(r.server.pid)
	}
	r.figures.Empty = out
	return nil
}
