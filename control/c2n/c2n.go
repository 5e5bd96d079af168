// Package c2n calls nodes: it has a client answer over its Noise connection, do an HTTP request to its own diagnostic handlers, or ping a peer
// and say how that went.
//
// A call is a tailcfg.PingRequest in the node's map stream. It names an address that nobody can guess and that is good for one answer, which
// is taken from the node's own machine key only. Clients stay silent when something goes wrong, so a call ends by its own time at the latest.
// A flow:
//
//	Ping(node 7, 100.64.0.9, disco) -> node 7 has its stream at server 2: a row in mail -> server 2 takes it, its stream of node 7 says
//	{"PingRequest": {"URL": "https://control.example.com/machine/c2n/TOKEN", ...}} -> POST /machine/c2n/TOKEN -> a row in mail -> the answer
//
// The package never touches a stream: it hands what is to be said to Streams. It decides nothing about who may call.
package c2n

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// Errors of calls.
var (
	ErrUnknownNode = errors.New("no such node")
	ErrOffline     = errors.New("the node is not connected")
	ErrTimeout     = errors.New("the node did not answer in time")
	ErrBusy        = errors.New("too many calls are under way")
	ErrTooLarge    = errors.New("the node's answer is too large")
	ErrBadAnswer   = errors.New("the node's answer is not what was asked for")
)

// errElsewhere says that the node has no stream at the server that was asked.
var errElsewhere = errors.New("the node has no stream here")

// Streams are the map streams of this server.
type Streams interface {
	// Say has a node's stream say what word returns when its turn has come; authority is the host by which the client calls this server. A word
	// that returns nil is passed over. held is whether the node has a stream here, said whether that has taken the word.
	Say(node tailcfg.NodeID, word func(authority string) *tailcfg.PingRequest) (held, said bool)
}

// Config configures a Server. Fields without a remark are required.
type Config struct {
	Store    *db.Store
	Replica  *tailnet.Replica
	Ledger   *tailnet.Ledger
	Instance int64 // this server's row
	Streams  Streams

	// Timeout is how long a call may take; 0 means 8 s. It is less than the 10 s that an API request has, and that a client takes for a ping.
	Timeout time.Duration

	Log *slog.Logger // nil discards
}

const (
	// Path is where answers come in, before the token.
	Path = "/machine/c2n/"
	// MaxAnswer is the largest answer in bytes. It fits into a mail.
	MaxAnswer = db.MaxMailAnswer - elapsedBytes
	// perNode bounds the calls to one node that are under way, inAll those of this server, probes aside.
	perNode = 8
	inAll   = 1024
	// serving bounds the calls of other servers that are under way here.
	serving = 256
)

// A Server makes calls and takes the answers.
type Server struct {
	cfg Config
	log *slog.Logger
	Stats

	mu    sync.Mutex             // guards the following fields
	calls map[string]*call       // by token; those that have no answer yet
	nodes map[tailcfg.NodeID]int // how many calls each node has
	asked int                    // calls, probes aside
	mail  map[string]chan *db.Mail
}

// Stats are counters of a Server; they only grow.
type Stats struct {
	Calls      atomic.Int64 // that streams of this server have said
	Unanswered atomic.Int64 // of these, those without an answer
}

// New returns a Server. It starts nothing.
func New(cfg Config) *Server {
	if cfg.Timeout == 0 {
		cfg.Timeout = 8 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: cfg, log: cfg.Log, calls: map[string]*call{}, nodes: map[tailcfg.NodeID]int{}, mail: map[string]chan *db.Mail{}}
}

// A request is what a node is asked to do. It travels between servers as JSON.
type request struct {
	Types   string     `json:"types,omitempty"` // as in tailcfg.PingRequest; "" is a HEAD request to the address
	IP      netip.Addr `json:"ip,omitzero"`
	Payload []byte     `json:"payload,omitempty"`
}

// An answer is what came back, and how long that took after the stream said the call.
type answer struct {
	body    []byte
	elapsed time.Duration
	err     error
}

// a call is one that was handed to a stream of this server.
type call struct {
	node     tailcfg.NodeID
	machine  key.MachinePublic // who may answer
	head     bool              // by HEAD, else by POST
	probe    bool
	deadline time.Time
	said     time.Time   // zero before its turn; guarded by Server.mu
	done     chan answer // one slot
}

// Echo has the node answer over its Noise connection and returns how long that took.
func (s *Server) Echo(ctx context.Context, node tailcfg.NodeID) (time.Duration, error) {
	a, err := s.call(ctx, node, &request{})
	return a.elapsed, err
}

// Probe is Echo for a node whose stream is at this server. It ends with ctx, which has a deadline, and says ErrOffline when the stream is
// somewhere else.
func (s *Server) Probe(ctx context.Context, node tailcfg.NodeID) error {
	n := s.cfg.Replica.Current().Node(node)
	if n == nil {
		return ErrUnknownNode
	}
	_, err := s.here(ctx, n, &request{}, true)
	return final(ctx, err)
}

