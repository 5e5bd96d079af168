package serve

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// A logBook keeps what is logged and tells when a line has come.
type logBook struct {
	mu    sync.Mutex // guards the following fields
	text  bytes.Buffer
	moved chan struct{} // closed at the next line
}

func newLogBook() *logBook { return &logBook{moved: make(chan struct{})} }

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.moved)
	b.moved = make(chan struct{})
	return b.text.Write(p)
}

func (b *logBook) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// wait waits for a line that contains want.
func (b *logBook) wait(t *testing.T, want string) {
	t.Helper()
	deadline := time.NewTimer(60 * time.Second)
	defer deadline.Stop()
	for {
		b.mu.Lock()
		text, moved := b.text.String(), b.moved
		b.mu.Unlock()
		if strings.Contains(text, want) {
			return
		}
		select {
		case <-moved:
		case <-deadline.C:
			t.Fatalf("%q was not logged in:\n%s", want, text)
		}
	}
}

// A request that is under way when the server is told to stop is finished: its change is committed, seen by the server and answered.
func TestStopFinishesAWriteThatIsUnderWay(t *testing.T) {
	cfg := load(t, "")
	log := newLogBook()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg, io.Discard, log) }()
	log.wait(t, "msg=serving")

	conn, err := net.Dial("unix", cfg.UnixSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	body := `{"name": "carol"}`
	fmt.Fprintf(conn, "POST /api/v1/user HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n", len(body))
	in := bufio.NewReader(conn)
	if line, err := in.ReadString('\n'); err != nil || !strings.Contains(line, "100") {
		t.Fatalf("the handler does not read: %q, %v", line, err)
	}
	if _, err := in.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	stop()
	log.wait(t, "msg=stopping")
	if _, err := io.WriteString(conn, body); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatalf("no answer: %v; log:\n%s", err, log)
	}
	answer, _ := io.ReadAll(res.Body)
	if res.StatusCode != http.StatusOK || !strings.Contains(string(answer), `"carol"`) {
		t.Errorf("status %d: %s", res.StatusCode, answer)
	}
	if err := <-done; err != nil {
		t.Errorf("the server ended with %v", err)
	}
	if text := log.String(); strings.Contains(text, "ahead of the snapshot") {
		t.Errorf("the log was left before the write was seen:\n%s", text)
	}
}
