package listener

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestListenErrorsNameTheirKey(t *testing.T) {
	_, addr := start(t, Config{Handler: ok})
	s, err := New(Config{Name: "metrics_listen_addr", Addr: addr, Handler: ok})
	if err != nil {
		t.Fatal(err)
	}
	err = s.Listen()
	if !errors.Is(err, syscall.EADDRINUSE) || !strings.HasPrefix(err.Error(), "metrics_listen_addr: ") {
		t.Errorf("got %v", err)
	}
}

func TestOptionalListenerGoesWithoutATakenPort(t *testing.T) {
	_, addr := start(t, Config{Handler: ok})
	var log logBuffer
	s, _ := start(t, Config{Addr: addr, Handler: ok, Optional: true, Log: log.logger()})
	if s.Addr() != nil {
		t.Errorf("listening on %v", s.Addr())
	}
	if !strings.Contains(log.String(), "not available") {
		t.Errorf("log: %q", log.String())
	}
}

func TestConfigWithoutHandlerIsRefused(t *testing.T) {
	if _, err := New(Config{Addr: ":0"}); err == nil {
		t.Error("a server without a handler would serve http.DefaultServeMux")
	}
	if _, err := New(Config{Handler: ok}); err == nil {
		t.Error("a server without an address was accepted")
	}
}

func TestConnectionsNoticeAVanishedPeer(t *testing.T) {
	l, err := ListenTCP(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dial(t, l.Addr().String())
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	rc, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]struct{ level, opt, want int }{
		"TCP_USER_TIMEOUT": {unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 60_000},
		"TCP_KEEPIDLE":     {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 30},
		"TCP_KEEPINTVL":    {unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 30},
		"TCP_KEEPCNT":      {unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3},
		"SO_KEEPALIVE":     {unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
	} {
		var got int
		rc.Control(func(fd uintptr) { got, err = unix.GetsockoptInt(int(fd), o.level, o.opt) })
		if err != nil || got != o.want {
			t.Errorf("%s = %d, %v, want %d", name, got, err, o.want)
		}
	}
}

func TestSlowHeadersEnd(t *testing.T) {
	_, addr := start(t, Config{Handler: ok, Limits: Limits{ReadHeader: 200 * time.Millisecond}})
	for _, head := range []string{"", "GET / HTTP/1.1\r\nHost: x\r\n"} {
		c := dial(t, addr)
		io.WriteString(c, head)
		begun := time.Now()
		untilClosed(t, c)
		if d := time.Since(begun); d > 8*time.Second { // the usual limit is 10 s
			t.Errorf("%q: closed after %v", head, d)
		}
	}
	// A byte now and then does not help.
	c := dial(t, addr)
	go func() {
		io.WriteString(c, "GET / HTTP/1.1\r\n")
		for i := 0; ; i++ {
			if _, err := fmt.Fprintf(c, "X-%d: y\r\n", i); err != nil {
				return
			}
			<-time.After(20 * time.Millisecond)
		}
	}()
	untilClosed(t, c)
}

func TestSlowBodiesEnd(t *testing.T) {
	got := make(chan error, 1)
	_, addr := start(t, Config{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, err := io.ReadAll(r.Body)
			got <- err
		}),
		Limits: Limits{Body: 200 * time.Millisecond, BodyMax: 300 * time.Millisecond},
	})
	c := dial(t, addr)
	io.WriteString(c, "POST /api/v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nbegin")
	err := <-got
	if ne, ok := err.(net.Error); !ok || !ne.Timeout() {
		t.Errorf("handler read %v, want a timeout", err)
	}
	untilClosed(t, c)
}

func TestIdleConnectionsEnd(t *testing.T) {
	_, addr := start(t, Config{Handler: ok, Limits: Limits{Idle: 200 * time.Millisecond}})
	c := dial(t, addr)
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if got := untilClosed(t, c); !strings.HasSuffix(got, "ok") {
		t.Errorf("got %q", got)
	}
}

func TestAnswersToADeafClientEnd(t *testing.T) {
	wrote := make(chan error, 1)
	_, addr := start(t, Config{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b := make([]byte, 1<<20)
			for {
				if _, err := w.Write(b); err != nil {
					wrote <- err
					return
				}
			}
		}),
		Limits: Limits{Write: 200 * time.Millisecond},
	})
	io.WriteString(dial(t, addr), "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if err := <-wrote; !errors.Is(err, context.DeadlineExceeded) && !strings.Contains(err.Error(), "timeout") {
		t.Errorf("write ended with %v", err)
	}
}

// A connection is used again after a pause longer than the time of an answer,
// and a stream may go on for longer than that.
func TestWriteTimeIsPerAnswer(t *testing.T) {
	next := make(chan struct{})
	_, addr := start(t, Config{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/stream" {
				io.WriteString(w, "ok")
				return
			}
			for range 3 {
				<-next
				Stream(w)
				io.WriteString(w, "line\n")
				w.(http.Flusher).Flush()
			}
		}),
		Limits: Limits{Write: 400 * time.Millisecond},
	})
	c := dial(t, addr)
	br := bufio.NewReader(c)
	for range 2 {
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, res.Body)
		<-time.After(600 * time.Millisecond)
	}
	io.WriteString(c, "GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
	go func() {
		for range 3 {
			next <- struct{}{}
			<-time.After(600 * time.Millisecond)
		}
	}()
	res, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(res.Body); err != nil || string(b) != "line\nline\nline\n" {
		t.Errorf("stream: %q %v", b, err)
	}
}

