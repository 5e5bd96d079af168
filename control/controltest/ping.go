package controltest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"tailscale.com/tailcfg"
)

// An Answer is what a client sent to the address of a ping request, and what the server said to that.
type Answer struct {
	Ping   *tailcfg.PingRequest
	Status int // 0: it could not be sent
}

// pinger answers the ping requests of a stream as stock clients do: over the connection that the stream is on, each in its own time, and not at
// all when a ping of a peer fails. Its fields are set when the stream begins.
type pinger struct {
	conn   *http2.ClientConn
	host   string // the authority of the client's own requests
	c2n    http.Handler
	silent bool // guarded by Stream.mu
	last   string
}

// Silence has the client leave ping requests unanswered, as one that hangs does, or answer again.
func (st *Stream) Silence(silent bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.pings.silent = silent
}

// WaitAnswers waits until the client has answered n ping requests and returns the answers.
func (st *Stream) WaitAnswers(n int) (out []Answer) {
	st.s.Helper()
	st.until(fmt.Sprintf("%d answers to pings", n), func() bool {
		out = append([]Answer(nil), st.answers...)
		return len(out) >= n
	})
	return out
}

// ping is called with each ping request of the stream; st.mu is held.
func (st *Stream) ping(p *tailcfg.PingRequest) {
	if p.URL == "" || p.URL == st.pings.last {
		st.view.fault("a ping request whose address is empty or that of the one before: %q", p.URL)
		return
	}
	st.pings.last = p.URL
	u, err := url.Parse(p.URL)
	if err != nil || u.Scheme != "https" || u.Host != st.pings.host || !p.URLIsNoise && p.Types != "c2n" {
		st.view.fault("a ping request whose address is not at %s inside Noise: %+v", st.pings.host, p)
		return
	}
	if st.pings.silent {
		return
	}
	switch p.Types {
	case "":
		go st.send(p, http.MethodHead, nil)
	case "c2n":
		go st.send(p, http.MethodPost, serveC2N(st.pings.c2n, p.Payload))
	default:
		for t := range strings.SplitSeq(p.Types, ",") {
			if res := pingPeer(&st.view, p.IP, tailcfg.PingType(t)); res != nil {
				body, _ := json.Marshal(res)
				go st.send(p, http.MethodPost, body)
			}
		}
	}
}

func (st *Stream) send(p *tailcfg.PingRequest, method string, body []byte) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	a := Answer{Ping: p}
	if req, err := http.NewRequestWithContext(ctx, method, p.URL, bytes.NewReader(body)); err == nil {
		if res, err := st.pings.conn.RoundTrip(req); err == nil {
			io.Copy(io.Discard, res.Body)
			res.Body.Close()
			a.Status = res.StatusCode
		}
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	st.answers = append(st.answers, a)
	close(st.moved)
	st.moved = make(chan struct{})
}

// serveC2N lets a handler answer the request in a payload, as bytes of HTTP/1.1.
func serveC2N(h http.Handler, payload []byte) []byte {
	req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(payload)))
	if err != nil {
		return nil
	}
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, req)
	var out bytes.Buffer
	res := rec.Result()
	res.ContentLength = int64(rec.Body.Len())
	res.Write(&out)
	return out.Bytes()
}

// StockC2N answers what tests ask of what stock clients answer.
var StockC2N http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/echo":
		io.Copy(w, r.Body)
	case "/debug/metrics":
		fmt.Fprintln(w, "magicsock_netcheck 1")
	default:
		http.Error(w, "unknown c2n path", http.StatusBadRequest)
	}
})

// pingPeer pings a peer of the view. One that is offline does not answer, so there is no report; an address that is nobody's is an error at
// once.
func pingPeer(v *View, ip netip.Addr, by tailcfg.PingType) *tailcfg.PingResponse {
	for _, p := range v.Peers {
		for _, a := range p.Addresses {
			if a.Addr() != ip {
				continue
			}
			if p.Online != nil && !*p.Online {
				return nil
			}
			name, _, _ := strings.Cut(p.Name, ".")
			return &tailcfg.PingResponse{
				Type: by, IP: ip.String(), NodeIP: ip.String(), NodeName: name, LatencySeconds: (5 * time.Millisecond).Seconds(), Endpoint: "192.0.2.9:41641",
			}
		}
	}
	return &tailcfg.PingResponse{Type: by, IP: ip.String(), Err: "no matching peer"}
}
