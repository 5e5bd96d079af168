package main

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/signalbox-net/signalbox/derp"
)

// The scripts run the real command line in processes of its own.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"signalbox": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			env.Setenv("SIGNALBOX_DATA_DIR", env.WorkDir+"/data")
			return nil
		},
		Cmds:                map[string]func(*testscript.TestScript, bool, []string){"code": code, "serve": serve, "logged": logged, "hangup": hangup, "certificate": certificate, "envfile": envfile},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

// code runs a command that has to end with the given exit code: code 2 COMMAND…
func code(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N COMMAND…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// serve starts a server and waits until it is ready. What it prints goes to the
// file serve.out, what it logs until then to serve.log, the address of its main
// listener to $ADDR. It is stopped by
// SIGTERM at the end of the script, and has to end well.
func serve(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("usage: serve FLAGS…")
	}
	path, err := exec.LookPath("signalbox")
	ts.Check(err)
	out, err := os.Create(ts.MkAbs("serve.out"))
	ts.Check(err)
	defer out.Close()
	cmd := exec.Command(path, append([]string{"serve"}, args...)...)
	cmd.Dir = ts.MkAbs(".")
	for _, name := range []string{"PATH", "HOME", "SIGNALBOX_DATA_DIR"} {
		cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
	}
	cmd.Stdout = out
	stderr, err := cmd.StderrPipe()
	ts.Check(err)
	ts.Check(cmd.Start())

	log := &journal{more: make(chan struct{}), process: cmd.Process}
	running.Store(ts, log)
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			log.add(lines.Text())
		}
		log.end()
	}()
	ts.Defer(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		<-drained
		if err := cmd.Wait(); err != nil {
			ts.Fatalf("serve: %v\n%s", err, log)
		}
	})
	m := log.await(ts, serving)
	ts.Check(os.WriteFile(ts.MkAbs("serve.log"), []byte(log.String()), 0o600))
	ts.Setenv("ADDR", m[1])
}

// running has the *journal of the server that each *testscript.TestScript
// started last.
var running sync.Map

// last is the journal of the script's server.
func last(ts *testscript.TestScript) *journal {
	j, ok := running.Load(ts)
	if !ok {
		ts.Fatalf("no server was started")
	}
	return j.(*journal)
}

// A journal is the log of a server.
type journal struct {
	process *os.Process

	mu    sync.Mutex // guards the following fields
	lines []string
	ended bool
	more  chan struct{} // closed at the next change
}

func (j *journal) change(fn func()) {
	j.mu.Lock()
	defer j.mu.Unlock()
	fn()
	close(j.more)
	j.more = make(chan struct{})
}

func (j *journal) add(line string) { j.change(func() { j.lines = append(j.lines, line) }) }
func (j *journal) end()            { j.change(func() { j.ended = true }) }

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Join(j.lines, "\n") + "\n"
}

// await returns the submatches of the first line that fits, from the start on.
func (j *journal) await(ts *testscript.TestScript, re *regexp.Regexp) []string {
	giveUp := time.NewTimer(time.Minute)
	defer giveUp.Stop()
	for seen := 0; ; {
		j.mu.Lock()
		lines, ended, more := j.lines, j.ended, j.more
		j.mu.Unlock()
		for ; seen < len(lines); seen++ {
			if m := re.FindStringSubmatch(lines[seen]); m != nil {
				return m
			}
		}
		if ended {
			ts.Fatalf("serve ended\n%s", j)
		}
		select {
		case <-more:
		case <-giveUp.C:
			ts.Fatalf("nothing logged like %v\n%s", re, j)
		}
	}
}

// logged waits until the server that was started last has logged a line that
// fits, since its start: logged REGEXP.
func logged(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: logged REGEXP")
	}
	re, err := regexp.Compile(args[0])
	ts.Check(err)
	last(ts).await(ts, re)
}

// hangup sends SIGHUP to the server that was started last.
func hangup(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: hangup")
	}
	ts.Check(last(ts).process.Signal(syscall.SIGHUP))
}

// certificate writes a new certificate and its key: certificate HOST CERT KEY.
func certificate(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: certificate HOST CERT KEY")
	}
	cert, key, err := derp.NewPinnedCert(args[0], time.Now())
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), cert, 0o600))
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), key, 0o600))
}

var serving = regexp.MustCompile(`msg=serving .*listen=(\S+)`)

// envfile sets a variable to the content of a file: envfile NAME FILE.
func envfile(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: envfile NAME FILE")
	}
	ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile(args[1])))
}
