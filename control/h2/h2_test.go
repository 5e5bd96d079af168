package h2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// patience is how long a test waits for what should happen at once.
const patience = 20 * time.Second

// pair is a connection over loopback.
func pair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if client, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	_ = client.SetDeadline(time.Now().Add(patience))
	return client, server
}

// serve runs a Conn until the test ends.
func serve(t testing.TB, nc net.Conn, cfg Config) *Conn {
	t.Helper()
	c := New(nc, cfg)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.Serve()
	}()
	t.Cleanup(func() { nc.Close(); <-done })
	return c
}

// stock is net/http's client on one connection.
func stock(t testing.TB, nc net.Conn) http.RoundTripper {
	t.Helper()
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	tr := &http.Transport{
		Protocols: &protocols, ExpectContinueTimeout: patience,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return nc, nil },
	}
	cc, err := tr.NewClientConn(context.Background(), "http", "unused:80")
	if err != nil {
		t.Fatal(err)
	}
	return cc
}

func get(t testing.TB, cc http.RoundTripper, r *http.Request) (*http.Response, string) {
	t.Helper()
	res, err := cc.RoundTrip(r)
	if err != nil {
		t.Fatalf("%s %s: %v", r.Method, r.URL, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%s %s: body: %v", r.Method, r.URL, err)
	}
	return res, string(b)
}

func request(method, path string, body io.Reader) *http.Request {
	r, err := http.NewRequest(method, "http://host.example"+path, body)
	if err != nil {
		panic(err)
	}
	return r
}

func TestRequestsArriveWhole(t *testing.T) {
	client, server := pair(t)
	serve(t, server, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s %s %d %s %v %v %s", r.Method, r.RequestURI, r.URL.Query().Get("q"), r.Host, r.ContentLength, b, err, r.Header["X-Two"], r.Header.Get("Cookie"))
	})})
	r := request("POST", "/a/b?q=1", strings.NewReader("body"))
	r.Header["X-Two"] = []string{"one", "two"}
	r.Header["Cookie"] = []string{"a=1", "b=2"}
	res, text := get(t, stock(t, client), r)
	if want := "POST /a/b?q=1 1 host.example 4 body <nil> [one two] a=1; b=2"; text != want {
		t.Errorf("got  %s\nwant %s", text, want)
	}
	if res.Header.Get("Date") == "" || !strings.HasPrefix(res.Header.Get("Content-Type"), "text/plain") || res.ContentLength != int64(len(text)) {
		t.Errorf("head %v, length %d", res.Header, res.ContentLength)
	}
}

func TestAnswersOfEachKind(t *testing.T) {
	big := strings.Repeat("0123456789abcdef", 20_000)
	client, server := pair(t)
	serve(t, server, Config{Frame: 4 * 4077, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/nothing":
		case "/204":
			w.WriteHeader(http.StatusNoContent)
			if _, err := w.Write([]byte("x")); !errors.Is(err, http.ErrBodyNotAllowed) {
				t.Errorf("a body after 204: %v", err)
			}
		case "/404":
			http.Error(w, "gone", http.StatusNotFound)
		case "/big":
			io.WriteString(w, big)
		case "/pieces":
			for i := 0; i < len(big); i += 1000 {
				io.WriteString(w, big[i:i+1000])
				if i%7000 == 0 {
					w.(http.Flusher).Flush()
				}
			}
		case "/declared":
			w.Header().Set("Content-Length", "5")
			if _, err := io.WriteString(w, "hello!"); !errors.Is(err, http.ErrContentLength) {
				t.Errorf("more than declared: %v", err)
			}
			io.WriteString(w, "hello")
			w.Header().Set("Content-Length", "7") // too late to count
		case "/head":
			w.Header().Set("X-Long", strings.Repeat("x", 600))
			io.WriteString(w, big)
		}
	})})
	cc := stock(t, client)
	for _, c := range []struct {
		method, path string
		status       int
		body         string
	}{
		{"GET", "/nothing", 200, ""}, {"GET", "/204", 204, ""}, {"GET", "/404", 404, "gone\n"}, {"GET", "/big", 200, big}, {"GET", "/pieces", 200, big},
		{"HEAD", "/big", 200, ""}, {"GET", "/head", 200, big},
	} {
		res, text := get(t, cc, request(c.method, c.path, nil))
		if res.StatusCode != c.status || text != c.body {
			t.Errorf("%s %s: status %d and %d bytes, want %d and %d", c.method, c.path, res.StatusCode, len(text), c.status, len(c.body))
		}
	}
	if res, text := get(t, cc, request("GET", "/declared", nil)); text != "hello" || res.ContentLength != 5 {
		t.Errorf("declared: %q, length %d", text, res.ContentLength)
	}
}

