package noise

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"tailscale.com/control/controlbase"
	"tailscale.com/control/controlhttp/controlhttpcommon"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

const currentVersion = 137

// rig is a server on a loopback port with the keys that it knows.
type rig struct {
	*Server
	t     testing.TB
	addr  string
	priv  key.MachinePrivate
	known sync.Map // key.MachinePublic
}

func newRig(t testing.TB, h http.HandlerFunc, change func(*Config)) *rig {
	t.Helper()
	g := newBareRig(t, h, change)
	mux := http.NewServeMux()
	mux.Handle("/ts2021", g.Server)
	mux.HandleFunc("/key", g.ServeKey)
	ts := httptest.NewServer(mux)
	g.addr = ts.Listener.Addr().String()
	t.Cleanup(func() {
		g.stopNow()
		ts.Close()
	})
	return g
}

// newBareRig is a rig without a port, for use with pipe.
func newBareRig(t testing.TB, h http.HandlerFunc, change func(*Config)) *rig {
	t.Helper()
	g := &rig{t: t, priv: key.NewMachine()}
	cfg := Config{
		PrivateKey: g.priv,
		Handler:    h,
		Known: func(m key.MachinePublic) bool {
			_, ok := g.known.Load(m)
			return ok
		},
	}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	g.Server = s
	return g
}

// stopNow closes every connection and waits until all are gone.
func (g *rig) stopNow() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	g.Shutdown(ctx)
}

// node is a machine key that has a node.
func (g *rig) node() key.MachinePrivate {
	k := key.NewMachine()
	g.known.Store(k.Public(), true)
	return k
}

// post sends an upgrade request and returns the connection after the head of
// the answer.
func (g *rig) post(handshake string) (net.Conn, *http.Response, error) {
	c, err := net.Dial("tcp", g.addr)
	if err != nil {
		return nil, nil, err
	}
	fmt.Fprintf(c, "POST /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n"+
		"Content-Length: 0\r\n%s: %s\r\n\r\n", controlhttpcommon.HandshakeHeaderName, handshake)
	br := bufio.NewReader(c)
	res, err := http.ReadResponse(br, nil)
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	return &readAhead{c, br}, res, nil
}

type readAhead struct {
	net.Conn
	r *bufio.Reader
}

func (c *readAhead) Read(p []byte) (int, error) { return c.r.Read(p) }

// dial does a whole native handshake.
func (g *rig) dial(k key.MachinePrivate, version uint16) (*controlbase.Conn, error) {
	init, cont, err := controlbase.ClientDeferred(k, g.priv.Public(), version)
	if err != nil {
		return nil, err
	}
	c, res, err := g.post(base64.StdEncoding.EncodeToString(init))
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		c.Close()
		return nil, statusError(res.StatusCode)
	}
	nc, err := cont(context.Background(), c)
	if err != nil {
		c.Close()
	}
	return nc, err
}

type statusError int

func (e statusError) Error() string { return http.StatusText(int(e)) }

// client is an HTTP/2 client over one Noise connection.
func (g *rig) client(k key.MachinePrivate) *http2.ClientConn {
	g.t.Helper()
	nc, err := g.dial(k, currentVersion)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { nc.Close() })
	return newClientConn(g.t, nc)
}

func newClientConn(t testing.TB, nc net.Conn) *http2.ClientConn {
	t.Helper()
	cc, err := new(http2.Transport).NewClientConn(nc)
	if err != nil {
		t.Fatal(err)
	}
	return cc
}

func do(t testing.TB, cc *http2.ClientConn, method, path string, body io.Reader) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, "https://unused"+path, body)
	if err != nil {
		t.Fatal(err)
	}
	res, err := cc.RoundTrip(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%s %s: body: %v", method, path, err)
	}
	return res.StatusCode, string(b)
}

// waitClosed reads until the connection ends, which must be within 10 s.
func waitClosed(t testing.TB, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.Copy(io.Discard, c); err != nil && errors.Is(err, context.DeadlineExceeded) {
		t.Fatal("the server left the connection open")
	}
}