// call makes a call wherever the node's stream is.
func (s *Server) call(ctx context.Context, node tailcfg.NodeID, req *request) (answer, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.cfg.Timeout, ErrTimeout)
	defer cancel()
	if ctx.Err() != nil {
		return answer{}, context.Cause(ctx)
	}
	var asked int64
	for {
		n := s.cfg.Replica.Current().Node(node)
		if n == nil {
			return answer{}, ErrUnknownNode
		}
		a, err := s.here(ctx, n, req, false)
		if !errors.Is(err, errElsewhere) {
			return a, final(ctx, err)
		}
		holder := n.State.Instance
		if !n.State.Online || holder == 0 || holder == s.cfg.Instance || holder == asked {
			return answer{}, ErrOffline
		}
		if a, err = s.there(ctx, n.ID, holder, req); !errors.Is(err, errElsewhere) {
			return a, final(ctx, err)
		}
		// It may have moved on meanwhile.
		asked = holder
		if _, err := s.cfg.Replica.CatchUp(ctx); err != nil {
			return answer{}, final(ctx, err)
		}
	}
}

// final is the error that a caller sees.
func final(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errElsewhere):
		return ErrOffline
	case ctx.Err() != nil && errors.Is(err, ctx.Err()):
		return context.Cause(ctx)
	}
	return err
}

// here makes a call through a stream of this server. It is errElsewhere when the node has none. A probe is bounded by whoever makes it.
func (s *Server) here(ctx context.Context, n *tailnet.Node, req *request, probe bool) (answer, error) {
	deadline, _ := ctx.Deadline()
	c := &call{node: n.ID, machine: n.MachineKey, head: req.Types == "", probe: probe, deadline: deadline, done: make(chan answer, 1)}
	token := random()
	if !s.begin(token, c) {
		return answer{}, ErrBusy
	}
	defer s.end(token, c)
	held, said := s.cfg.Streams.Say(n.ID, func(authority string) *tailcfg.PingRequest { return s.say(token, authority, req) })
	switch {
	case !held:
		return answer{}, errElsewhere
	case !said:
		return answer{}, ErrBusy
	}
	select {
	case a := <-c.done:
		return a, a.err
	case <-ctx.Done():
	}
	select {
	case a := <-c.done: // it came in the same moment
		return a, a.err
	default:
		return answer{}, ctx.Err()
	}
}

// random is a name of 256 bits.
func random() string {
	var b [32]byte
	rand.Read(b[:])
	return base64.RawURLEncoding.EncodeToString(b[:])
}

func (s *Server) begin(token string, c *call) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.nodes[c.node] >= perNode || !c.probe && s.asked >= inAll {
		return false
	}
	if !c.probe {
		s.asked++
	}
	s.calls[token] = c
	s.nodes[c.node]++
	return true
}

func (s *Server) end(token string, c *call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.calls[token] == c && !c.said.IsZero() {
		s.Unanswered.Add(1)
	}
	delete(s.calls, token)
	if !c.probe {
		s.asked--
	}
	if s.nodes[c.node]--; s.nodes[c.node] == 0 {
		delete(s.nodes, c.node)
	}
}

// say is called by the stream when it is the call's turn. Its address has the authority that the client itself uses: at any other one newer
// clients open a second connection, which may not be possible.
func (s *Server) say(token, authority string, req *request) *tailcfg.PingRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.calls[token]
	if c == nil {
		return nil // it is over
	}
	c.said = time.Now()
	s.Calls.Add(1)
	return &tailcfg.PingRequest{URL: "https://" + authority + Path + token, URLIsNoise: true, Types: req.Types, IP: req.IP, Payload: req.Payload}
}

// take ends a token if machine may use it. Whoever else tries learns nothing and takes nothing.
func (s *Server) take(token string, machine key.MachinePublic, head bool) *call {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.calls[token]
	if c == nil || c.machine != machine || c.head != head || c.said.IsZero() {
		return nil
	}
	delete(s.calls, token)
	return c
}

// PingTypes are what a node can be asked to ping a peer by, in the words of the protocol.
var PingTypes = []tailcfg.PingType{tailcfg.PingDisco, tailcfg.PingTSMP, tailcfg.PingICMP, tailcfg.PingPeerAPI}

// Ping has the node ping an address by one of PingTypes. What the node says went wrong is in the answer's Err; a ping without an answer is
// ErrTimeout, since nodes do not say so.
func (s *Server) Ping(ctx context.Context, node tailcfg.NodeID, ip netip.Addr, by tailcfg.PingType) (*tailcfg.PingResponse, error) {
	a, err := s.call(ctx, node, &request{Types: string(by), IP: ip})
	if err != nil {
		return nil, err
	}
	return parsePing(a.body, by)
}

// A Response is a node's answer to an HTTP request.
type Response struct {
	Status      int
	ContentType string
	Body        []byte
	Elapsed     time.Duration
}

// Paths are what Get asks for: nothing that changes the node, and nothing of what its user keeps on it.
var Paths = []string{"/echo", "/debug/health", "/debug/metrics"}

// ErrPath is a path that Get does not ask for.
var ErrPath = fmt.Errorf("the path is not one of %s", strings.Join(Paths, ", "))

// Get has the node answer a GET request of one of Paths. A node that does not know the path answers with status 400.
func (s *Server) Get(ctx context.Context, node tailcfg.NodeID, path string) (*Response, error) {
	if !slices.Contains(Paths, path) {
		return nil, ErrPath
	}
	// Clients give up by themselves at that time, and answer so.
	payload := fmt.Sprintf("GET %s HTTP/1.1\r\nHost: node\r\nC2n-Handler-Timeout: %s\r\n\r\n", path, s.cfg.Timeout)
	a, err := s.call(ctx, node, &request{Types: "c2n", Payload: []byte(payload)})
	if err != nil {
		return nil, err
	}
	return parseResponse(a)
}
