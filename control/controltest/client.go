package controltest

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"tailscale.com/control/controlbase"
	"tailscale.com/control/controlhttp/controlhttpcommon"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/util/zstdframe"
)

// Version is the capability version of Clients, unless they say otherwise.
const Version tailcfg.CapabilityVersion = 142

// A Client is one machine with one node key. It is for one goroutine, apart from its Streams.
type Client struct {
	s       *Server
	Machine key.MachinePrivate
	Node    key.NodePrivate
	Disco   key.DiscoPrivate
	Version tailcfg.CapabilityVersion
	Info    tailcfg.Hostinfo // sent with every request
	Source  string           // pretended address; "" is the real one

	Endpoints []netip.AddrPort
	HomeDERP  int

	// Host is the host by which the client calls the server; "" is "unused". Calls to the node have to come back under it.
	Host string
	// C2N answers the HTTP requests that are made to the node; nil is StockC2N.
	C2N http.Handler

	// Window is the flow-control window of a stream, which is how much of a map an idle reader takes in; 0 is HTTP/2's large one. It is read at
	// the first request.
	Window int

	cc *http2.ClientConn
}

// NewClient is a machine that has never met the server.
func (s *Server) NewClient(hostname string) *Client {
	return &Client{
		s: s, Machine: key.NewMachine(), Node: key.NewNode(), Disco: key.NewDisco(), Version: Version,
		Info:      tailcfg.Hostinfo{Hostname: hostname, OS: "linux", BackendLogID: "secret-log-id", IPNVersion: "1.102.5-test"},
		Endpoints: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:41641")}, HomeDERP: 901,
	}
}

// On is the same machine at another server, or on a connection of its own.
func (c *Client) On(s *Server) *Client {
	n := *c
	n.s, n.cc = s, nil
	return &n
}

// Rekey gives the machine a new node key and returns the old public one.
func (c *Client) Rekey() key.NodePublic {
	old := c.Node.Public()
	c.Node = key.NewNode()
	return old
}

// ID is the id of the client's node; the test fails when it has none.
func (c *Client) ID() tailcfg.NodeID {
	c.s.Helper()
	n := c.s.Replica.Current().ByNodeKey(c.Node.Public())
	if n == nil {
		c.s.Fatalf("%s is no node", c.Info.Hostname)
	}
	return n.ID
}

// Dial opens a Noise connection as the native client does. The error of a refused upgrade is its status.
func (c *Client) Dial() (*http2.ClientConn, error) {
	init, cont, err := controlbase.ClientDeferred(c.Machine, c.s.noise.Public(), uint16(c.Version))
	if err != nil {
		return nil, err
	}
	nc, err := net.Dial("tcp", c.s.Addr)
	if err != nil {
		return nil, err
	}
	req, _ := http.NewRequest("POST", "http://"+c.s.Addr+"/ts2021", nil)
	req.Header.Set("Upgrade", "tailscale-control-protocol")
	req.Header.Set("Connection", "upgrade")
	req.Header.Set(controlhttpcommon.HandshakeHeaderName, base64.StdEncoding.EncodeToString(init))
	req.Header.Set(sourceHeader, c.Source)
	br := bufio.NewReader(nc)
	if err := req.Write(nc); err != nil {
		nc.Close()
		return nil, err
	}
	res, err := http.ReadResponse(br, req)
	if err == nil && res.StatusCode != http.StatusSwitchingProtocols {
		err = fmt.Errorf("upgrade: %s", res.Status)
	}
	if err != nil {
		nc.Close()
		return nil, err
	}
	conn, err := cont(context.Background(), &readAhead{nc, br})
	if err != nil {
		nc.Close()
		return nil, err
	}
	c.s.Cleanup(func() { conn.Close() })
	return c.transport().NewClientConn(conn)
}

func (c *Client) transport() *http2.Transport {
	if c.Window == 0 {
		return new(http2.Transport)
	}
	t, err := http2.ConfigureTransports(&http.Transport{HTTP2: &http.HTTP2Config{MaxReceiveBufferPerStream: c.Window}})
	if err != nil {
		panic(err)
	}
	return t
}

type readAhead struct {
	net.Conn
	r *bufio.Reader
}

func (c *readAhead) Read(p []byte) (int, error) { return c.r.Read(p) }

// Close ends the client's connection, if it has one. The next request opens another.
func (c *Client) Close() {
	if c.cc != nil {
		c.cc.Close()
		c.cc = nil
	}
}

