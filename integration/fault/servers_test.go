package fault

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/integration/postgres"
	"github.com/signalbox-net/signalbox/integration/sim"
)

// guest joins a machine at a server and opens its stream there.
func (s *Server) guest(t *testing.T, hostname, key string) (*sim.Conn, *sim.Stream) {
	t.Helper()
	return visit(t, s.Sim(), sim.NewMachine(hostname), key)
}

// visit connects a machine, registers it if there is a key, and opens its
// stream.
func visit(t *testing.T, srv *sim.Server, m *sim.Machine, key string) (*sim.Conn, *sim.Stream) {
	t.Helper()
	conn, err := srv.Dial(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	if key != "" {
		if _, err := conn.Register(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	stream, err := conn.Poll(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return conn, stream
}

// await waits until a stream's view is as cond says, and returns how long that
// took.
func await(t *testing.T, what string, st *sim.Stream, within time.Duration, cond func(*sim.View) bool) time.Duration {
	t.Helper()
	begin := time.Now()
	ctx, cancel := context.WithTimeoutCause(t.Context(), within, fmt.Errorf("not within %v", within))
	defer cancel()
	if err := st.Wait(ctx, cond); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	return time.Since(begin)
}

// shows is a condition: the view has a peer of that label who is online.
func shows(label string) func(*sim.View) bool {
	return func(v *sim.View) bool {
		p := v.Peer(label)
		return p != nil && p.Online != nil && *p.Online
	}
}

// neverOffline watches a stream until the returned function is called, which
// fails the test if a peer of one of the labels was shown gone or offline.
func neverOffline(t *testing.T, st *sim.Stream, labels ...string) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var seen []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		st.Watch(ctx, func(v *sim.View) {
			for _, l := range labels {
				if !shows(l)(v) {
					seen = append(seen, fmt.Sprintf("%v: %s is %+v", time.Now().Format(time.TimeOnly), l, v.Peer(l)))
				}
			}
		})
	}()
	return func() {
		t.Helper()
		cancel()
		<-done
		if err := st.Err(); err != nil {
			t.Errorf("the watching stream ended: %v", err)
		}
		for _, s := range seen {
			t.Errorf("shown gone or offline at %s", s)
		}
	}
}

// TestServers runs what two servers on one PostgreSQL are held to, each time on
// a database of its own.
func TestServers(t *testing.T) {
	swift(t)
	t.Parallel()
	Binary(t)
	db := postgres.Start(t)
	for name, test := range map[string]func(*testing.T, *Site){
		"ShareChanges": testServersShareChanges, "JoinTogether": testServersJoinTogether, "Login": testLoginCrossesServers,
		"Kill": testKillOneOfTwoServers, "Move": testClientsMoveWhenTheirServerDies, "CutOff": testServerCutOff, "Pause": testPausedServer,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, StartSite(t, db.NewDatabase(t)))
		})
	}
}

// testServersShareChanges makes changes at each server and times when a client
// of the other one sees them.
func testServersShareChanges(t *testing.T, x *Site) {
	key := x.A.NewKey("anna")
	if a, b := x.A.Sim().Key, x.B.Sim().Key; a != b {
		t.Fatalf("the servers have different Noise keys: %v and %v", a, b)
	}
	_, atA := x.A.guest(t, "at-a", key)
	_, atB := x.B.guest(t, "at-b", key)
	await(t, "b at a", atA, patience, shows("at-b"))
	await(t, "a at b", atB, patience, shows("at-a"))

	var took []time.Duration
	ctx := t.Context()
	label := map[*sim.Stream]string{atA: "at-a", atB: "at-b"}
	for i := range 3 {
		for _, way := range []struct {
			from     *Server
			own, far *sim.Stream
		}{{x.A, atA, atB}, {x.B, atB, atA}} {
			step := func(what string, do func() error, cond func(*sim.View) bool) {
				t.Helper()
				if err := do(); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				took = append(took, await(t, what, way.far, patience, cond))
			}
			step("policy that forbids everything", func() error { return way.from.setPolicy(ctx, `{"acls": []}`) },
				func(v *sim.View) bool { return len(v.Peers) == 0 })
			step("policy that allows everything", func() error { return way.from.setPolicy(ctx, policyText(i)) },
				func(v *sim.View) bool { return len(v.Peers) == 1 })
			far := way.far.View()
			id := far.Peer(label[way.own]).ID
			label[way.own] = fmt.Sprintf("new-%d", len(took))
			step("new name", func() error {
				return way.from.Call(ctx, "POST", fmt.Sprintf("/api/v1/node/%d/rename/%s", id, label[way.own]), nil, nil)
			}, func(v *sim.View) bool { return v.Peer(label[way.own]) != nil })
		}
	}
	slices.Sort(took)
	t.Logf("%d changes reached the clients of the other server, median %v, slowest %v", len(took), took[len(took)/2], took[len(took)-1])
	if took[len(took)/2] > time.Second {
		t.Error("a change takes more than a second to the clients of the other server")
	}
}

