// Package sim is a small simulated client of a control server, for tests that
// need many clients, or clients that misbehave in a chosen way.
//
// It speaks what stock clients speak: the Noise handshake in the header of an
// upgrade request, HTTP/2 inside, register and map requests as tailcfg has
// them, and map streams of zstd frames. It has no tunnels, no relay and no
// retries: whatever goes wrong is returned, and a refusal keeps its status.
//
//	srv, err := sim.Find(ctx, "127.0.0.1:8080")
//	m := sim.NewMachine("laptop")
//	conn, err := srv.Dial(ctx, m)
//	_, err = conn.Register(ctx, authKey)
//	stream, err := conn.Poll(ctx)
//	err = stream.Wait(ctx, func(v *sim.View) bool { return len(v.Peers) == 3 })
package sim

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"

	"golang.org/x/net/http2"
	"tailscale.com/control/controlbase"
	"tailscale.com/control/controlhttp/controlhttpcommon"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// Version is what machines say they are: Tailscale 1.102.
const Version tailcfg.CapabilityVersion = 142

// Server is a control server as clients know it.
type Server struct {
	Addr string // host:port
	Key  key.MachinePublic
}

// Find asks a server for its Noise key.
func Find(ctx context.Context, addr string) (*Server, error) {
	url := fmt.Sprintf("http://%s/key?v=%d", addr, Version)
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		return nil, err
	}
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if err := refused("GET /key", res); err != nil {
		return nil, err
	}
	var k tailcfg.OverTLSPublicKeyResponse
	if err := json.NewDecoder(io.LimitReader(res.Body, 64<<10)).Decode(&k); err != nil {
		return nil, fmt.Errorf("GET /key: %w", err)
	}
	return &Server{Addr: addr, Key: k.PublicKey}, nil
}

// Machine is a client's identity. Its fields may be changed between requests.
type Machine struct {
	Machine   key.MachinePrivate
	Node      key.NodePrivate
	Disco     key.DiscoPrivate
	Hostname  string
	Ephemeral bool
	Source    netip.Addr // local address to dial from; zero lets the system choose
}

// NewMachine makes a machine that no server has met.
func NewMachine(hostname string) *Machine {
	return &Machine{Machine: key.NewMachine(), Node: key.NewNode(), Disco: key.NewDisco(), Hostname: hostname}
}

func (m *Machine) hostinfo() *tailcfg.Hostinfo {
	return &tailcfg.Hostinfo{Hostname: m.Hostname, OS: "linux", OSVersion: "6.1.0", GoArch: "amd64", IPNVersion: "1.102.5-sim"}
}

// Refusal is an answer by which the server turned a request away.
type Refusal struct {
	What   string
	Status int
	Retry  string // the Retry-After header
	Body   string // its beginning
}

func (r *Refusal) Error() string { return fmt.Sprintf("%s: status %d: %s", r.What, r.Status, r.Body) }

// Status is the status by which err says that the server turned the request
// away, and 0 for every other error.
func Status(err error) int {
	if r, ok := errors.AsType[*Refusal](err); ok {
		return r.Status
	}
	return 0
}

func refused(what string, res *http.Response) error {
	if res.StatusCode == http.StatusOK {
		return nil
	}
	text, _ := io.ReadAll(io.LimitReader(res.Body, 500))
	return &Refusal{what, res.StatusCode, res.Header.Get("Retry-After"), string(bytes.TrimSpace(text))}
}

// Conn is one Noise connection of a machine, with HTTP/2 inside.
type Conn struct {
	server  *Server
	machine *Machine
	raw     net.Conn
	h2      *http2.ClientConn
}

// transport makes all connections; it keeps none.
var transport = &http2.Transport{DisableCompression: true}

// Initiation is the first message of a handshake as it stands in the upgrade
// request, and what finishes the handshake on the connection.
func (s *Server) Initiation(m *Machine) (string, controlbase.HandshakeContinuation, error) {
	init, finish, err := controlbase.ClientDeferred(m.Machine, s.Key, uint16(Version))
	return base64.StdEncoding.EncodeToString(init), finish, err
}

// Upgrade sends an upgrade request with the given handshake on a connection
// and reads the answer's head. What follows is to be read from the reader.
func (s *Server) Upgrade(conn net.Conn, initiation string) (*bufio.Reader, error) {
	const request = "POST /ts2021 HTTP/1.1\r\nHost: %s\r\nContent-Length: 0\r\nConnection: upgrade\r\nUpgrade: %s\r\n%s: %s\r\n\r\n"
	if _, err := fmt.Fprintf(conn, request, s.Addr, controlhttpcommon.UpgradeHeaderValue, controlhttpcommon.HandshakeHeaderName, initiation); err != nil {
		return nil, err
	}
	r := bufio.NewReaderSize(conn, 4<<10)
	res, err := http.ReadResponse(r, nil)
	if err != nil {
		return nil, fmt.Errorf("upgrade: %w", err)
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		defer res.Body.Close()
		return nil, refused("upgrade", res)
	}
	return r, nil
}

// Connect opens a TCP connection from the machine to the server.
func (s *Server) Connect(ctx context.Context, m *Machine) (net.Conn, error) {
	var d net.Dialer
	if m.Source.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(m.Source, 0))
	}
	return d.DialContext(ctx, "tcp", s.Addr)
}