// TestManyStreamsAtOnce sends bodies of all sizes both ways on one connection.
func TestManyStreamsAtOnce(t *testing.T) {
	client, server := pair(t)
	serve(t, server, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(w, r.Body)
	})})
	cc := stock(t, client)
	var wg sync.WaitGroup
	for i := range 60 {
		wg.Go(func() {
			body := bytes.Repeat([]byte{byte(i)}, 1<<(i%20)+i)
			res, err := cc.RoundTrip(request("POST", "/", bytes.NewReader(body)))
			if err != nil {
				t.Error(err)
				return
			}
			defer res.Body.Close()
			if got, err := io.ReadAll(res.Body); err != nil || !bytes.Equal(got, body) {
				t.Errorf("%d bytes came back of %d: %v", len(got), len(body), err)
			}
		})
	}
	wg.Wait()
}

// TestNothingFollowsAReset: a handler that ends after its peer has reset the stream writes nothing to it.
func TestNothingFollowsAReset(t *testing.T) {
	entered, ended := make(chan struct{}), make(chan struct{}, 1)
	p := raw(t, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/next" {
			return
		}
		w.(http.Flusher).Flush()
		close(entered)
		<-r.Context().Done()
		ended <- struct{}{}
	})})
	p.ask(1, true)
	<-entered
	if _, ok := p.next().(*http2.HeadersFrame); !ok {
		t.Fatal("no answer")
	}
	p.WriteRSTStream(1, http2.ErrCodeCancel)
	<-ended
	p.ask(3, true, ":path", "/next")
	if f := p.next(); f.Header().StreamID != 3 {
		t.Errorf("after the reset: %v", f)
	}
}

// TestContinueDoesNotFollowTheAnswer has a handler that reads after it has answered.
func TestContinueDoesNotFollowTheAnswer(t *testing.T) {
	p := raw(t, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		io.Copy(w, r.Body)
	})})
	p.ask(1, false, "expect", "100-continue")
	heads := 0
	for {
		switch f := p.next().(type) {
		case *http2.HeadersFrame:
			heads++
			p.WriteData(1, true, []byte("x"))
		case *http2.DataFrame:
			if f.StreamEnded() {
				if heads != 1 {
					t.Errorf("%d heads", heads)
				}
				return
			}
		}
	}
}

// TestSmallHeaderTable tells in every block that no table is used: which one the peer gets first is not certain.
func TestSmallHeaderTable(t *testing.T) {
	p := raw(t, Config{Handler: teapot}, http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0})
	for _, id := range []uint32{1, 3} {
		p.ask(id, true)
		f, ok := p.next().(*http2.HeadersFrame)
		if !ok || len(f.HeaderBlockFragment()) == 0 || f.HeaderBlockFragment()[0] != 0x20 {
			t.Fatalf("got %v", f)
		}
	}
}