// testServersJoinTogether has machines join at both servers at the same moment
// and each see all others.
func testServersJoinTogether(t *testing.T, x *Site) {
	key := x.B.NewKey("anna")
	if err := x.A.setPolicy(t.Context(), policyText(1)); err != nil {
		t.Fatal(err)
	}
	const each = 12
	streams := make([]*sim.Stream, 2*each)
	srv := []*sim.Server{x.A.Sim(), x.B.Sim()}
	var joins sync.WaitGroup
	for i := range streams {
		joins.Go(func() {
			// One host name, so that the names are disputed too.
			conn, err := srv[i%2].Dial(t.Context(), sim.NewMachine("twin"))
			if err == nil {
				t.Cleanup(conn.Close)
				_, err = conn.Register(t.Context(), key)
			}
			if err == nil {
				// The stream is the other server's: it has to know the node by now.
				conn, err = srv[(i+1)%2].Dial(t.Context(), conn.Machine())
			}
			if err == nil {
				t.Cleanup(conn.Close)
				streams[i], err = conn.Poll(t.Context())
			}
			if err != nil {
				t.Errorf("machine %d: %v", i, err)
			}
		})
	}
	joins.Wait()
	if t.Failed() {
		return
	}
	for i, st := range streams {
		await(t, fmt.Sprintf("everybody at machine %d", i), st, 2*patience, func(v *sim.View) bool {
			online := 0
			for _, p := range v.Peers {
				if p.Online != nil && *p.Online {
					online++
				}
			}
			return online == len(streams)-1
		})
	}
	x.check(t, "after all joined")
}

// check looks for what must never be in the database.
func (x *Site) check(t *testing.T, when string) {
	t.Helper()
	wrong, err := x.inspect(t.Context())
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	for _, w := range wrong {
		t.Errorf("%s: %s", when, w)
	}
}

// testLoginCrossesServers begins interactive logins at one server, approves
// them at the other, and waits for the answer at either.
func testLoginCrossesServers(t *testing.T, x *Site) {
	x.A.NewUser("anna")
	srv := map[*Server]*sim.Server{x.A: x.A.Sim(), x.B: x.B.Sim()}
	for i, way := range []struct{ begin, wait, approve *Server }{
		{x.A, x.A, x.B}, {x.B, x.B, x.A}, {x.A, x.B, x.A}, {x.B, x.A, x.A},
	} {
		m := sim.NewMachine(fmt.Sprintf("laptop-%d", i))
		first := register(t, srv[way.begin], m, "")
		if first.AuthURL == "" {
			t.Fatalf("way %d: no address to open: %+v", i, first)
		}
		if want := "http://" + x.Front + "/register/"; !strings.HasPrefix(first.AuthURL, want) {
			t.Errorf("the address is %s, want one below %s", first.AuthURL, want)
		}
		answer := make(chan *tailcfg.RegisterResponse, 1)
		go func() { answer <- register(t, srv[way.wait], m, first.AuthURL) }()
		if err := way.approve.Call(t.Context(), "POST", "/api/v1/auth/register", map[string]string{"user": "anna", "authId": path.Base(first.AuthURL)}, nil); err != nil {
			t.Fatalf("way %d: %v", i, err)
		}
		approved := time.Now()
		select {
		case res := <-answer:
			if res == nil || !res.MachineAuthorized || res.Error != "" || res.AuthURL != "" {
				t.Fatalf("way %d: the answer is %+v", i, res)
			}
			t.Logf("way %d: answered %v after the approval", i, time.Since(approved).Round(time.Millisecond))
		case <-time.After(patience):
			t.Fatalf("way %d: no answer after the approval", i)
		}
		_, st := visit(t, srv[way.begin], m, "")
		await(t, "its map", st, patience, func(v *sim.View) bool { return v.Self != nil })
	}
}