// Dial opens a Noise connection. ctx bounds the opening only.
func (s *Server) Dial(ctx context.Context, m *Machine) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	initiation, finish, err := s.Initiation(m)
	if err != nil {
		return nil, err
	}
	raw, err := s.Connect(ctx, m)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	h2, err := s.open(ctx, raw, initiation, finish)
	if err != nil {
		raw.Close()
		return nil, err
	}
	return &Conn{s, m, raw, h2}, nil
}

func (s *Server) open(ctx context.Context, raw net.Conn, initiation string, finish controlbase.HandshakeContinuation) (*http2.ClientConn, error) {
	r, err := s.Upgrade(raw, initiation)
	if err != nil {
		return nil, err
	}
	noise, err := finish(ctx, &readAhead{raw, r})
	if err != nil {
		return nil, fmt.Errorf("noise: %w", err)
	}
	return transport.NewClientConn(&afterEarly{Conn: noise})
}

// readAhead is a connection of which a reader holds the next bytes.
type readAhead struct {
	net.Conn
	r io.Reader
}

func (c *readAhead) Read(p []byte) (int, error) { return c.r.Read(p) }

// afterEarly skips the early payload that a server may send in front of
// HTTP/2: "\xff\xff\xffTS", a length and tailcfg.EarlyNoise in JSON. Its head
// is as long as that of an HTTP/2 frame.
type afterEarly struct {
	net.Conn
	begun bool
	head  []byte
}

func (c *afterEarly) Read(p []byte) (int, error) {
	if !c.begun {
		c.begun = true
		head := make([]byte, 9)
		if _, err := io.ReadFull(c.Conn, head); err != nil {
			return 0, err
		}
		if !bytes.HasPrefix(head, []byte("\xff\xff\xffTS")) {
			c.head = head
		} else if _, err := io.CopyN(io.Discard, c.Conn, int64(binary.BigEndian.Uint32(head[5:]))); err != nil {
			return 0, err
		}
	}
	if len(c.head) > 0 {
		n := copy(p, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// Close cuts the connection.
func (c *Conn) Close() {
	c.raw.Close()
	c.h2.Close()
}

// Send makes one request inside Noise. body is JSON, or nil for a GET.
func (c *Conn) Send(ctx context.Context, path string, body any) (*http.Response, error) {
	method, text := "GET", []byte(nil)
	if body != nil {
		var err error
		if text, err = json.Marshal(body); err != nil {
			return nil, err
		}
		method = "POST"
	}
	req, err := http.NewRequestWithContext(ctx, method, "https://"+c.server.Addr+path, bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	return c.h2.RoundTrip(req)
}

// call is Send with the answer read whole. Every status but 200 is a Refusal.
func (c *Conn) call(ctx context.Context, path string, body any) ([]byte, error) {
	res, err := c.Send(ctx, path, body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer res.Body.Close()
	if err := refused(path, res); err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(res.Body, 1<<20))
}

// Whoami asks the server what it knows of the machine.
func (c *Conn) Whoami(ctx context.Context) (string, error) {
	text, err := c.call(ctx, "/machine/whoami", nil)
	return string(text), err
}

// Register asks for a node by an auth key. An answer that says anything but
// yes is an error beside the answer.
func (c *Conn) Register(ctx context.Context, authKey string) (*tailcfg.RegisterResponse, error) {
	text, err := c.call(ctx, "/machine/register", &tailcfg.RegisterRequest{
		Version: Version, NodeKey: c.machine.Node.Public(), Hostinfo: c.machine.hostinfo(), Ephemeral: c.machine.Ephemeral,
		Auth: &tailcfg.RegisterResponseAuth{AuthKey: authKey},
	})
	if err != nil {
		return nil, err
	}
	res := new(tailcfg.RegisterResponse)
	if err := json.Unmarshal(text, res); err != nil {
		return nil, fmt.Errorf("register: %w", err)
	}
	if res.Error != "" || res.AuthURL != "" || res.NodeKeyExpired || !res.MachineAuthorized {
		return res, fmt.Errorf("register: error %q, address to open %q, expired %v", res.Error, res.AuthURL, res.NodeKeyExpired)
	}
	return res, nil
}

func (c *Conn) mapRequest() *tailcfg.MapRequest {
	return &tailcfg.MapRequest{
		Version: Version, KeepAlive: true, Compress: "zstd", NodeKey: c.machine.Node.Public(), DiscoKey: c.machine.Disco.Public(),
		Hostinfo: c.machine.hostinfo(),
	}
}

// Report tells the server the machine's endpoints and waits for its answer,
// which it gives when they are stored.
func (c *Conn) Report(ctx context.Context, endpoints ...netip.AddrPort) error {
	req := c.mapRequest()
	req.OmitPeers, req.Endpoints = true, endpoints
	req.EndpointTypes = make([]tailcfg.EndpointType, len(endpoints))
	for i := range req.EndpointTypes {
		req.EndpointTypes[i] = tailcfg.EndpointLocal
	}
	_, err := c.call(ctx, "/machine/map", req)
	return err
}

// Machine is the machine that the connection is of.
func (c *Conn) Machine() *Machine { return c.machine }