func TestExpectContinue(t *testing.T) {
	client, server := pair(t)
	serve(t, server, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/read" {
			io.Copy(w, r.Body)
		}
	})})
	cc := stock(t, client)
	for path, want := range map[string]string{"/read": "body", "/ignore": ""} {
		r := request("POST", path, strings.NewReader("body"))
		r.Header.Set("Expect", "100-continue")
		if _, text := get(t, cc, r); text != want {
			t.Errorf("%s: %q", path, text)
		}
	}
}

func TestTrailersEndABody(t *testing.T) {
	client, server := pair(t)
	serve(t, server, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })})
	r := request("POST", "/", io.MultiReader(strings.NewReader("body")))
	r.Trailer = http.Header{"X-After": {"x"}}
	if _, text := get(t, stock(t, client), r); text != "body" {
		t.Errorf("%q", text)
	}
}

// rawPeer speaks HTTP/2 frame by frame.
type rawPeer struct {
	t testing.TB
	*http2.Framer
	nc net.Conn
}

// raw connects a rawPeer, which has sent its preface and SETTINGS.
func raw(t testing.TB, cfg Config, settings ...http2.Setting) *rawPeer {
	t.Helper()
	client, server := pair(t)
	serve(t, server, cfg)
	p := &rawPeer{t, http2.NewFramer(client, client), client}
	io.WriteString(client, http2.ClientPreface)
	p.WriteSettings(settings...)
	return p
}

// ask opens a stream with header fields beside those of a usual request; one with an empty value leaves that of its name out.
func (p *rawPeer) ask(id uint32, end bool, fields ...string) {
	p.t.Helper()
	list := [][2]string{{":method", "POST"}, {":scheme", "https"}, {":authority", "x"}, {":path", "/"}}
	for i := 0; i < len(fields); i += 2 {
		found := false
		for k := range list {
			if list[k][0] == fields[i] {
				list[k][1], found = fields[i+1], true
			}
		}
		if !found {
			list = append(list, [2]string{fields[i], fields[i+1]})
		}
	}
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range list {
		if f[1] != "" {
			enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
		}
	}
	if err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block.Bytes(), EndStream: end, EndHeaders: true}); err != nil {
		p.t.Fatal(err)
	}
}

// next is the next frame but for SETTINGS and WINDOW_UPDATE.
func (p *rawPeer) next() http2.Frame {
	p.t.Helper()
	for {
		f, err := p.ReadFrame()
		if err != nil {
			p.t.Fatalf("no frame: %v", err)
		}
		switch f.(type) {
		case *http2.SettingsFrame, *http2.WindowUpdateFrame:
			continue
		}
		return f
	}
}

var teapot = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusTeapot) })

// TestMalformedRequestsAreReset also shows that the connection goes on.
func TestMalformedRequestsAreReset(t *testing.T) {
	for name, fields := range map[string][]string{
		"no method": {":method", ""}, "no path": {":path", ""}, "no scheme": {":scheme", ""}, "CONNECT": {":method", "CONNECT"}, "path": {":path", "no slash"},
		"scheme": {":scheme", "ftp"}, "connection": {"connection", "close"}, "te": {"te", "gzip"}, "transfer-encoding": {"transfer-encoding", "chunked"},
		"upgrade": {"upgrade", "x"}, "upper case": {"X-Upper", "x"}, "value": {"x", "a\x00b"}, "length": {"content-length", "-1"}, "length of nothing": {"content-length", "7"},
		"late pseudo": {"x", "y", ":late", "x"}, "status": {":status", "200"},
	} {
		t.Run(name, func(t *testing.T) {
			p := raw(t, Config{Handler: teapot})
			p.AllowIllegalWrites = true
			p.ask(1, true, fields...)
			if f, ok := p.next().(*http2.RSTStreamFrame); !ok || f.StreamID != 1 || f.ErrCode != http2.ErrCodeProtocol {
				t.Fatalf("answered with %v", f)
			}
			p.ask(3, true)
			if f, ok := p.next().(*http2.HeadersFrame); !ok || f.StreamID != 3 {
				t.Errorf("the next request: %v", f)
			}
		})
	}
}