func TestHijackedConnectionsAreFree(t *testing.T) {
	const limit = 500 * time.Millisecond // a busy machine may stand still for a while before the connection is hijacked
	_, addr := start(t, Config{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c, rw, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			go func() {
				defer c.Close()
				line, _ := rw.ReadString('\n')
				io.WriteString(c, "got "+line)
			}()
		}),
		Limits: Limits{ReadHeader: limit, Idle: limit, Write: limit, Body: limit, BodyMax: limit},
	})
	c := dial(t, addr)
	io.WriteString(c, "POST /ts2021 HTTP/1.1\r\nHost: x\r\n\r\n")
	<-time.After(3 * limit)
	io.WriteString(c, "late\n")
	if got := untilClosed(t, c); got != "got late\n" {
		t.Errorf("got %q", got)
	}
}

func TestBadRequestsGetTheirStatus(t *testing.T) {
	_, addr := start(t, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.ReadAll(r.Body); err != nil {
			http.Error(w, "too large", http.StatusRequestEntityTooLarge)
			return
		}
		io.WriteString(w, "ok")
	})})
	const host = "Host: x\r\n"
	for name, tt := range map[string]struct {
		request string
		want    int
	}{
		"plain":                 {"GET / HTTP/1.1\r\n" + host + "\r\n", 200},
		"trace":                 {"TRACE / HTTP/1.1\r\n" + host + "\r\n", 405},
		"connect":               {"CONNECT x:443 HTTP/1.1\r\n" + host + "\r\n", 405},
		"made-up method":        {"BREW / HTTP/1.1\r\n" + host + "\r\n", 405},
		"long url":              {"GET /" + strings.Repeat("a", 9000) + " HTTP/1.1\r\n" + host + "\r\n", 414},
		"url at the limit":      {"GET /" + strings.Repeat("a", 8191) + " HTTP/1.1\r\n" + host + "\r\n", 200},
		"many headers":          {"GET / HTTP/1.1\r\n" + host + strings.Repeat("A: b\r\n", 201) + "\r\n", 431},
		"200 headers":           {"GET / HTTP/1.1\r\n" + host + strings.Repeat("A: b\r\n", 200) + "\r\n", 200},
		"huge header":           {"GET / HTTP/1.1\r\n" + host + "A: " + strings.Repeat("b", 40_000) + "\r\n\r\n", 431},
		"compressed":            {"POST /api/v1/x HTTP/1.1\r\n" + host + "Content-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx", 415},
		"body where none is":    {"POST /register/x HTTP/1.1\r\n" + host + "Content-Length: 1\r\n\r\nx", 413},
		"chunked where none is": {"POST /x HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", 413},
		"form":                  {"POST /register/x HTTP/1.1\r\n" + host + "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 1\r\n\r\nx", 200},
		"api body":              {"POST /api/v1/x HTTP/1.1\r\n" + host + "Content-Length: 1\r\n\r\nx", 200},
		"api body announced":    {"POST /api/v1/x HTTP/1.1\r\n" + host + "Content-Length: 262145\r\n\r\n", 413},
		"api body sent":         {"POST /api/v1/x HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n40001\r\n" + strings.Repeat("x", 0x40001) + "\r\n0\r\n\r\n", 413},
		"policy body":           {"PUT /api/v1/policy HTTP/1.1\r\n" + host + "Content-Length: 262145\r\n\r\n" + strings.Repeat("x", 262145), 200},
		"nul in header":         {"GET / HTTP/1.1\r\n" + host + "A: \x00\r\n\r\n", 400},
		"no host":               {"GET / HTTP/1.1\r\n\r\n", 400},
		"garbage":               {"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400},
		"two lengths":           {"POST /api/v1/x HTTP/1.1\r\n" + host + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400},
	} {
		c := dial(t, addr)
		go io.WriteString(c, tt.request)
		res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: "GET"})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if res.StatusCode != tt.want {
			t.Errorf("%s: %d, want %d", name, res.StatusCode, tt.want)
		}
		if res.StatusCode == 413 && !res.Close {
			t.Errorf("%s: the connection goes on after 413", name)
		}
		c.Close()
	}
}

func TestPanicsAreAnsweredWithoutText(t *testing.T) {
	var log logBuffer
	_, addr := start(t, Config{Log: log.logger(), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/half" {
			io.WriteString(w, "half")
			w.(http.Flusher).Flush()
		}
		panic("secret")
	})})
	res, err := http.Get("http://" + addr + "/")
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(res.Body); res.StatusCode != 500 || len(b) > 0 {
		t.Errorf("got %d %q", res.StatusCode, b)
	}
	if !strings.Contains(log.String(), "secret") {
		t.Error("the log does not say what happened")
	}
	res, err = http.Get("http://" + addr + "/half")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(res.Body); err == nil {
		t.Error("half an answer looks whole")
	}
}

func TestCompanionServesClientsAndRedirectsTheRest(t *testing.T) {
	base, _ := url.Parse("https://box.example:8443")
	_, addr := start(t, Config{Handler: Companion(ok, base)})
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	for _, tt := range []struct {
		method, path, location string
		want                   int
	}{
		{"GET", "/key?v=1", "", 200},
		{"POST", "/ts2021", "", 200},
		{"GET", "/generate_204", "", 200},
		{"GET", "/", "https://box.example:8443/", 301},
		{"GET", "/a%2fb?c=d", "https://box.example:8443/a%2fb?c=d", 301},
		{"GET", "//evil.example/x", "https://box.example:8443//evil.example/x", 301},
		{"GET", "/api/v1/node", "https://box.example:8443/api/v1/node", 301},
		{"POST", "/api/v1/node", "", 405},
	} {
		req, _ := http.NewRequest(tt.method, "http://"+addr+tt.path, nil)
		req.Host = "evil.example"
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode != tt.want || res.Header.Get("Location") != tt.location {
			t.Errorf("%s %s: %d %q", tt.method, tt.path, res.StatusCode, res.Header.Get("Location"))
		}
	}
}
