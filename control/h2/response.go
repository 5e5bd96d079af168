package h2

import (
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
)

// A response is the http.ResponseWriter of a stream. Like every other, it is for the handler's goroutine, but for its deadlines.
type response struct {
	st       *stream
	header   http.Header
	status   int   // 0 until WriteHeader
	bare     bool  // no body goes with it: HEAD, 204, 304
	declared int64 // Content-Length set by the handler; -1 when it was not
	wrote    int64
	headSent bool
	ended    bool
	buf      *chunk // lent while there is something in it
	n        int    // bytes of payload in buf
	err      error
}

func (w *response) Header() http.Header { return w.header }

func (w *response) WriteHeader(status int) {
	if w.status != 0 || status < 200 {
		return // informational answers are not sent
	}
	w.status = status
	if status == http.StatusNoContent || status == http.StatusNotModified {
		w.bare = true
	}
	if v := w.header.Get("Content-Length"); v != "" {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < 0 {
			w.header.Del("Content-Length")
		} else {
			w.declared = n
		}
	}
}

func (w *response) Write(p []byte) (int, error) {
	if w.err != nil {
		return 0, w.err
	}
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	if w.bare {
		if w.status == http.StatusNoContent || w.status == http.StatusNotModified {
			return 0, http.ErrBodyNotAllowed
		}
		return len(p), nil
	}
	if w.declared >= 0 && w.wrote+int64(len(p)) > w.declared {
		return 0, http.ErrContentLength
	}
	w.wrote += int64(len(p))
	size := w.st.c.cfg.Frame - frameHeader
	written := 0
	for len(p) > 0 {
		if w.n == size {
			if err := w.send(false); err != nil {
				return written, err
			}
		}
		if w.buf == nil {
			w.buf = chunks.Get().(*chunk)
		}
		k := copy(w.buf[room+w.n:room+size], p)
		w.n += k
		written += k
		p = p[k:]
	}
	return written, nil
}

// WriteString implements io.StringWriter.
func (w *response) WriteString(s string) (int, error) { return w.Write([]byte(s)) }

// Flush implements http.Flusher.
func (w *response) Flush() { _ = w.FlushError() }

// FlushError sends what was written. See http.ResponseController.
func (w *response) FlushError() error {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	return w.send(false)
}

// SetReadDeadline sets the time at which reads of the request's body begin to fail.
func (w *response) SetReadDeadline(t time.Time) error {
	if w.st.body != nil {
		w.st.body.readDeadline(t)
	}
	return nil
}

// SetWriteDeadline sets the time at which writes begin to fail that wait for the peer's windows. One that is under way on the connection
// goes on: half a frame would end all its streams.
func (w *response) SetWriteDeadline(t time.Time) error {
	w.st.writeDeadline(t)
	return nil
}

// EnableFullDuplex implements what HTTP/2 always does.
func (w *response) EnableFullDuplex() error { return nil }

// end completes the response when its handler has returned.
func (w *response) end() {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	if w.declared >= 0 && w.wrote < w.declared && !w.bare {
		w.err = io.ErrUnexpectedEOF
	}
	c := w.st.c
	c.mu.Lock()
	if w.st.writeBy.IsZero() {
		w.st.writeBy = time.Now().Add(c.cfg.Stall)
	}
	c.mu.Unlock()
	if w.err == nil {
		w.err = w.send(true)
	}
	w.drop()
	if w.err != nil {
		c.mu.Lock()
		if w.st.dead == nil {
			c.reset(w.st.id, http2.ErrCodeInternal)
			w.st.dead = w.err
		}
		c.mu.Unlock()
	}
}

// drop gives the buffer back.
func (w *response) drop() {
	if w.buf != nil {
		chunks.Put(w.buf)
		w.buf, w.n = nil, 0
	}
}

