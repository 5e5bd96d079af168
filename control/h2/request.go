package h2

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/textproto"
	"net/url"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/net/http2"
)

// takeHeaders opens a stream, or takes the trailers of one.
func (c *Conn) takeHeaders(f *http2.MetaHeadersFrame) error {
	id := f.StreamID
	if id%2 == 0 {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if id <= c.last {
		return c.takeTrailers(f)
	}
	c.last = id
	if c.err != nil {
		return c.err
	}
	if c.away || c.handlers >= maxStreams {
		return http2.StreamError{StreamID: id, Code: http2.ErrCodeRefusedStream}
	}
	st := &stream{c: c, id: id, window: c.initial, done: f.StreamEnded()}
	r, status := st.request(f)
	if status < 0 {
		return http2.StreamError{StreamID: id, Code: http2.ErrCodeProtocol}
	}
	st.ctx, st.cancel = context.WithCancel(c.ctx)
	h := c.cfg.Handler
	if status > 0 {
		h = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) })
	}
	c.streams = append(c.streams, st)
	c.handlers++
	w := &response{st: st, header: http.Header{}, bare: r.Method == http.MethodHead, declared: -1}
	go c.run(st, h, w, r.WithContext(st.ctx))
	return nil
}

// takeTrailers ends a request's body. c.mu is held.
func (c *Conn) takeTrailers(f *http2.MetaHeadersFrame) error {
	st := c.find(f.StreamID)
	if st == nil { // ended a moment ago
		return c.control()
	}
	b := st.body
	if st.done || b == nil {
		return http2.StreamError{StreamID: st.id, Code: http2.ErrCodeStreamClosed}
	}
	if !f.StreamEnded() || len(f.PseudoFields()) > 0 || b.length >= 0 && b.got < b.length {
		return http2.StreamError{StreamID: st.id, Code: http2.ErrCodeProtocol}
	}
	st.done = true
	if b.err == nil {
		b.fail(io.EOF)
	}
	return nil
}

// request makes a request of its header fields. status is 0, or with what it has to be answered without asking the handler, or negative when
// it is malformed (RFC 9113, 8.1.1).
func (st *stream) request(f *http2.MetaHeadersFrame) (r *http.Request, status int) {
	method, path := f.PseudoValue("method"), f.PseudoValue("path")
	scheme, host := f.PseudoValue("scheme"), f.PseudoValue("authority")
	r = &http.Request{Method: method, Proto: "HTTP/2.0", ProtoMajor: 2, Header: make(http.Header, len(f.Fields)), RemoteAddr: st.c.nc.RemoteAddr().String(),
		RequestURI: path, Body: http.NoBody}
	if f.Truncated {
		r.URL = new(url.URL)
		return r, http.StatusRequestHeaderFieldsTooLarge
	}
	if method == "" || method == http.MethodConnect || f.PseudoValue("protocol") != "" || scheme != "http" && scheme != "https" {
		return nil, -1
	}
	for _, h := range f.RegularFields() {
		switch h.Name {
		case "connection", "proxy-connection", "transfer-encoding", "upgrade", "keep-alive":
			return nil, -1
		case "te":
			if h.Value != "trailers" {
				return nil, -1
			}
		}
		k := textproto.CanonicalMIMEHeaderKey(h.Name)
		r.Header[k] = append(r.Header[k], h.Value)
	}
	if cookies := r.Header["Cookie"]; len(cookies) > 1 {
		r.Header.Set("Cookie", strings.Join(cookies, "; "))
	}
	if host == "" {
		host = r.Header.Get("Host")
	}
	delete(r.Header, "Host")
	r.Host = host
	var err error
	if r.URL, err = url.ParseRequestURI(path); err != nil && path != "*" {
		return nil, -1
	}
	length := int64(-1)
	if v := r.Header["Content-Length"]; len(v) > 0 {
		n, err := strconv.ParseUint(v[0], 10, 63)
		if err != nil || len(v) > 1 {
			return nil, -1
		}
		length = int64(n)
	}
	if st.done {
		if length > 0 {
			return nil, -1
		}
		return r, 0
	}
	st.body = &body{st: st, length: length, in: window}
	if strings.EqualFold(r.Header.Get("Expect"), "100-continue") {
		st.body.ask = true
	}
	r.ContentLength, r.Body = length, st.body
	return r, 0
}

// run is a handler's goroutine.
func (c *Conn) run(st *stream, h http.Handler, w *response, r *http.Request) {
	defer c.finish(st)
	path := r.URL.Path
	defer func() {
		v := recover()
		if v == nil {
			return
		}
		w.drop()
		c.mu.Lock()
		if st.dead == nil {
			c.reset(st.id, http2.ErrCodeInternal)
			st.kill(http.ErrAbortHandler)
		}
		c.mu.Unlock()
		if v != http.ErrAbortHandler {
			c.cfg.Log.Error("panic in a handler", "path", path, "panic", v, "stack", slog.StringValue(string(debug.Stack())))
		}
	}()
	h.ServeHTTP(w, r)
	r = nil // its header fields need not wait for the peer to take the answer
	w.end()
}

// finish forgets a stream whose handler has returned.
func (c *Conn) finish(st *stream) {
	st.cancel()
	c.mu.Lock()
	if st.body != nil {
		st.body.close()
	}
	if st.dead == nil && !st.done {
		// The answer is complete; the rest of the request is not wanted (RFC 9113, 8.1).
		c.reset(st.id, http2.ErrCodeNo)
	}
	if st.dead == nil {
		st.dead = errClosed
	}
	c.forget(st)
	c.handlers--
	c.lingerIfDone()
	c.mu.Unlock()
	_ = c.flush()
}
