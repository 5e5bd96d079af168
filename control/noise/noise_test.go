package noise

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"tailscale.com/control/controlbase"
	"tailscale.com/types/key"
)

func TestRequestsCarryTheirPeer(t *testing.T) {
	g := newRig(t, echo, nil)
	for _, k := range []key.MachinePrivate{key.NewMachine(), g.node()} {
		status, body := do(t, g.client(k), "POST", "/machine/map", strings.NewReader("four"))
		if want := fmt.Sprintf("%s %d 4", k.Public(), currentVersion); status != 200 || body != want {
			t.Errorf("got %d %q, want %q", status, body, want)
		}
	}
}

func TestStrangersReachOnlyTheirPaths(t *testing.T) {
	g := newRig(t, echo, nil)
	cc := g.client(key.NewMachine())
	for path, want := range map[string]int{
		"/machine/register":        200,
		"/machine/whoami":          200,
		"/machine/map":             200, // the map handler refuses by itself
		"/machine/id-token":        401,
		"/machine/tka/init/begin":  401,
		"/metrics":                 401,
		"/debug/pprof/":            401,
		"/machine/register/../map": 401,
	} {
		if status, _ := do(t, cc, "GET", path, nil); status != want {
			t.Errorf("%s: %d, want %d", path, status, want)
		}
	}
}

func TestBodiesAreBounded(t *testing.T) {
	g := newRig(t, echo, nil)
	node, stranger := g.client(g.node()), g.client(key.NewMachine())
	for _, tt := range []struct {
		cc   http.RoundTripper
		path string
		size int
		want int
	}{
		{stranger, "/machine/register", 64 << 10, 200},
		{stranger, "/machine/register", 64<<10 + 1, 413},
		{node, "/machine/register", 256 << 10, 200},
		{node, "/machine/register", 256<<10 + 1, 413},
		{node, "/machine/map", 1 << 20, 200},
		{node, "/machine/map", 1<<20 + 1, 413},
		{node, "/machine/tka/sync/send", 2 << 20, 200},
	} {
		// A plain reader has no announced length.
		for _, r := range []io.Reader{bytes.NewReader(make([]byte, tt.size)), io.LimitReader(zeros{}, int64(tt.size))} {
			if status, _ := do(t, tt.cc, "POST", tt.path, r); status != tt.want {
				t.Errorf("%s with %d bytes (%T): %d, want %d", tt.path, tt.size, r, status, tt.want)
			}
		}
	}
	req, _ := http.NewRequest("POST", "http://unused/machine/map", strings.NewReader("x"))
	req.Header.Set("Content-Encoding", "zstd")
	res, err := node.RoundTrip(req)
	if err != nil || res.StatusCode != http.StatusUnsupportedMediaType {
		t.Errorf("zstd body: %v %v", res, err)
	}
}

func TestStrangerHasEightPlaces(t *testing.T) {
	entered := make(chan struct{}, 20)
	release := make(chan struct{})
	g := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		entered <- struct{}{}
		<-release
	}, nil)
	k := key.NewMachine()
	cc := g.client(k)
	type result struct{ status int }
	results := make(chan result, 20)
	send := func() {
		req, _ := http.NewRequest("POST", "http://unused/machine/register", nil)
		res, err := cc.RoundTrip(req)
		if err != nil {
			t.Error(err)
			results <- result{}
			return
		}
		results <- result{res.StatusCode}
	}
	for range 8 {
		go send()
	}
	for range 8 {
		<-entered
	}
	for range 4 {
		go send()
	}
	for range 4 {
		if r := <-results; r.status != http.StatusTooManyRequests {
			t.Errorf("ninth request: %d, want 429", r.status)
		}
	}
	// Once the key has a node, the same connection has no such limit.
	g.known.Store(k.Public(), true)
	for range 4 {
		go send()
	}
	for range 4 {
		<-entered
	}
	close(release)
	for range 12 {
		if r := <-results; r.status != 200 {
			t.Errorf("admitted request: %d", r.status)
		}
	}
}