// send writes what is in the buffer, with the head if that is still to come, and ends the stream if last. It waits for the peer's windows.
func (w *response) send(last bool) (err error) {
	if w.err != nil {
		return w.err
	}
	defer func() {
		if w.drop(); err != nil {
			w.err = err
		}
	}()
	if w.headSent && w.n == 0 {
		if err := w.alive(); err != nil || !last || w.ended {
			return err
		}
		w.ended = true
		return w.st.c.write(appendFrame(nil, 0, http2.FrameData, http2.FlagDataEndStream, w.st.id))
	}
	var scratch [room]byte
	head := scratch[:0]
	if !w.headSent {
		if head, err = w.head(head, last); err != nil {
			return err
		}
		w.headSent = true
		if w.n == 0 {
			if w.ended = last; last {
				head[4] |= byte(http2.FlagHeadersEndStream)
			}
			if err := w.alive(); err != nil {
				return err
			}
			return w.st.c.write(head)
		}
	}
	for off := 0; off < w.n; {
		// The head does not wait for a window.
		n, err := w.st.reserve(w.n-off, len(head) == 0)
		if err != nil {
			return err
		}
		if n == 0 || len(head) > room-frameHeader {
			if err := w.st.c.write(head); err != nil {
				return err
			}
			if head = nil; n == 0 {
				continue
			}
		}
		flags := http2.Flags(0)
		if last && off+n == w.n {
			flags, w.ended = http2.FlagDataEndStream, true
		}
		// The headers go right before the payload: into the room in front of it, and later over what was sent.
		at := room + off - frameHeader
		appendFrame(w.buf[:at], n, http2.FrameData, flags, w.st.id)
		at -= len(head)
		copy(w.buf[at:], head)
		head = nil
		if err := w.st.c.write(w.buf[at : room+off+n]); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// alive is why the stream may not be written to; nil when it may.
func (w *response) alive() error {
	w.st.c.mu.Lock()
	defer w.st.c.mu.Unlock()
	return w.st.deadAt(time.Now())
}

// deadAt is why nothing may be written. c.mu is held.
func (st *stream) deadAt(now time.Time) error {
	if st.dead == nil && !st.writeBy.IsZero() && !now.Before(st.writeBy) {
		return os.ErrDeadlineExceeded
	}
	return st.dead
}

// head appends the HEADERS frame. whole says that the response is complete with what is in the buffer.
func (w *response) head(b []byte, whole bool) ([]byte, error) {
	c := w.st.c
	b = appendFrame(b, 0, http2.FrameHeaders, http2.FlagHeadersEndHeaders, w.st.id)
	c.mu.Lock()
	if c.shrink {
		b = append(b, 0x20) // RFC 7541, 6.3: the table that we never use is empty. Whichever block the peer gets first has to say it.
	}
	if w.st.body != nil {
		w.st.body.ask = false // 100 (Continue) comes before the answer or not at all
	}
	c.mu.Unlock()
	b = appendStatus(b, w.status)
	h := w.header
	if w.n > 0 && h.Get("Content-Type") == "" && h.Get("Content-Encoding") == "" {
		if _, set := h["Content-Type"]; !set {
			b = appendField(b, "content-type", http.DetectContentType(w.buf[room:room+min(w.n, 512)]))
		}
	}
	if w.declared >= 0 {
		b = appendField(b, "content-length", strconv.FormatInt(w.declared, 10))
	} else if whole && !w.bare {
		b = appendField(b, "content-length", strconv.Itoa(w.n))
	}
	if h.Get("Date") == "" {
		b = appendField(b, "date", time.Now().UTC().Format(http.TimeFormat))
	}
	for k, values := range h {
		name := strings.ToLower(k)
		switch name {
		case "connection", "proxy-connection", "transfer-encoding", "upgrade", "keep-alive", "content-length":
			continue
		}
		for _, v := range values {
			if httpguts.ValidHeaderFieldName(name) && httpguts.ValidHeaderFieldValue(v) {
				b = appendField(b, name, v)
			}
		}
	}
	n := len(b) - frameHeader
	if n > maxFrame {
		return nil, errHead
	}
	b[0], b[1], b[2] = byte(n>>16), byte(n>>8), byte(n)
	return b, nil
}
