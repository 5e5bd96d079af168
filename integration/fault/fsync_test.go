package fault

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/integration/sim"
)

// attach has strace write down, until the returned function is called, when the
// server writes files to the disk and when it answers.
func attach(t *testing.T, s *Server) (detach func() string) {
	t.Helper()
	strace, err := exec.LookPath("strace")
	if err != nil {
		skipOrFail(t, "needs strace")
	}
	file := filepath.Join(t.TempDir(), "trace")
	cmd := exec.Command(strace, "-f", "-y", "-s", "20", "-e", "trace=fsync,fdatasync,write", "-o", file, "-p", strconv.Itoa(s.PID()))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	line, err := bufio.NewReader(said).ReadString('\n')
	if !strings.Contains(line, "attached") {
		cmd.Process.Kill()
		cmd.Wait()
		skipOrFail(t, fmt.Sprintf("strace may not look at the server here: %s %v", line, err))
	}
	go io.Copy(io.Discard, said)
	return func() string {
		cmd.Process.Signal(syscall.SIGINT)
		cmd.Wait()
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
}

var (
	syncBegins = regexp.MustCompile(`^(\d+) +f(?:data)?sync\(\d+<([^>]*)>`)
	syncEnds   = regexp.MustCompile(`^(\d+) .*f(?:data)?sync.*\) += (-?\d+)`)
	answers    = regexp.MustCompile(`^\d+ +write\(\d+<(?:UNIX|socket).*, "HTTP/1.1 200 OK`)
)

// syncs counts how often the database's log reached the disk before each
// answer on the unix socket.
func syncs(trace string) (before []int) {
	n := 0
	file := map[string]string{} // by thread: what it is writing to the disk
	for line := range strings.Lines(trace) {
		if m := syncBegins.FindStringSubmatch(line); m != nil {
			file[m[1]] = m[2]
		}
		if m := syncEnds.FindStringSubmatch(line); m != nil && m[2] == "0" && strings.HasSuffix(file[m[1]], ".db-wal") {
			n++
		}
		if answers.MatchString(line) {
			before, n = append(before, n), 0
		}
	}
	return before
}

func TestFsyncPerWrite(t *testing.T) {
	t.Parallel()
	s := StartServer(t)
	p := gather(t, s, 1)
	// The machine's own report is written at leisure: it must not be taken for
	// that of a later request.
	for _, st := range p.streams {
		st.Close()
	}
	detach := attach(t, s)

	var steps []string
	step := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		steps = append(steps, what)
	}
	for i := range 5 {
		u, err := s.createUser(t.Context(), fmt.Sprintf("synced-%d", i))
		step("create a user", err)
		k, err := s.createKey(t.Context(), u.ID, false, time.Now().Add(time.Hour))
		step("create a key", err)

		machine := sim.NewMachine(fmt.Sprintf("synced-%d", i))
		conn, err := p.srv.Dial(t.Context(), machine)
		if err == nil {
			_, err = conn.Register(t.Context(), k.Key)
			conn.Close()
		}
		// Its answer is sealed; that of the next request stands for it.
		nodes, listErr := s.nodes(t.Context())
		step("register", errors.Join(err, listErr))

		id := nodes[len(nodes)-1].ID
		step("rename", s.Call(t.Context(), "POST", fmt.Sprintf("/api/v1/node/%s/rename/renamed-%d", id, i), nil, nil))
		step("set a policy", s.setPolicy(t.Context(), policyText(i)))
		step("delete a node", s.Call(t.Context(), "DELETE", "/api/v1/node/"+id, nil, nil))
	}
	trace := detach()
	before := syncs(trace)
	if len(before) != len(steps) {
		t.Fatalf("%d answers in the trace, %d requests were made; the trace begins\n%.2000s", len(before), len(steps), trace)
	}
	for i, n := range before {
		if n == 0 {
			t.Errorf("step %d (%s): answered before anything was on the disk", i, steps[i])
		}
	}
	t.Logf("syncs of the log before each answer: %v", before)
}
