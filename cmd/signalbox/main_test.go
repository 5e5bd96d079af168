package main

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
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
		Cmds:                map[string]func(*testscript.TestScript, bool, []string){"code": code, "serve": serve, "envfile": envfile},
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

	var log strings.Builder
	lines := bufio.NewScanner(stderr)
	addr := ""
	for addr == "" && lines.Scan() {
		log.WriteString(lines.Text() + "\n")
		if m := serving.FindStringSubmatch(lines.Text()); m != nil {
			addr = m[1]
		}
	}
	ts.Check(os.WriteFile(ts.MkAbs("serve.log"), []byte(log.String()), 0o600))
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		for lines.Scan() {
			log.WriteString(lines.Text() + "\n")
		}
	}()
	ts.Defer(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		<-drained
		if err := cmd.Wait(); err != nil {
			ts.Fatalf("serve: %v\n%s", err, log.String())
		}
	})
	if addr == "" {
		<-drained
		ts.Fatalf("serve ended\n%s", log.String())
	}
	ts.Setenv("ADDR", addr)
}

var serving = regexp.MustCompile(`msg=serving .*listen=(\S+)`)

// envfile sets a variable to the content of a file: envfile NAME FILE.
func envfile(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: envfile NAME FILE")
	}
	ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile(args[1])))
}
