package integration

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
)

// A process is a long-running program of a host.
type process struct {
	name string
	cmd  *exec.Cmd
	out  *journal // standard output
	log  *journal // standard error

	done chan struct{} // closed when it has ended
	err  error         // how it ended; valid after done
}

// launch starts a program inside the host and adds what it prints to the
// journals.
func (h *Host) launch(env []string, out, log *journal, name string, args ...string) (*process, error) {
	cmd := h.command(context.Background(), env, name, args...)
	cmd.Stdout, cmd.Stderr = out, log
	if err := h.start(cmd); err != nil {
		return nil, fmt.Errorf("start %s on %s: %w", name, h.Name, err)
	}
	p := &process{name: name, cmd: cmd, out: out, log: log, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// signal sends sig and waits for the process to end.
func (p *process) signal(sig os.Signal) {
	p.cmd.Process.Signal(sig)
	<-p.done
}

// kill ends the process as a power cut would, without a chance to say goodbye.
func (p *process) kill() { p.signal(syscall.SIGKILL) }

// A journal keeps what a program prints, over its restarts.
type journal struct {
	mu   sync.Mutex // guards buf and more
	buf  bytes.Buffer
	more chan struct{} // closed by the next write
}

func newJournal() *journal { return &journal{more: make(chan struct{})} }

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	close(j.more)
	j.more = make(chan struct{})
	return j.buf.Write(b)
}

// String returns everything printed up to now.
func (j *journal) String() string {
	s, _ := j.watch()
	return s
}

// watch returns everything printed up to now, and a channel that closes when
// there is more.
func (j *journal) watch() (string, <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.String(), j.more
}

// showOnFailure prints the end of a journal if the test fails.
func (j *journal) showOnFailure(t testing.TB, title string, lines int) {
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of %s:\n%s", title, tail(j.String(), lines))
		}
	})
}