func echo(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		var tooBig *http.MaxBytesError
		if errors.As(err, &tooBig) {
			http.Error(w, "too large", http.StatusRequestEntityTooLarge)
			return
		}
		http.Error(w, "read: "+err.Error(), http.StatusBadRequest)
		return
	}
	p, _ := Peer(r.Context())
	fmt.Fprintf(w, "%s %d %d", p.Machine, p.Version, len(b))
}

func TestRequestsCarryTheirPeer(t *testing.T) {
	g := newRig(t, echo, nil)
	for _, k := range []key.MachinePrivate{key.NewMachine(), g.node()} {
		status, body := do(t, g.client(k), "POST", "/machine/map", strings.NewReader("four"))
		if want := fmt.Sprintf("%s %d 4", k.Public(), currentVersion); status != 200 || body != want {
			t.Errorf("got %d %q, want %q", status, body, want)
		}
	}
}

func TestKeyAnswerIsConstant(t *testing.T) {
	g := newRig(t, echo, nil)
	for _, q := range []string{"", "?v=137", "?v=%00"} {
		res, err := http.Get("http://" + g.addr + "/key" + q)
		if err != nil {
			t.Fatal(err)
		}
		var got tailcfg.OverTLSPublicKeyResponse
		if err := json.NewDecoder(res.Body).Decode(&got); err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if got.PublicKey != g.priv.Public() || !got.LegacyPublicKey.IsZero() {
			t.Errorf("%q: got %+v", q, got)
		}
		if cc := res.Header.Get("Cache-Control"); cc != "no-store" {
			t.Errorf("Cache-Control %q", cc)
		}
	}
	res, err := http.Post("http://"+g.addr+"/key", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", res.StatusCode)
	}
}

func TestBadHandshakesAreRefusedPlainly(t *testing.T) {
	g := newRig(t, echo, nil)
	other := key.NewMachine()
	init, _, err := controlbase.ClientDeferred(key.NewMachine(), g.priv.Public(), currentVersion)
	if err != nil {
		t.Fatal(err)
	}
	foreign, _, err := controlbase.ClientDeferred(key.NewMachine(), other.Public(), currentVersion)
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(init)
	flipped[60] ^= 1
	otherVersion := bytes.Clone(init)
	otherVersion[1]++
	wrongType := bytes.Clone(init)
	wrongType[2] = 4
	b64 := base64.StdEncoding.EncodeToString
	for name, h := range map[string]string{
		"missing":            "",
		"not base64":         strings.Repeat("!", 136),
		"garbage":            b64(bytes.Repeat([]byte{0xa5}, 101)),
		"truncated":          b64(init[:100]),
		"one byte more":      b64(append(bytes.Clone(init), 0)),
		"oversized":          strings.Repeat("A", 8000),
		"for another server": b64(foreign),
		"bit flipped":        b64(flipped),
		"version changed":    b64(otherVersion),
		"wrong type":         b64(wrongType),
	} {
		c, res, err := g.post(h)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if res.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: status %d, want 400", name, res.StatusCode)
		}
		c.Close()
	}
	if c := g.Counts(); c.Open != 0 || c.Handshakes != 0 {
		t.Errorf("counts after refusals: %+v", c)
	}
	// All zero public key: X25519 has no result for it.
	zero := bytes.Clone(init)
	clear(zero[5:37])
	if _, res, err := g.post(b64(zero)); err != nil || res.StatusCode != http.StatusBadRequest {
		t.Errorf("low order point: %v %v", res, err)
	}
}

func TestUpgradeRequestsOfOtherShapes(t *testing.T) {
	g := newRig(t, echo, nil)
	for _, tt := range []struct {
		head string
		want int
	}{
		{"GET /ts2021 HTTP/1.1\r\nHost: x\r\n\r\n", http.StatusUpgradeRequired},
		{"POST /ts2021 HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", http.StatusBadRequest},
		{"PUT /ts2021 HTTP/1.1\r\nHost: x\r\n\r\n", http.StatusMethodNotAllowed},
		{"POST /ts2021 HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: tailscale-control-protocol\r\nContent-Length: 3\r\n\r\nabc", http.StatusRequestEntityTooLarge},
		{"POST /ts2021 HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: tailscale-control-protocol\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", http.StatusRequestEntityTooLarge},
		{"GET /ts2021 HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", http.StatusBadRequest},
	} {
		c, err := net.Dial("tcp", g.addr)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, tt.head)
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatalf("%q: %v", tt.head, err)
		}
		if res.StatusCode != tt.want {
			t.Errorf("%q: status %d, want %d", tt.head, res.StatusCode, tt.want)
		}
		c.Close()
	}
}

