// Package fault holds the built server to what it promises when things go
// wrong: processes that are killed, disks that are full, databases that are
// locked or damaged, and clients that mean harm.
//
// Nothing of the product is imported. A Server is the real binary with a data
// directory of its own on a loopback address of its own, so that tests run
// beside each other and a second start finds the ports free. Its simulated
// clients come from integration/sim.
//
// Every fact that the server acknowledged goes into a Book. After a fault the
// book is compared with what the server shows: a fact that was acknowledged
// must be there, one whose request got no answer may be there whole or not at
// all, and nothing else may be there.
package fault

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/integration/sim"
)

// builds makes the binary once for all tests of a run.
var builds struct {
	sync.Once
	path string
	err  error
}

// Binary builds the server, or takes the one that SIGNALBOX_FAULT_BINARY
// names. It skips the test under -short.
func Binary(t testing.TB) string {
	t.Helper()
	if testing.Short() {
		t.Skip("drives the built server for seconds: not with -short")
	}
	builds.Do(func() {
		if builds.path = os.Getenv("SIGNALBOX_FAULT_BINARY"); builds.path != "" {
			return
		}
		dir, err := os.MkdirTemp("", "signalbox-fault-")
		if err != nil {
			builds.err = err
			return
		}
		builds.path = filepath.Join(dir, "signalbox")
		cmd := exec.Command("go", "build", "-o", builds.path, "github.com/signalbox-net/signalbox/cmd/signalbox")
		if out, err := cmd.CombinedOutput(); err != nil {
			builds.err = fmt.Errorf("build the server: %w\n%s", err, out)
		}
	})
	if builds.err != nil {
		t.Fatal(builds.err)
	}
	return builds.path
}

// removeBinary is called when all tests have ended.
func removeBinary() {
	if builds.path != "" && os.Getenv("SIGNALBOX_FAULT_BINARY") == "" {
		os.RemoveAll(filepath.Dir(builds.path))
	}
}

// NeedRoot skips a test that an ordinary user cannot run.
func NeedRoot(t testing.TB, what string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skipf("needs root %s", what)
	}
}

// skipOrFail skips a test that this machine cannot run, unless
// SIGNALBOX_LAB=require says that it has all that tests need.
func skipOrFail(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("SIGNALBOX_LAB") == "require" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// servers numbers the loopback addresses of this process's servers.
var servers atomic.Uint32

// Server is one server process after another on the same data.
type Server struct {
	t      testing.TB
	binary string

	Host    string // the loopback address that is this server's only
	Addr    string // of the main listener
	Metrics string // of the metrics listener
	URL     string
	Data    string // data directory, as the server's arguments name it
	Log     *Journal

	// Wrap, if set, runs the server's command line by another program.
	Wrap func(command []string) []string
	// Namespace gives the server a mount namespace of its own. Its files are
	// then found under Root.
	Namespace bool
	// Env is added to the environment. ByEnv leaves --url out: the variables say
	// where the server listens.
	Env   []string
	ByEnv bool

	api  *http.Client
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended; nil before Start
}

// NewServer prepares a server with an empty data directory; Start runs it.
func NewServer(t testing.TB) *Server {
	t.Helper()
	binary := Binary(t)
	host := fmt.Sprintf("127.%d.%d.1", 2+os.Getpid()%250, servers.Add(1)%250)
	s := &Server{
		t: t, binary: binary, Host: host, Addr: host + ":8080", Metrics: host + ":9090", URL: "http://" + host + ":8080",
		Data: filepath.Join(t.TempDir(), "data"), Log: NewJournal(),
	}
	s.api = &http.Client{
		Timeout: 15 * time.Second,
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", s.File("signalbox.sock"))
			},
			MaxIdleConnsPerHost: 32,
		},
	}
	t.Cleanup(func() {
		s.Kill()
		if t.Failed() {
			t.Logf("the end of the server's log:\n%s", s.Log.Tail(40))
		}
	})
	return s
}

// StartServer is NewServer and Start.
func StartServer(t testing.TB) *Server {
	t.Helper()
	s := NewServer(t)
	s.Start()
	return s
}

// File is the path by which the test reaches a file of the data directory.
func (s *Server) File(name string) string {
	path := filepath.Join(s.Data, name)
	if s.Namespace {
		path = fmt.Sprintf("/proc/%d/root%s", s.PID(), path)
	}
	return path
}