// Send makes one request inside Noise. body is sent as it is when it is a string, else as JSON.
func (c *Client) Send(ctx context.Context, method, path string, body any) (*http.Response, error) {
	if c.cc == nil || !c.cc.CanTakeNewRequest() {
		cc, err := c.Dial()
		if err != nil {
			return nil, err
		}
		c.cc = cc
	}
	text, ok := body.(string)
	if !ok {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		text = string(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "https://"+c.host()+path, bytes.NewReader([]byte(text)))
	if err != nil {
		return nil, err
	}
	return c.cc.RoundTrip(req)
}

// SendBody is Send with a body of unknown length. It returns the status.
func (c *Client) SendBody(ctx context.Context, method, path string, body io.Reader) (int, error) {
	cc, err := c.Dial()
	if err != nil {
		return 0, err
	}
	defer cc.Close()
	req, err := http.NewRequestWithContext(ctx, method, "https://"+c.host()+path, body)
	if err != nil {
		return 0, err
	}
	res, err := cc.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	return res.StatusCode, nil
}

func (c *Client) host() string { return cmp.Or(c.Host, "unused") }

// Do is Send followed by reading the answer. The test fails when there is none.
func (c *Client) Do(method, path string, body any) (status int, answer string) {
	c.s.Helper()
	res, err := c.Send(c.s.Context(), method, path, body)
	if err != nil {
		c.s.Fatalf("%s %s: %v", method, path, err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		c.s.Fatalf("%s %s: %v", method, path, err)
	}
	return res.StatusCode, string(text)
}

// RegisterRequest is what the client sends to register, with key as its auth key if that is not empty.
func (c *Client) RegisterRequest(authKey string) *tailcfg.RegisterRequest {
	info := c.Info
	req := &tailcfg.RegisterRequest{Version: c.Version, NodeKey: c.Node.Public(), Hostinfo: &info}
	if authKey != "" {
		req.Auth = &tailcfg.RegisterResponseAuth{AuthKey: authKey}
	}
	return req
}

// Register sends req and returns the answer, which is nil when the status is not 200.
func (c *Client) Register(req *tailcfg.RegisterRequest) (*tailcfg.RegisterResponse, int) {
	c.s.Helper()
	status, text := c.Do("POST", "/machine/register", req)
	if status != http.StatusOK {
		return nil, status
	}
	resp := new(tailcfg.RegisterResponse)
	if err := json.Unmarshal([]byte(text), resp); err != nil {
		c.s.Fatalf("register: %v in %q", err, text)
	}
	return resp, status
}

// Join registers with an auth key and reports, as a starting client does.
func (c *Client) Join(authKey string) *Client {
	c.s.Helper()
	resp, status := c.Register(c.RegisterRequest(authKey))
	if resp == nil || resp.Error != "" || resp.AuthURL != "" || resp.NodeKeyExpired || !resp.MachineAuthorized {
		c.s.Fatalf("%s does not join: status %d, %+v", c.Info.Hostname, status, resp)
	}
	c.Report()
	return c
}

// MapRequest is the request of the client's state without a stream.
func (c *Client) MapRequest() *tailcfg.MapRequest {
	info := c.Info
	info.NetInfo = &tailcfg.NetInfo{PreferredDERP: c.HomeDERP}
	return &tailcfg.MapRequest{
		Version: c.Version, KeepAlive: true, Compress: "zstd", NodeKey: c.Node.Public(), DiscoKey: c.Disco.Public(),
		Endpoints: c.Endpoints, Hostinfo: &info, OmitPeers: true,
	}
}

// Report sends what the client says of itself and waits until the server has stored it and sees it: the answer comes at the commit, a moment
// before the server's own snapshot has it.
func (c *Client) Report() {
	c.s.Helper()
	if status, text := c.Do("POST", "/machine/map", c.MapRequest()); status != http.StatusOK || text != "" {
		c.s.Fatalf("report of %s: status %d %q", c.Info.Hostname, status, text)
	}
	c.s.CatchUp()
}

// A Stream is an open map stream.
type Stream struct {
	s      *Server
	body   io.ReadCloser
	cancel context.CancelFunc

	mu       sync.Mutex // guards the following fields
	moved    chan struct{}
	view     View
	messages []*tailcfg.MapResponse
	frames   [][]byte
	pings    pinger
	answers  []Answer
	err      error
}

// Poll opens the map stream.
func (c *Client) Poll() *Stream {
	c.s.Helper()
	st, status := c.Stream(nil)
	if st == nil {
		c.s.Fatalf("map stream of %s: status %d", c.Info.Hostname, status)
	}
	return st
}

// Stream opens a map stream with a changed request. It is nil when the status is not 200.
func (c *Client) Stream(change func(*tailcfg.MapRequest)) (*Stream, int) {
	c.s.Helper()
	st, status := c.Stalled(change)
	if st != nil {
		go st.read()
	}
	return st, status
}

// Stalled is Stream with a reader that reads nothing.
func (c *Client) Stalled(change func(*tailcfg.MapRequest)) (*Stream, int) {
	c.s.Helper()
	req := c.MapRequest()
	req.Stream, req.OmitPeers = true, false
	if change != nil {
		change(req)
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.s.Cleanup(cancel)
	res, err := c.Send(ctx, "POST", "/machine/map", req)
	if err != nil {
		c.s.Fatalf("map stream of %s: %v", c.Info.Hostname, err)
	}
	if res.StatusCode != http.StatusOK {
		cancel()
		return nil, res.StatusCode
	}
	handler := c.C2N
	if handler == nil {
		handler = StockC2N
	}
	return &Stream{
		s: c.s, body: res.Body, cancel: cancel, moved: make(chan struct{}), pings: pinger{conn: c.cc, host: c.host(), c2n: handler},
	}, res.StatusCode
}

// Read begins to read a stream of Stalled.
func (st *Stream) Read() { go st.read() }

// maxMessage bounds what a stream may send at once.
const maxMessage = 64 << 20

func (st *Stream) read() {
	for {
		z, err := ReadMessage(st.body)
		m := new(tailcfg.MapResponse)
		if err == nil {
			err = Decode(z, m)
		}
		st.mu.Lock()
		if err != nil {
			st.err = err
		} else {
			st.frames = append(st.frames, z)
			st.messages = append(st.messages, m)
			st.view.Apply(m)
			if m.PingRequest != nil {
				st.ping(m.PingRequest)
			}
		}
		close(st.moved)
		st.moved = make(chan struct{})
		st.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// ReadMessage reads the bytes of one message, without their length.
func ReadMessage(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n > maxMessage {
		return nil, fmt.Errorf("message of %d bytes", n)
	}
	z := make([]byte, n)
	_, err := io.ReadFull(r, z)
	return z, err
}

// Decode decodes a message as the stock client does.
func Decode(z []byte, m *tailcfg.MapResponse) error {
	text, err := zstdframe.AppendDecode(nil, z)
	if err != nil {
		return fmt.Errorf("zstd: %w", err)
	}
	if err := json.Unmarshal(text, m); err != nil {
		return fmt.Errorf("map response: %w in %.200q", err, text)
	}
	return nil
}

// Close ends the stream from the client's side.
func (st *Stream) Close() { st.cancel() }

// Wait waits until the view is as cond says. The test fails when the stream ends before, or the view has faults.
func (st *Stream) Wait(what string, cond func(*View) bool) {
	st.s.Helper()
	st.until(what, func() bool { return cond(&st.view) })
}

// Message waits for a message that cond likes and returns it; messages that were seen already count.
func (st *Stream) Message(what string, cond func(*tailcfg.MapResponse) bool) *tailcfg.MapResponse {
	st.s.Helper()
	var found *tailcfg.MapResponse
	next := 0
	st.until(what, func() bool {
		for ; next < len(st.messages) && found == nil; next++ {
			if cond(st.messages[next]) {
				found = st.messages[next]
			}
		}
		return found != nil
	})
	return found
}

func (st *Stream) until(what string, cond func() bool) {
	st.s.Helper()
	timeout := time.NewTimer(Patience)
	defer timeout.Stop()
	for {
		st.mu.Lock()
		ok, moved, err, faults, node := cond(), st.moved, st.err, st.view.Faults, st.view.Node
		st.mu.Unlock()
		if len(faults) > 0 {
			st.s.Fatalf("map session: %v", faults)
		}
		if ok {
			return
		}
		if err != nil {
			st.s.Fatalf("waited for %s: stream ended: %v", what, err)
		}
		select {
		case <-moved:
		case <-timeout.C:
			st.s.Fatalf("waited in vain for %s; own node %+v", what, node)
		}
	}
}

// WaitEnd waits until the server ends the stream.
func (st *Stream) WaitEnd() {
	st.s.Helper()
	timeout := time.NewTimer(Patience)
	defer timeout.Stop()
	for {
		st.mu.Lock()
		moved, err := st.moved, st.err
		st.mu.Unlock()
		if err != nil {
			return
		}
		select {
		case <-moved:
		case <-timeout.C:
			st.s.Fatal("the stream does not end")
		}
	}
}

// Ended reports whether the stream has ended.
func (st *Stream) Ended() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.err != nil
}

// Look calls f with the view.
func (st *Stream) Look(f func(*View)) {
	st.mu.Lock()
	defer st.mu.Unlock()
	f(&st.view)
}

// Messages are the messages so far, decoded and as they came.
func (st *Stream) Messages() ([]*tailcfg.MapResponse, [][]byte) {
	st.mu.Lock()
	defer st.mu.Unlock()
	return append([]*tailcfg.MapResponse(nil), st.messages...), append([][]byte(nil), st.frames...)
}