func TestOldVersionsHearWhyAfterTheHandshake(t *testing.T) {
	g := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		t.Errorf("handler reached by %s", r.URL.Path)
	}, nil)
	for _, version := range []uint16{0, 1, 112} {
		nc, err := g.dial(g.node(), version)
		if err != nil {
			t.Fatal(err)
		}
		cc := newClientConn(t, nc)
		status, body := do(t, cc, "POST", "/machine/register", strings.NewReader("{}"))
		var res tailcfg.RegisterResponse
		if err := json.Unmarshal([]byte(body), &res); err != nil || status != 200 || !strings.Contains(res.Error, "too old") {
			t.Errorf("register: %d %q", status, body)
		}
		if status, _ := do(t, cc, "POST", "/machine/map", strings.NewReader("{}")); status != http.StatusBadRequest {
			t.Errorf("map: %d", status)
		}
		nc.Close()
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
		cc   *http2.ClientConn
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
	req, _ := http.NewRequest("POST", "https://unused/machine/map", strings.NewReader("x"))
	req.Header.Set("Content-Encoding", "zstd")
	res, err := node.RoundTrip(req)
	if err != nil || res.StatusCode != http.StatusUnsupportedMediaType {
		t.Errorf("zstd body: %v %v", res, err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

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
		req, _ := http.NewRequest("POST", "https://unused/machine/register", nil)
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

func TestControlFrameFloodClosesTheConnection(t *testing.T) {
	for name, write := range map[string]func(*http2.Framer, uint32) error{
		"ping":     func(f *http2.Framer, _ uint32) error { return f.WritePing(false, [8]byte{}) },
		"settings": func(f *http2.Framer, _ uint32) error { return f.WriteSettings() },
		"priority": func(f *http2.Framer, i uint32) error { return f.WritePriority(i*2+1, http2.PriorityParam{}) },
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t, echo, nil)
			nc, err := g.dial(g.node(), currentVersion)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			go io.Copy(io.Discard, nc)
			io.WriteString(nc, http2.ClientPreface)
			f := http2.NewFramer(nc, nil)
			f.WriteSettings()
			sent := 0
			for ; sent < 100_000; sent++ {
				if write(f, uint32(sent)) != nil {
					break
				}
			}
			if got := g.Counts().Flooded; got != 1 {
				t.Errorf("%d frames went through, flooded = %d", sent, got)
			}
		})
	}
}

func TestFrameCounterFindsFramesInAnyPieces(t *testing.T) {
	var stream bytes.Buffer
	stream.WriteString(http2.ClientPreface)
	f := http2.NewFramer(&stream, nil)
	f.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
	f.WriteSettingsAck()
	f.WriteData(1, false, make([]byte, 40_000))
	f.WritePing(false, [8]byte{})
	f.WritePing(true, [8]byte{})
	f.WriteRSTStream(1, http2.ErrCodeCancel)
	f.WriteWindowUpdate(0, 10)
	for size := 1; size < stream.Len(); size = size*3 + 1 {
		c := frameCounter{rate: rateCounter{limit: 100}}
		for p := stream.Bytes(); len(p) > 0; {
			n := min(size, len(p))
			c.count(p[:n], time.Now)
			p = p[n:]
		}
		if c.rate.n != 3 {
			t.Errorf("pieces of %d: counted %d control frames, want 3", size, c.rate.n)
		}
	}
}