func TestPanicIsAnswered500WithoutText(t *testing.T) {
	g := newRig(t, func(http.ResponseWriter, *http.Request) { panic("secret") }, nil)
	if status, body := do(t, g.client(g.node()), "POST", "/machine/map", nil); status != 500 || body != "" {
		t.Errorf("got %d %q", status, body)
	}
}

func TestIdentifyIsCalledOnceForNodesOnly(t *testing.T) {
	var calls atomic.Int32
	g := newRig(t, echo, func(c *Config) {
		c.Identify = func(*http.Request) func() { return func() { calls.Add(1) } }
	})
	k := key.NewMachine()
	cc := g.client(k)
	do(t, cc, "GET", "/machine/whoami", nil)
	if n := calls.Load(); n != 0 {
		t.Errorf("%d calls for a stranger", n)
	}
	g.known.Store(k.Public(), true)
	do(t, cc, "GET", "/machine/whoami", nil)
	do(t, cc, "GET", "/machine/whoami", nil)
	if n := calls.Load(); n != 1 {
		t.Errorf("%d calls, want 1", n)
	}
}

func TestCloseMachineClosesAllItsConnections(t *testing.T) {
	g := newRig(t, echo, nil)
	k, other := g.node(), g.node()
	var mine []*controlbase.Conn
	for range 3 {
		nc, err := g.dial(k, currentVersion)
		if err != nil {
			t.Fatal(err)
		}
		do(t, newClientConn(t, nc), "GET", "/machine/whoami", nil)
		mine = append(mine, nc)
	}
	bystander := g.client(other)
	do(t, bystander, "GET", "/machine/whoami", nil)
	g.CloseMachine(k.Public())
	for _, nc := range mine {
		waitClosed(t, nc)
	}
	if status, _ := do(t, bystander, "GET", "/machine/whoami", nil); status != 200 {
		t.Errorf("bystander: %d", status)
	}
}

func TestShutdownCutsLongPollsWhenTimeIsUp(t *testing.T) {
	ended := make(chan struct{})
	entered := make(chan struct{})
	g := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-r.Context().Done()
		close(ended)
	}, nil)
	cc := g.client(g.node())
	go func() {
		req, _ := http.NewRequest("POST", "http://unused/machine/map", nil)
		cc.RoundTrip(req)
	}()
	<-entered
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := g.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Shutdown: %v", err)
	}
	<-ended
}

func TestShutdownSendsGoAwayAndWaits(t *testing.T) {
	entered := make(chan struct{})
	release := make(chan struct{})
	g := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-release
		io.WriteString(w, "done")
	}, nil)
	nc, err := g.dial(g.node(), currentVersion)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, err := nc.Write(mapRequest(1 << 20)); err != nil {
		t.Fatal(err)
	}
	<-entered
	down := make(chan error, 1)
	go func() { down <- g.Shutdown(t.Context()) }()
	// The client learns of the GOAWAY while its request is still open.
	fr := http2.NewFramer(nil, nc)
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			t.Fatalf("no GOAWAY: %v", err)
		}
		if away, ok := f.(*http2.GoAwayFrame); ok {
			if away.ErrCode != http2.ErrCodeNo {
				t.Errorf("GOAWAY says %v", away.ErrCode)
			}
			break
		}
	}
	select {
	case err := <-down:
		t.Fatalf("Shutdown returned %v before the request ended", err)
	default:
	}
	if _, err := g.dial(g.node(), currentVersion); err != statusError(http.StatusServiceUnavailable) {
		t.Errorf("a new connection during shutdown: %v", err)
	}
	close(release)
	answer := ""
	for answer != "done" {
		f, err := fr.ReadFrame()
		if err != nil {
			t.Fatalf("no answer: %v", err)
		}
		if data, ok := f.(*http2.DataFrame); ok {
			answer += string(data.Data())
		}
	}
	if err := <-down; err != nil {
		t.Errorf("Shutdown: %v", err)
	}
}
