package fault

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// furnish gives a server a database with something in it. The server does not
// run.
func furnish(t *testing.T, s *Server) {
	t.Helper()
	s.Start()
	for i := range 60 {
		s.NewUser(fmt.Sprintf("user-%d", i))
	}
	gather(t, s, 3)
	if code := s.Stop(); code != 0 {
		t.Fatalf("the server ends with code %d", code)
	}
}

// edit changes a file.
func edit(t *testing.T, path string, change func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, change(b), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// pageSize is that of a database file, by its header.
func pageSize(file []byte) int { return int(binary.BigEndian.Uint16(file[16:])) }

func TestDamagedDatabase(t *testing.T) {
	t.Parallel()
	whole := NewServer(t)
	furnish(t, whole)
	for name, damage := range map[string]func([]byte) []byte{
		"header":          func(b []byte) []byte { return append(bytes.Repeat([]byte{0x5a}, 100), b[100:]...) },
		"magic":           func(b []byte) []byte { b[0] ^= 1; return b },
		"page in between": func(b []byte) []byte { return scramble(b, len(b)/pageSize(b)/2) },
		"every page but the first": func(b []byte) []byte {
			for i := 1; i < len(b)/pageSize(b); i++ {
				b = scramble(b, i)
			}
			return b
		},
		"half a file":    func(b []byte) []byte { return b[:len(b)/2] },
		"last page lost": func(b []byte) []byte { return b[:len(b)-pageSize(b)] },
		"a few bytes":    func(b []byte) []byte { return b[:50] },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := NewServer(t)
			copyFiles(t, whole.Data, s.Data)
			edit(t, s.Database(), damage)
			damaged, _ := os.ReadFile(s.Database())
			if s.Launch() {
				t.Fatal("the server serves a damaged database")
			}
			if code := s.ExitCode(); code != 3 {
				t.Errorf("exit code %d, want 3", code)
			}
			if said := s.Log.Tail(5); !strings.Contains(said, "restore") || !strings.Contains(said, s.Database()) {
				t.Errorf("no hint what to do:\n%s", said)
			}
			if now, _ := os.ReadFile(s.Database()); !bytes.Equal(now, damaged) {
				t.Error("the damaged file was changed")
			}
		})
	}
}

// scramble destroys one page.
func scramble(b []byte, page int) []byte {
	size := pageSize(b)
	for i := page * size; i < (page+1)*size; i++ {
		b[i] = byte(i*7 + 13)
	}
	return b
}