// Database is the path by which the test reaches the database.
func (s *Server) Database() string { return s.File("signalbox.db") }

// Command is a run of the binary with this server's data directory.
func (s *Server) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.binary, append([]string{"--data-dir", s.Data}, args...)...)
	cmd.Env = s.environment()
	return cmd
}

func (s *Server) environment() []string {
	env := []string{"SIGNALBOX_METRICS_LISTEN_ADDR=" + s.Metrics}
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "SIGNALBOX_") && !strings.HasPrefix(v, "HEADSCALE_") {
			env = append(env, v)
		}
	}
	return append(env, s.Env...)
}

// Launch starts a process and waits until it serves or has ended, and reports
// whether it serves.
func (s *Server) Launch() bool {
	s.t.Helper()
	command := []string{s.binary, "--data-dir", s.Data, "serve"}
	if !s.ByEnv {
		command = append(command, "--url", s.URL)
	}
	if s.Wrap != nil {
		command = s.Wrap(command)
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Env, cmd.Stdout, cmd.Stderr = s.environment(), s.Log, s.Log
	// A server must not outlive a test that was killed.
	// A group of its own: the kernel may hang up a group that has a stopped member, and tests stop servers.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if s.Namespace {
		cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	}
	begin := s.Log.Len()
	if err := cmd.Start(); err != nil {
		s.t.Fatalf("start the server: %v", err)
	}
	done := make(chan struct{})
	s.cmd, s.done = cmd, done
	go func() {
		cmd.Wait()
		close(done)
	}()
	timeout := time.NewTimer(time.Minute)
	defer timeout.Stop()
	for {
		text, more := s.Log.From(begin)
		if strings.Contains(text, "msg=serving") {
			return true
		}
		select {
		case <-more:
		case <-done:
			return false
		case <-timeout.C:
			s.t.Fatalf("the server does not start; it says:\n%s", text)
		}
	}
}

// Start is Launch of a server that has to serve.
func (s *Server) Start() {
	s.t.Helper()
	if !s.Launch() {
		s.t.Fatalf("the server ends with code %d; it says:\n%s", s.ExitCode(), s.Log.Tail(10))
	}
}

// PID is the process's id.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Signal sends a signal to the process.
func (s *Server) Signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatalf("send %v: %v", sig, err)
	}
}

// Kill ends the process as a power cut would end it, and waits for its end.
func (s *Server) Kill() {
	if s.done == nil {
		return
	}
	s.cmd.Process.Kill()
	<-s.done
	s.api.CloseIdleConnections()
}

// Stop asks the process to end and returns its exit code.
func (s *Server) Stop() int {
	s.t.Helper()
	s.Signal(syscall.SIGTERM)
	select {
	case <-s.done:
	case <-time.After(20 * time.Second):
		s.t.Fatal("the server does not stop")
	}
	s.api.CloseIdleConnections()
	return s.ExitCode()
}

// Running reports whether the process has not ended.
func (s *Server) Running() bool {
	select {
	case <-s.done:
		return false
	default:
		return true
	}
}

// ExitCode is that of the process, which has ended.
func (s *Server) ExitCode() int {
	<-s.done
	return s.cmd.ProcessState.ExitCode()
}

// Sim is the server as simulated clients know it.
func (s *Server) Sim() *sim.Server {
	s.t.Helper()
	srv, err := sim.Find(s.t.Context(), s.Addr)
	if err != nil {
		s.t.Fatal(err)
	}
	return srv
}

// Journal keeps what a program prints, over its restarts.
type Journal struct {
	mu   sync.Mutex // guards text and more
	text []byte
	more chan struct{} // closed by the next write
}

// NewJournal returns an empty journal.
func NewJournal() *Journal { return &Journal{more: make(chan struct{})} }

func (j *Journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.text = append(j.text, b...)
	close(j.more)
	j.more = make(chan struct{})
	return len(b), nil
}

// Len is the number of bytes so far.
func (j *Journal) Len() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.text)
}

// From returns what was printed after the first n bytes, and a channel that is
// closed when there is more.
func (j *Journal) From(n int) (string, <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return string(j.text[n:]), j.more
}

// Tail returns the last n lines.
func (j *Journal) Tail(n int) string {
	text, _ := j.From(0)
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