func TestBodiesThatAreNotAsDeclaredAreReset(t *testing.T) {
	for name, data := range map[string]string{"longer": "123456", "shorter": "1234"} {
		t.Run(name, func(t *testing.T) {
			read := make(chan error, 1)
			p := raw(t, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, err := io.ReadAll(r.Body)
				read <- err
			})})
			p.ask(1, false, "content-length", "5")
			p.WriteData(1, true, []byte(data))
			if f, ok := p.next().(*http2.RSTStreamFrame); !ok || f.ErrCode != http2.ErrCodeProtocol {
				t.Errorf("answered with %v", f)
			}
			if err := <-read; err == nil {
				t.Error("the handler took the body for whole")
			}
		})
	}
}

// TestViolationsEndTheConnection with the code that RFC 9113 names.
func TestViolationsEndTheConnection(t *testing.T) {
	for name, c := range map[string]struct {
		code http2.ErrCode
		do   func(*rawPeer)
	}{
		"data on an idle stream":   {http2.ErrCodeProtocol, func(p *rawPeer) { p.WriteData(5, false, []byte("x")) }},
		"reset of an idle stream":  {http2.ErrCodeProtocol, func(p *rawPeer) { p.WriteRSTStream(5, http2.ErrCodeCancel) }},
		"window of an idle stream": {http2.ErrCodeProtocol, func(p *rawPeer) { p.WriteWindowUpdate(5, 1) }},
		"a stream of ours":         {http2.ErrCodeProtocol, func(p *rawPeer) { p.ask(2, true) }},
		"window overflow":          {http2.ErrCodeFlowControl, func(p *rawPeer) { p.WriteWindowUpdate(0, 1<<31-1); p.WriteWindowUpdate(0, 1<<31-1) }},
		"settings":                 {http2.ErrCodeFlowControl, func(p *rawPeer) { p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 31}) }},
		"push": {http2.ErrCodeProtocol, func(p *rawPeer) {
			p.WriteRawFrame(http2.FramePushPromise, http2.FlagPushPromiseEndHeaders, 1, make([]byte, 4))
		}},
		"frame size": {http2.ErrCodeFrameSize, func(p *rawPeer) { p.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, 20_000)) }},
		"ping size":  {http2.ErrCodeFrameSize, func(p *rawPeer) { p.WriteRawFrame(http2.FramePing, 0, 0, make([]byte, 7)) }},
		"headers in pieces": {http2.ErrCodeProtocol, func(p *rawPeer) {
			p.WriteRawFrame(http2.FrameHeaders, 0, 1, []byte{0x82})
			p.WritePing(false, [8]byte{})
		}},
		"hpack": {http2.ErrCodeCompression, func(p *rawPeer) {
			p.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, []byte{0xff, 0xff, 0xff, 0xff})
		}},
		"more than the window": {http2.ErrCodeFlowControl, func(p *rawPeer) {
			p.ask(1, false)
			for range 5 {
				p.WriteData(1, false, make([]byte, 16<<10))
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			stop := make(chan struct{})
			defer close(stop)
			p := raw(t, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-stop })})
			p.AllowIllegalWrites = true
			c.do(p)
			for {
				f := p.next()
				if _, ok := f.(*http2.RSTStreamFrame); ok {
					continue // a stream whose own window was overrun first
				}
				if f, ok := f.(*http2.GoAwayFrame); !ok || f.ErrCode != c.code {
					t.Fatalf("answered with %v, want GOAWAY %v", f, c.code)
				}
				break
			}
			p.nc.(*net.TCPConn).CloseWrite() // else the server waits a moment for it
			if _, err := p.ReadFrame(); err == nil {
				t.Error("the connection goes on")
			}
		})
	}
}