func TestDamageWhileRunning(t *testing.T) {
	t.Parallel()
	s := NewServer(t)
	furnish(t, s)
	s.Start()
	p := gather(t, s, 3)
	whole, err := os.ReadFile(s.Database())
	if err != nil {
		t.Fatal(err)
	}
	// In place, as a bad disk does it.
	damaged := bytes.Clone(whole)
	for i := 1; i < len(damaged)/pageSize(damaged); i++ {
		damaged = scramble(damaged, i)
	}
	f, err := os.OpenFile(s.Database(), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(damaged, 0); err != nil {
		t.Fatal(err)
	}
	// Pages that SQLite holds in memory stay good. Others it reads anew after a
	// write, and then it notices.
	s.NewUser("late")
	for _, path := range []string{"/api/v1/user", "/api/v1/node", "/api/v1/preauthkey", "/api/v1/policy"} {
		begin := time.Now()
		err := s.Call(t.Context(), "GET", path, nil, nil)
		if e, ok := errors.AsType[*APIError](err); ok {
			unavailable(t, "read of a damaged page", e.Status, e.Retry, time.Since(begin))
		} else if err != nil {
			t.Error(err)
		}
	}
	begin := time.Now()
	_, err = s.createUser(t.Context(), "too-late")
	if e, ok := errors.AsType[*APIError](err); ok {
		unavailable(t, "write to a damaged database", e.Status, e.Retry, time.Since(begin))
	} else {
		t.Fatalf("a write to a damaged database: %v", err)
	}
	if e, ok := errors.AsType[*APIError](s.setPolicy(t.Context(), policyText(1))); !ok || e.Status != 503 {
		t.Errorf("another write to a damaged database: %v, want 503", e)
	}
	s.unhealthy(t)
	p.unbroken(t)
	if _, err := p.conns[0].Whoami(t.Context()); err != nil {
		t.Errorf("a connected client gets no answer: %v", err)
	}

	// The disk was only out of its mind for a while. The log beside the file
	// must be as it was, or what it holds is lost with it.
	if _, err := f.WriteAt(whole, 0); err != nil {
		t.Fatal(err)
	}
	p.recovers(t)
	// By now the server has followed its own writes, so no check is left that found the damage.
	if code, text, err := Get(t.Context(), s.URL+"/health"); code != 200 {
		t.Errorf("/health after healing: status %d %s, %v", code, text, err)
	}
}

// files reads the database and its log.
func (s *Server) files(t *testing.T) [2][]byte {
	t.Helper()
	var out [2][]byte
	for i, suffix := range []string{"", "-wal"} {
		var err error
		if out[i], err = os.ReadFile(s.Database() + suffix); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func TestRefusedStartChangesNothing(t *testing.T) {
	t.Parallel()
	whole := NewServer(t)
	furnish(t, whole)
	whole.Start()
	whole.NewUser("in-the-log")
	whole.Signal(syscall.SIGSTOP)
	s := NewServer(t)
	copyFiles(t, whole.Data, s.Data)
	whole.Kill()
	healthy := s.files(t)
	edit(t, s.Database(), func(b []byte) []byte { return scramble(b, len(b)/pageSize(b)/2) })
	before := s.files(t)
	if s.Launch() {
		t.Fatal("the server serves a damaged database")
	}
	if code := s.ExitCode(); code != 3 {
		t.Errorf("exit code %d, want 3", code)
	}
	after := s.files(t)
	for i, what := range []string{"file", "log"} {
		if !bytes.Equal(before[i], after[i]) {
			t.Errorf("the %s was changed from %d to %d bytes", what, len(before[i]), len(after[i]))
		}
	}
	// So that the log is good for the whole file.
	if err := os.WriteFile(s.Database(), healthy[0], 0o600); err != nil {
		t.Fatal(err)
	}
	s.Start()
	users, err := s.users(t.Context())
	if err != nil || !slices.ContainsFunc(users, func(u userRecord) bool { return u.Name == "in-the-log" }) {
		t.Errorf("an acknowledged user is lost: %v %v", users, err)
	}
}

// crashed is a server with acknowledged users, of which none has reached the
// database file itself: all are in the log beside it.
func crashed(t *testing.T, users int) *Server {
	t.Helper()
	s := StartServer(t)
	for i := range users {
		s.NewUser(fmt.Sprintf("user-%d", i))
	}
	s.Signal(syscall.SIGSTOP)
	after := NewServer(t)
	copyFiles(t, s.Data, after.Data)
	s.Kill()
	return after
}

// userNumbers is how many users of crashed a server has. They must be the first
// ones.
func userNumbers(t *testing.T, s *Server) int {
	t.Helper()
	users, err := s.users(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, u := range users {
		have[u.Name] = true
	}
	n := 0
	for have[fmt.Sprintf("user-%d", n)] {
		n++
	}
	if n != len(users)-1 { // and the one that a new server has
		t.Errorf("of %d users only the first %d are in a row", len(users), n)
	}
	return n
}

func TestTornLogTail(t *testing.T) {
	t.Parallel()
	const users = 25
	original := crashed(t, users)
	wal, err := os.ReadFile(original.Database() + "-wal")
	if err != nil {
		t.Fatal(err)
	}
	frame := 24 + 4096
	torn := bytes.Clone(wal[32 : 32+frame]) // an old frame, whose salt or checksum cannot hold here
	for name, c := range map[string]struct {
		change func([]byte) []byte
		least  int
	}{
		"half a frame after the last":    {func(b []byte) []byte { return append(b, torn[:frame/2]...) }, users},
		"a foreign frame after the last": {func(b []byte) []byte { return append(b, torn...) }, users},
		"noise after the last":           {func(b []byte) []byte { return append(b, bytes.Repeat([]byte{0xa5}, 3*frame)...) }, users},
		"the last frame cut":             {func(b []byte) []byte { return b[:len(b)-100] }, users - 1},
		"the last frame wrong":           {func(b []byte) []byte { b[len(b)-1] ^= 0xff; return b }, users - 1},
		"index lost":                     {nil, users},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := NewServer(t)
			copyFiles(t, original.Data, s.Data)
			if c.change == nil {
				if err := os.Remove(s.Database() + "-shm"); err != nil {
					t.Fatal(err)
				}
			} else {
				edit(t, s.Database()+"-wal", c.change)
			}
			s.Start()
			if n := userNumbers(t, s); n != c.least {
				t.Errorf("%d users are there, want %d", n, c.least)
			}
			if broken, err := inspect(t.Context(), s.Database()); err != nil || len(broken) > 0 {
				t.Errorf("%v %v", broken, err)
			}
			gather(t, s, 2)
		})
	}
	if len(wal) != 32+len(wal)/frame*frame {
		t.Fatalf("the log has %d bytes: no whole number of frames", len(wal))
	}
}
