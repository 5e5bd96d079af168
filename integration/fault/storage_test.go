package fault

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/integration/sim"
)

// patience bounds a refused write: it must never hang longer.
const patience = 10 * time.Second

// A party is a few machines of one tailnet, each with an open stream that has
// all others as online peers.
type party struct {
	server  *Server
	srv     *sim.Server
	key     string // auth key to join by
	user    string // its owner's id
	conns   []*sim.Conn
	streams []*sim.Stream
}

// parties numbers the users who own them.
var parties atomic.Uint32

// gather joins n machines and waits until each has all others in its view.
func gather(t *testing.T, s *Server, n int) *party {
	t.Helper()
	p := &party{server: s, srv: s.Sim(), user: s.NewUser("host-" + strconv.Itoa(int(parties.Add(1))))}
	k, err := s.createKey(t.Context(), p.user, true, time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	p.key = k.Key
	for i := range n {
		conn, err := p.srv.Dial(t.Context(), sim.NewMachine(fmt.Sprintf("guest-%d", i)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(conn.Close)
		if _, err := conn.Register(t.Context(), p.key); err != nil {
			t.Fatal(err)
		}
		stream, err := conn.Poll(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		p.conns, p.streams = append(p.conns, conn), append(p.streams, stream)
	}
	p.expect(t, "all are online", func(v *sim.View) bool {
		online := 0
		for _, peer := range v.Peers {
			if peer.Online != nil && *peer.Online {
				online++
			}
		}
		return online == n-1
	})
	return p
}

// expect waits until every view is as cond says.
func (p *party) expect(t *testing.T, what string, cond func(*sim.View) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Second, fmt.Errorf("waited in vain: %s", what))
	defer cancel()
	for i, st := range p.streams {
		if err := st.Wait(ctx, cond); err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
	}
}

// unbroken checks that no stream has ended.
func (p *party) unbroken(t *testing.T) {
	t.Helper()
	for i, st := range p.streams {
		if err := st.Err(); err != nil {
			t.Errorf("stream %d ended: %v", i, err)
		}
	}
}

// alive has one more machine join and waits until every stream shows it.
func (p *party) alive(t *testing.T, hostname string) {
	t.Helper()
	conn, err := p.srv.Dial(t.Context(), sim.NewMachine(hostname))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Register(t.Context(), p.key); err != nil {
		t.Fatal(err)
	}
	if err := conn.Report(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.expect(t, hostname+" is a peer", func(v *sim.View) bool { return v.Peer(hostname) != nil })
}

// contents is what the server shows of everything that can be written.
func (s *Server) contents(t *testing.T) map[string]any {
	t.Helper()
	out := map[string]any{}
	for _, path := range []string{"/api/v1/user", "/api/v1/node", "/api/v1/preauthkey", "/api/v1/apikey", "/api/v1/policy"} {
		var v any
		s.Must("GET", path, nil, &v)
		out[path] = v
	}
	return out
}

func compare(t *testing.T, what string, want, got map[string]any) {
	t.Helper()
	for path, v := range want {
		if !reflect.DeepEqual(v, got[path]) {
			t.Errorf("%s: %s was\n%v\nand is\n%v", what, path, v, got[path])
		}
	}
}

// unavailable checks that a write was refused for now, in time.
func unavailable(t *testing.T, what string, code int, retry string, took time.Duration) {
	t.Helper()
	if code != http.StatusServiceUnavailable {
		t.Errorf("%s: status %d, want 503", what, code)
	}
	if n, err := strconv.Atoi(retry); err != nil || n < 1 || n > 5 {
		t.Errorf("%s: Retry-After %q, want 1 to 5 seconds", what, retry)
	}
	if took > patience {
		t.Errorf("%s: answered after %v, must not take longer than %v", what, took, patience)
	}
}

// refusesWrites has writes of every kind refused, all at once.
func (p *party) refusesWrites(t *testing.T) {
	t.Helper()
	api := func(method, path string, body any) func(context.Context) (int, string, error) {
		return func(ctx context.Context) (int, string, error) {
			err := p.server.Call(ctx, method, path, body, nil)
			if e, ok := errors.AsType[*APIError](err); ok {
				return e.Status, e.Retry, nil
			}
			return 200, "", err
		}
	}
	client := func(request func(context.Context) error) func(context.Context) (int, string, error) {
		return func(ctx context.Context) (int, string, error) {
			err := request(ctx)
			if e, ok := errors.AsType[*sim.Refusal](err); ok {
				return e.Status, e.Retry, nil
			}
			return 200, "", err
		}
	}
	writes := map[string]func(context.Context) (int, string, error){
		"create user":   api("POST", "/api/v1/user", map[string]string{"name": "refused"}),
		"create key":    api("POST", "/api/v1/preauthkey", map[string]any{"user": p.user}),
		"create apikey": api("POST", "/api/v1/apikey", map[string]any{}),
		"set policy":    api("PUT", "/api/v1/policy", map[string]string{"policy": policyText(999)}),
		"rename node":   api("POST", "/api/v1/node/1/rename/refused", nil),
		"delete node":   api("DELETE", "/api/v1/node/2", nil),
		"register": client(func(ctx context.Context) error {
			conn, err := p.srv.Dial(ctx, sim.NewMachine("refused"))
			if err != nil {
				return err
			}
			defer conn.Close()
			_, err = conn.Register(ctx, p.key)
			return err
		}),
		"report": client(func(ctx context.Context) error {
			return p.conns[0].Report(ctx, netip.MustParseAddrPort("192.0.2.77:41641"))
		}),
	}
	type result struct {
		what  string
		code  int
		retry string
		took  time.Duration
		err   error
	}
	results := make(chan result, len(writes))
	for what, write := range writes {
		go func() {
			begin := time.Now()
			code, retry, err := write(t.Context())
			results <- result{what, code, retry, time.Since(begin), err}
		}()
	}
	for range writes {
		r := <-results
		if r.err != nil {
			t.Errorf("%s: no answer: %v", r.what, r.err)
			continue
		}
		unavailable(t, r.what, r.code, r.retry, r.took)
	}
}

// unhealthy waits for /health to fail and name the database.
func (s *Server) unhealthy(t *testing.T) {
	t.Helper()
	begin := time.Now()
	code, text, err := Get(t.Context(), s.URL+"/health")
	if err != nil || code != http.StatusServiceUnavailable {
		t.Errorf("/health: status %d %s, %v; want 503", code, text, err)
	}
	if took := time.Since(begin); took > patience {
		t.Errorf("/health answered after %v", took)
	}
}

// recovers makes writes until one succeeds, and fails when that takes too long.
func (p *party) recovers(t *testing.T) {
	t.Helper()
	begin := time.Now()
	for i := 0; ; i++ {
		_, err := p.server.createUser(t.Context(), fmt.Sprintf("healed-%d", i))
		if err == nil {
			break
		}
		if time.Since(begin) > patience {
			t.Fatalf("no write succeeds %v after the fault was healed: %v", time.Since(begin), err)
		}
	}
	if code, text, err := Get(t.Context(), p.server.URL+"/health"); code != 200 {
		t.Errorf("/health after healing: status %d %s, %v", code, text, err)
	}
	p.alive(t, "healed")
	p.unbroken(t)
}

// faulty makes the checks of a server whose storage takes no writes at the
// moment: it refuses them, keeps its streams, and shows what it showed before.
func (p *party) faulty(t *testing.T) {
	t.Helper()
	before := p.server.contents(t)
	seen := p.streams[1].View()
	p.refusesWrites(t)
	p.server.unhealthy(t)
	compare(t, "after refused writes", before, p.server.contents(t))
	if now := p.streams[1].View(); !reflect.DeepEqual(seen.Peers, now.Peers) {
		t.Errorf("a client was shown what the database refused: peers were\n%v\nand are\n%v", seen.Peers, now.Peers)
	}
	p.unbroken(t)
}

func TestDiskFull(t *testing.T) {
	NeedRoot(t, "to mount a small file system")
	t.Parallel()
	s := NewServer(t)
	s.Namespace = true
	if err := os.MkdirAll(s.Data, 0o750); err != nil {
		t.Fatal(err)
	}
	s.Wrap = func(command []string) []string {
		script := `mount -t tmpfs -o size=48m,mode=0750 tmpfs "$0" && exec "$@"`
		return append([]string{"/bin/sh", "-c", script, s.Data}, command...)
	}
	s.Start()
	p := gather(t, s, 4)

	fill(t, s.File("filler"))
	acknowledged := 0
	for ; ; acknowledged++ {
		begin := time.Now()
		_, err := s.createUser(t.Context(), fmt.Sprintf("squeezed-%d", acknowledged))
		if err == nil && acknowledged < 50_000 {
			continue // there is room in the log yet
		}
		e, ok := errors.AsType[*APIError](err)
		if !ok {
			t.Fatalf("write %d on a full disk: %v", acknowledged, err)
		}
		unavailable(t, "first refused write", e.Status, e.Retry, time.Since(begin))
		break
	}
	t.Logf("%d writes fitted in", acknowledged)
	p.faulty(t)

	if err := os.Remove(s.File("filler")); err != nil {
		t.Fatal(err)
	}
	p.recovers(t)
	want := s.contents(t)

	// What a crash would leave of the disk is served as it was acknowledged.
	s.Signal(syscall.SIGSTOP)
	after := NewServer(t)
	copyFiles(t, s.File(""), after.Data)
	s.Kill()
	after.Start()
	got := after.contents(t)
	for _, v := range []map[string]any{want, got} {
		forgetPresence(v)
	}
	compare(t, "after a crash", want, got)
	if broken, err := inspect(t.Context(), after.Database()); err != nil || len(broken) > 0 {
		t.Errorf("after a crash: %v %v", broken, err)
	}
}

// fill writes to a file until the disk takes no more.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); errors.Is(err, syscall.ENOSPC) {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// copyFiles copies the regular files of a directory into a new one.
func copyFiles(t *testing.T, from, to string) {
	t.Helper()
	if err := os.MkdirAll(to, 0o750); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		b, err := os.ReadFile(filepath.Join(from, e.Name()))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, e.Name()), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// forgetPresence removes what may change by a crash.
func forgetPresence(contents map[string]any) {
	list, _ := contents["/api/v1/node"].(map[string]any)
	nodes, _ := list["nodes"].([]any)
	for _, n := range nodes {
		delete(n.(map[string]any), "lastSeen")
		delete(n.(map[string]any), "online")
	}
}

func TestDatabaseLocked(t *testing.T) {
	t.Parallel()
	s := StartServer(t)
	p := gather(t, s, 4)
	p.locked(t, 8*time.Second)
	p.recovers(t)
}

// locked runs the checks of a faulty server while another process holds the
// database's write lock, which it does for the given time at least.
func (p *party) locked(t *testing.T, least time.Duration) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+p.server.Database()+"?_pragma=busy_timeout(5000)")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.ExecContext(t.Context(), "BEGIN EXCLUSIVE"); err != nil {
		t.Fatal(err)
	}
	until := time.After(least)
	p.faulty(t)
	<-until
	if _, err := conn.ExecContext(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
}

func TestSecondProcessRefused(t *testing.T) {
	t.Parallel()
	s := StartServer(t)
	p := gather(t, s, 2)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	other := NewServer(t)
	cmd := exec.CommandContext(ctx, s.binary, "--data-dir", s.Data, "serve", "--url", other.URL)
	cmd.Env = other.environment()
	out, err := cmd.CombinedOutput()
	if code := cmd.ProcessState.ExitCode(); err == nil || code <= 0 || code == 3 {
		t.Errorf("the second server ends with %v (code %d), want a failure that is not damage; it says:\n%s", err, code, out)
	}
	if !containsAll(string(out), "signalbox.db", "another process") {
		t.Errorf("the second server does not say what is wrong:\n%s", out)
	}
	p.unbroken(t)
	p.alive(t, "undisturbed")
}

func TestSIGTERM(t *testing.T) {
	t.Parallel()
	s := StartServer(t)
	p := gather(t, s, 3)
	want := s.contents(t)
	begin := time.Now()
	if code := s.Stop(); code != 0 {
		t.Errorf("the server ends with code %d after SIGTERM:\n%s", code, s.Log.Tail(10))
	}
	if took := time.Since(begin); took > 6*time.Second {
		t.Errorf("the server takes %v to end", took)
	}
	for i, st := range p.streams {
		select {
		case <-st.Done():
			if err := st.Err(); !errors.Is(err, io.EOF) {
				t.Errorf("stream %d ends by %v, want a clean end", i, err)
			}
		case <-time.After(5 * time.Second):
			t.Errorf("stream %d goes on", i)
		}
	}
	if left, _ := filepath.Glob(s.Database() + "-*"); len(left) > 0 {
		t.Errorf("a clean end leaves %v", left)
	}
	s.Start()
	got := s.contents(t)
	for _, v := range []map[string]any{want, got} {
		forgetPresence(v)
	}
	compare(t, "after a restart", want, got)
}

func TestProcessPause(t *testing.T) {
	t.Parallel()
	s := StartServer(t)
	p := gather(t, s, 3)
	s.Signal(syscall.SIGSTOP)
	<-time.After(6 * time.Second) // the pause is what is tested
	s.Signal(syscall.SIGCONT)
	p.alive(t, "awake")
	p.unbroken(t)
}