func TestWithoutAPrefaceNothingIsAnswered(t *testing.T) {
	client, server := pair(t)
	serve(t, server, Config{Handler: teapot})
	io.WriteString(client, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	b, _ := io.ReadAll(client)
	if bytes.Contains(b, []byte("HTTP")) {
		t.Errorf("answered %q", b)
	}
}

// TestWindowsAreKept has a peer that takes ten bytes at a time.
func TestWindowsAreKept(t *testing.T) {
	const size = 100
	p := raw(t, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write(make([]byte, size))
	})}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
	p.ask(1, true)
	if _, ok := p.next().(*http2.HeadersFrame); !ok {
		t.Fatal("the head waits for a window")
	}
	got, allowed := 0, 10
	for {
		f, ok := p.next().(*http2.DataFrame)
		if !ok {
			t.Fatalf("unexpected %v", f)
		}
		if got += len(f.Data()); got > allowed {
			t.Fatalf("%d bytes for a window of %d", got, allowed)
		}
		if f.StreamEnded() {
			break
		}
		if got == allowed {
			allowed += 10
			if got == 50 { // by SETTINGS, too
				p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 20})
			} else {
				p.WriteWindowUpdate(1, 10)
			}
		}
	}
	if got != size {
		t.Errorf("%d bytes of %d", got, size)
	}
}

func TestResetEndsTheHandler(t *testing.T) {
	wrote := make(chan error, 1)
	p := raw(t, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		_, err := r.Body.Read(make([]byte, 1))
		if err == nil {
			t.Error("the body goes on")
		}
		w.Write([]byte("x"))
		wrote <- http.NewResponseController(w).Flush()
	})})
	p.ask(1, false)
	if _, ok := p.next().(*http2.HeadersFrame); !ok {
		t.Fatal("no answer")
	}
	p.WriteRSTStream(1, http2.ErrCodeCancel)
	if err := <-wrote; err == nil {
		t.Error("a write after the reset succeeded")
	}
	p.WriteData(1, true, []byte("late")) // must do no harm
	p.ask(3, true)
	if f, ok := p.next().(*http2.HeadersFrame); !ok || f.StreamID != 3 {
		t.Errorf("the next request: %v", f)
	}
}

func TestGoAwayLetsRequestsEnd(t *testing.T) {
	client, server := pair(t)
	entered, release := make(chan struct{}), make(chan struct{})
	c := serve(t, server, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-release
		io.WriteString(w, "done")
	})})
	p := &rawPeer{t, http2.NewFramer(client, client), client}
	io.WriteString(client, http2.ClientPreface)
	p.WriteSettings()
	p.ask(1, true)
	<-entered
	c.GoAway()
	c.GoAway() // once is enough
	if f, ok := p.next().(*http2.GoAwayFrame); !ok || f.ErrCode != http2.ErrCodeNo || f.LastStreamID != 1 {
		t.Fatalf("got %v", f)
	}
	p.ask(3, true)
	if f, ok := p.next().(*http2.RSTStreamFrame); !ok || f.StreamID != 3 || f.ErrCode != http2.ErrCodeRefusedStream {
		t.Errorf("a request after GOAWAY: %v", f)
	}
	close(release)
	if f, ok := p.next().(*http2.HeadersFrame); !ok || f.StreamID != 1 {
		t.Errorf("got %v", f)
	}
	if f, ok := p.next().(*http2.DataFrame); !ok || string(f.Data()) != "done" || !f.StreamEnded() {
		t.Errorf("got %v", f)
	}
	if f, err := p.ReadFrame(); err == nil {
		t.Errorf("the connection goes on with %v", f)
	}
}

func TestPanicResetsTheStream(t *testing.T) {
	p := raw(t, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write([]byte("half"))
		panic(http.ErrAbortHandler)
	})})
	p.ask(1, true)
	if f, ok := p.next().(*http2.RSTStreamFrame); !ok || f.ErrCode != http2.ErrCodeInternal {
		t.Errorf("answered with %v", f)
	}
}