func TestSourceBucketChargesOnlyStrangers(t *testing.T) {
	g := newRig(t, echo, func(c *Config) {
		c.Limits.SourceBurst = 5
		c.Limits.SourceRate = 0.001
	})
	for i := range 7 {
		nc, err := g.dial(key.NewMachine(), currentVersion)
		if i < 5 && err != nil {
			t.Fatalf("stranger %d: %v", i, err)
		}
		if i >= 5 && err != statusError(http.StatusTooManyRequests) {
			t.Fatalf("stranger %d: %v, want 429", i, err)
		}
		if err == nil {
			nc.Close()
		}
	}
	nc, err := g.dial(g.node(), currentVersion)
	if err != nil {
		t.Fatalf("a node from the same address: %v", err)
	}
	nc.Close()
	// Garbage is not charged: its machine key is never learned.
	if got := g.Counts().Limited; got != 2 {
		t.Errorf("limited = %d, want 2", got)
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
		req, _ := http.NewRequest("POST", "https://unused/machine/map", nil)
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

func TestThousandsOfReconnectsFromOneAddress(t *testing.T) {
	n := 5000
	if testing.Short() {
		n = 500
	}
	g := newRig(t, echo, nil)
	keys := make([]key.MachinePrivate, 100)
	for i := range keys {
		keys[i] = g.node()
	}
	var wg sync.WaitGroup
	var next atomic.Int64
	for range 128 {
		wg.Go(func() {
			for {
				i := int(next.Add(1))
				if i > n {
					return
				}
				nc, err := g.dial(keys[i%len(keys)], currentVersion)
				if err != nil {
					t.Errorf("reconnect %d: %v", i, err)
					return
				}
				if err := bareRequest(nc, "/machine/map"); err != nil {
					t.Errorf("reconnect %d: %v", i, err)
				}
				nc.Close()
			}
		})
	}
	wg.Wait()
	if c := g.Counts(); c.Busy+c.Limited > 0 {
		t.Errorf("refusals: %+v", c)
	}
}

// bareRequest sends a request and waits for the head of its answer, without an
// http2.Transport: that keeps a dead connection for seconds.
func bareRequest(nc net.Conn, path string) error {
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range []hpack.HeaderField{
		{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "https"},
		{Name: ":authority", Value: "unused"}, {Name: ":path", Value: path},
	} {
		enc.WriteField(f)
	}
	var out bytes.Buffer
	out.WriteString(http2.ClientPreface)
	fr := http2.NewFramer(&out, nc)
	fr.WriteSettings()
	fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true})
	if _, err := nc.Write(out.Bytes()); err != nil {
		return err
	}
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return err
		}
		if f.Header().Type == http2.FrameHeaders {
			return nil
		}
	}
}

func heapInUse() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
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

func TestTenThousandRandomKeysLeaveNoMemory(t *testing.T) {
	const alone = "NOISE_TEST_ALONE"
	if os.Getenv(alone) == "" {
		// What other tests leave behind, and give back meanwhile, would hide
		// what is measured here.
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", fmt.Sprintf("-test.short=%t", testing.Short()), "-test.v")
		cmd.Env = append(os.Environ(), alone+"=1")
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		if err != nil {
			t.Error(err)
		}
		return
	}
	n := 10_000
	if testing.Short() {
		n = 500
	}
	storm := func(g *rig, n int) {
		var wg sync.WaitGroup
		var next atomic.Int64
		for range 32 {
			wg.Go(func() {
				for next.Add(1) <= int64(n) {
					nc, err := g.dial(key.NewMachine(), currentVersion)
					if err != nil {
						t.Error(err)
						return
					}
					if err := bareRequest(nc, "/machine/whoami"); err != nil {
						t.Error(err)
					}
					nc.Close()
				}
			})
		}
		wg.Wait()
		g.stopNow()
	}
	unlimited := func(c *Config) { c.Limits.SourceBurst = 1e6 }
	storm(newRig(t, echo, unlimited), 100) // fills pools
	g := newRig(t, echo, unlimited)
	before := heapInUse()
	storm(g, n)
	after := heapInUse()
	grown := int64(after) - int64(before)
	t.Logf("heap grew by %d bytes over %d attempts", grown, n)
	if grown > 1<<20 {
		t.Error("that is more than 1 MiB")
	}
	runtime.KeepAlive(g)
}