// register makes one register request without an auth key. It returns nil when
// there was no answer, and notes that.
func register(t *testing.T, srv *sim.Server, m *sim.Machine, followup string) *tailcfg.RegisterResponse {
	conn, err := srv.Dial(t.Context(), m)
	if err != nil {
		t.Error(err)
		return nil
	}
	defer conn.Close()
	res, err := conn.Send(t.Context(), "/machine/register", &tailcfg.RegisterRequest{
		Version: sim.Version, NodeKey: m.Node.Public(), Hostinfo: &tailcfg.Hostinfo{Hostname: m.Hostname}, Followup: followup,
	})
	if err != nil {
		t.Error(err)
		return nil
	}
	defer res.Body.Close()
	out := new(tailcfg.RegisterResponse)
	if err := json.NewDecoder(io.LimitReader(res.Body, 1<<20)).Decode(out); err != nil || res.StatusCode != http.StatusOK {
		t.Errorf("register: %s: %v", res.Status, err)
		return nil
	}
	return out
}

// writeSomething makes an API key and deletes it again.
func (s *Server) writeSomething() {
	var made struct{ APIKey string }
	s.Must("POST", "/api/v1/apikey", map[string]any{}, &made)
	s.Must("DELETE", "/api/v1/apikey/"+strings.Split(made.APIKey, "-")[2], nil, nil)
}

// testKillOneOfTwoServers kills one server after another in the middle of
// registrations and edits of every kind. What it acknowledged is at the other
// one, whose clients notice nothing.
func testKillOneOfTwoServers(t *testing.T, x *Site) {
	seed := number(t, "SIGNALBOX_FAULT_SEED", uint64(time.Now().UnixNano()))
	t.Logf("seed %d; set SIGNALBOX_FAULT_SEED to repeat it", seed)
	w := newStorm(x.A, seed)
	watcher := prepareStorm(t, w)
	for round := range 4 {
		dies, lives := x.A, x.B
		if round%2 == 1 {
			dies, lives = lives, dies
		}
		w.server = dies
		srv := dies.Sim()
		conn, stream := visit(t, lives.Sim(), watcher, "")
		go stream.Watch(t.Context(), w.watch)
		await(t, "the watcher's map", stream, patience, func(v *sim.View) bool { return v.Self != nil })

		busy := w.after(10 + w.intN(30))
		storming, calm := context.WithCancel(t.Context())
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
		dies.Kill()
		calm()
		<-ended

		w.server = lives
		when := fmt.Sprintf("round %d", round)
		// What the dead server had sent may still be committed. A write of the other one waits for that, by the lock on the tailnet.
		lives.writeSomething()
		x.verify(t, w, when)
		repeatInterrupted(t, w) // at the server that lives, at once
		x.verify(t, w, when+", repeated")
		if err := stream.Err(); err != nil {
			t.Errorf("%s: the watcher's stream at the other server ended: %v", when, err)
		}
		conn.Close()
		dies.Start()
	}
	t.Logf("%d writes were acknowledged, %d of them edits of the policy", w.acks, w.policies.Load())
	if w.acks < 40 || w.policies.Load() == 0 {
		t.Error("the servers were killed before they had much to do")
	}
}

// verify holds the server that lives to the book, and the database to its
// rules.
func (x *Site) verify(t *testing.T, w *storm, when string) {
	t.Helper()
	shown, err := w.shown(t.Context())
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	w.wrong = append(w.wrong, w.book.Check(shown)...)
	for _, line := range w.wrong {
		t.Errorf("%s: %s", when, line)
	}
	x.check(t, when)
	if t.Failed() {
		t.FailNow()
	}
}

