package c2n

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/go-chi/chi/v5"
	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/noise"
)

// Routes mounts the paths inside Noise.
func (s *Server) Routes(r chi.Router) {
	r.Head(Path+"{token}", s.answer)
	r.Post(Path+"{token}", s.answer)
}

// answer takes what a node says to a call. Clients do not look at what comes back.
func (s *Server) answer(w http.ResponseWriter, r *http.Request) {
	var c *call
	if conn, ok := noise.Peer(r.Context()); ok {
		c = s.take(chi.URLParam(r, "token"), conn.Machine, r.Method == http.MethodHead)
	}
	if c == nil {
		http.Error(w, "no such call", http.StatusNotFound)
		return
	}
	a := answer{elapsed: time.Since(c.said)}
	if !c.head {
		a.body, a.err = read(r.Body, c.deadline)
	}
	c.done <- a
	switch {
	case errors.Is(a.err, ErrTooLarge):
		http.Error(w, "the answer is larger than 1 MiB", http.StatusRequestEntityTooLarge)
	case a.err != nil:
		http.Error(w, "the answer could not be read", http.StatusBadRequest)
	}
}

// read reads an answer for as long as somebody waits for it. That a single read does not take forever is Noise's business.
func read(body io.Reader, deadline time.Time) ([]byte, error) {
	var out []byte
	buf := make([]byte, 16<<10)
	for {
		n, err := body.Read(buf)
		out = append(out, buf[:n]...)
		tooBig := (*http.MaxBytesError)(nil)
		switch {
		case len(out) > MaxAnswer, errors.As(err, &tooBig):
			return nil, ErrTooLarge
		case err == io.EOF:
			return out, nil
		case err != nil:
			return nil, fmt.Errorf("%w: %v", ErrBadAnswer, err)
		case time.Now().After(deadline):
			return nil, ErrTimeout
		}
	}
}

// parsePing reads a client's report of a ping.
func parsePing(body []byte, by tailcfg.PingType) (*tailcfg.PingResponse, error) {
	res := new(tailcfg.PingResponse)
	if err := json.Unmarshal(body, res); err != nil || res.Type != by {
		return nil, ErrBadAnswer
	}
	return res, nil
}

// parseResponse reads the bytes of an HTTP response.
func parseResponse(a answer) (*Response, error) {
	res, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(a.body)), nil)
	if err != nil {
		return nil, ErrBadAnswer
	}
	defer res.Body.Close()
	// The body is bounded by what was read.
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, ErrBadAnswer
	}
	return &Response{Status: res.StatusCode, ContentType: res.Header.Get("Content-Type"), Body: body, Elapsed: a.elapsed}, nil
}
