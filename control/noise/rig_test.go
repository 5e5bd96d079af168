package noise

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"tailscale.com/control/controlbase"
	"tailscale.com/control/controlhttp/controlhttpcommon"
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
	return newRigOn(t, func(c net.Conn) net.Conn { return c }, h, change)
}

// newRigOn is a rig whose server sees its connections through wrap.
func newRigOn(t testing.TB, wrap func(net.Conn) net.Conn, h http.HandlerFunc, change func(*Config)) *rig {
	t.Helper()
	g := newBareRig(t, h, change)
	mux := http.NewServeMux()
	mux.Handle("/ts2021", g.Server)
	mux.HandleFunc("/key", g.ServeKey)
	ts := httptest.NewUnstartedServer(mux)
	ts.Listener = &wrapper{ts.Listener, wrap}
	ts.Start()
	g.addr = ts.Listener.Addr().String()
	t.Cleanup(func() {
		g.stopNow()
		ts.Close()
	})
	return g
}

// A wrapper is a listener whose connections are seen through wrap.
type wrapper struct {
	net.Listener
	wrap func(net.Conn) net.Conn
}

func (l *wrapper) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.wrap(c), nil
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
func (g *rig) client(k key.MachinePrivate) http.RoundTripper {
	g.t.Helper()
	nc, err := g.dial(k, currentVersion)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { nc.Close() })
	return newClientConn(g.t, nc)
}

func newClientConn(t testing.TB, nc net.Conn) http.RoundTripper {
	t.Helper()
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	tr := &http.Transport{
		Protocols:   &protocols,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return nc, nil },
	}
	cc, err := tr.NewClientConn(context.Background(), "http", "unused:80")
	if err != nil {
		t.Fatal(err)
	}
	return cc
}

func do(t testing.TB, cc http.RoundTripper, method, path string, body io.Reader) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, "http://unused"+path, body)
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

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

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