// testClientsMoveWhenTheirServerDies kills the server that the balancer sends
// everybody to. The clients come again and are at the other one, and nobody
// sees them go.
func testClientsMoveWhenTheirServerDies(t *testing.T, x *Site) {
	key := x.A.NewKey("anna")
	front, err := sim.Find(t.Context(), x.Front)
	if err != nil {
		t.Fatal(err)
	}
	movers := []*sim.Machine{sim.NewMachine("mover-0"), sim.NewMachine("mover-1"), sim.NewMachine("mover-2")}
	var labels []string
	var streams []*sim.Stream
	for _, m := range movers {
		_, st := visit(t, front, m, key)
		labels, streams = append(labels, m.Hostname), append(streams, st)
	}
	_, witness := x.B.guest(t, "witness", key)
	for _, l := range labels {
		await(t, l, witness, patience, shows(l))
	}
	await(t, "the witness", streams[0], patience, shows("witness"))
	end := neverOffline(t, witness, labels...)
	for _, s := range x.servers(t) {
		if want := map[string]int{x.A.Addr: len(movers), x.B.Addr: 1}[s.addr()]; s.Sessions != want {
			t.Errorf("server %s holds %d streams, want %d", s.Name, s.Sessions, want)
		}
	}

	killed := time.Now()
	x.A.Kill()
	for i, m := range movers {
		<-streams[i].Done()
		_, st := visit(t, front, m, "")
		await(t, "the witness at "+m.Hostname, st, patience, shows("witness"))
		streams[i] = st
	}
	t.Logf("all are back %v after the kill", time.Since(killed).Round(time.Millisecond))
	if took := time.Since(killed); took > 10*time.Second {
		t.Errorf("the clients are back after %v, want 10 s", took)
	}
	// They are the other server's now, and what they say reaches others there.
	await(t, "a rename at the movers", streams[0], patience, renamed(t, x.B, witness, "witness", "seen"))

	// A comes back: clients that go to it again are its own, and nobody flaps.
	x.A.Start()
	for i, m := range movers {
		_, streams[i] = visit(t, x.A.Sim(), m, "")
		await(t, "the witness at "+m.Hostname, streams[i], patience, shows("seen"))
	}
	// Longer than the grace of the streams that were left behind.
	<-time.After(4 * time.Second)
	end()
}

// renamed renames a machine at a server and returns the condition that a view
// shows it.
func renamed(t *testing.T, s *Server, of *sim.Stream, was, now string) func(*sim.View) bool {
	t.Helper()
	s.Must("POST", fmt.Sprintf("/api/v1/node/%d/rename/%s", of.View().Self.ID, now), nil, nil)
	return func(v *sim.View) bool { return v.Peer(now) != nil && v.Peer(was) == nil }
}

type serverRecord struct {
	ID       string
	Name     string
	Self     bool
	Sessions int
}

// addr is the listen address, which ends a server's name.
func (r serverRecord) addr() string { return r.Name[strings.LastIndexByte(r.Name, ' ')+1:] }

// servers is what server B shows of both.
func (x *Site) servers(t *testing.T) []serverRecord {
	t.Helper()
	var out struct{ Servers []serverRecord }
	x.B.Must("GET", "/api/signalbox/v1/servers", nil, &out)
	if len(out.Servers) != 2 {
		t.Errorf("servers are %+v, want two", out.Servers)
	}
	return out.Servers
}

// meet makes a party at each server, all of one tailnet.
func (x *Site) meet(t *testing.T) (a, b *party) {
	t.Helper()
	if err := x.A.setPolicy(t.Context(), policyText(1)); err != nil {
		t.Fatal(err)
	}
	a, b = &party{server: x.A, srv: x.A.Sim()}, &party{server: x.B, srv: x.B.Sim()}
	key := x.A.NewKey("host")
	users, err := x.A.users(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range []*party{a, b} {
		p.key, p.user = key, users[len(users)-1].ID
		for j := range 2 {
			conn, st := visit(t, p.srv, sim.NewMachine(fmt.Sprintf("guest-%d-%d", i, j)), key)
			p.conns, p.streams = append(p.conns, conn), append(p.streams, st)
		}
	}
	for _, p := range []*party{a, b} {
		p.expect(t, "all are online", func(v *sim.View) bool {
			return len(v.Peers) == 3 && !slices.ContainsFunc(labelsOf(v), func(l string) bool { return !shows(l)(v) })
		})
	}
	return a, b
}

func labelsOf(v *sim.View) (out []string) {
	for _, n := range v.Peers {
		l, _, _ := cutLabel(n)
		out = append(out, l)
	}
	return out
}
