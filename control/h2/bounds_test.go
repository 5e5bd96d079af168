package h2

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

func TestStreamsAreBounded(t *testing.T) {
	stop := make(chan struct{})
	p := raw(t, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-stop })})
	for i := range uint32(maxStreams) {
		p.ask(2*i+1, true)
	}
	// Streams that were reset count as long as their handlers run.
	p.WriteRSTStream(1, http2.ErrCodeCancel)
	p.ask(2*maxStreams+1, true)
	if f, ok := p.next().(*http2.RSTStreamFrame); !ok || f.StreamID != 2*maxStreams+1 || f.ErrCode != http2.ErrCodeRefusedStream {
		t.Errorf("one more was answered with %v", f)
	}
	close(stop)
}

func TestHeaderListsAreBounded(t *testing.T) {
	p := raw(t, Config{Handler: teapot})
	long := strings.Repeat("a", maxHeaders/3)
	p.ask(1, true, "x-one", long, "x-two", long, "x-three", long)
	f, ok := p.next().(*http2.HeadersFrame)
	if !ok {
		t.Fatalf("answered with %v", f)
	}
	var status string
	hpack.NewDecoder(4096, func(h hpack.HeaderField) {
		if h.Name == ":status" {
			status = h.Value
		}
	}).Write(f.HeaderBlockFragment())
	if status != "431" {
		t.Errorf("status %s", status)
	}
}

func TestFloodsEndTheConnection(t *testing.T) {
	for name, write := range map[string]func(*rawPeer, uint32) error{
		"ping":       func(p *rawPeer, _ uint32) error { return p.WritePing(false, [8]byte{}) },
		"settings":   func(p *rawPeer, _ uint32) error { return p.WriteSettings() },
		"priority":   func(p *rawPeer, _ uint32) error { return p.WritePriority(1, http2.PriorityParam{}) },
		"empty data": func(p *rawPeer, _ uint32) error { return p.WriteData(1, false, nil) },
		"malformed": func(p *rawPeer, i uint32) error {
			return p.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 3, BlockFragment: []byte{0x82}, EndStream: true, EndHeaders: true})
		},
	} {
		t.Run(name, func(t *testing.T) {
			left := 100
			stop := make(chan struct{})
			defer close(stop)
			p := raw(t, Config{Control: func() bool { left--; return left > 0 }, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-stop })})
			p.ask(1, false)
			go func() {
				for i := range uint32(200) {
					if write(p, i) != nil {
						return
					}
				}
			}()
			for {
				switch f := p.next().(type) {
				case *http2.PingFrame, *http2.RSTStreamFrame:
				case *http2.GoAwayFrame:
					if f.ErrCode != http2.ErrCodeEnhanceYourCalm {
						t.Errorf("GOAWAY says %v", f.ErrCode)
					}
					return
				default:
					t.Fatalf("unexpected %v", f)
				}
			}
		})
	}
}

// TestAnswersThatNobodyReadsAreBounded has a peer that pings and does not read.
func TestAnswersThatNobodyReadsAreBounded(t *testing.T) {
	client, server := net.Pipe()
	done := make(chan struct{})
	go func() {
		New(server, Config{Handler: teapot}).Serve()
		close(done)
	}()
	io.WriteString(client, http2.ClientPreface)
	fr := http2.NewFramer(client, nil)
	for fr.WriteSettings() == nil && fr.WritePing(false, [8]byte{}) == nil {
	}
	<-done
}

// TestAnswersDoNotWaitForEver for a peer that opens no window once their handlers have returned.
func TestAnswersDoNotWaitForEver(t *testing.T) {
	p := raw(t, Config{Stall: 10 * time.Millisecond, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "answer")
	})}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	p.ask(1, true)
	if _, ok := p.next().(*http2.HeadersFrame); !ok {
		t.Fatal("no head")
	}
	if f, ok := p.next().(*http2.RSTStreamFrame); !ok || f.StreamID != 1 {
		t.Errorf("got %v", f)
	}
}

func TestDeadlines(t *testing.T) {
	errs := make(chan error, 2)
	p := raw(t, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctl := http.NewResponseController(w)
		ctl.SetReadDeadline(time.Now().Add(time.Millisecond))
		_, err := r.Body.Read(make([]byte, 1))
		errs <- err
		// Set while the write waits for a window.
		time.AfterFunc(time.Millisecond, func() { ctl.SetWriteDeadline(time.Unix(1, 0)) })
		w.Write(make([]byte, 100))
		errs <- ctl.Flush()
	})}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
	p.ask(1, false)
	for _, what := range []string{"read", "write"} {
		if err := <-errs; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for {
		if f, ok := p.next().(*http2.RSTStreamFrame); ok {
			if f.ErrCode != http2.ErrCodeInternal {
				t.Errorf("reset with %v", f.ErrCode)
			}
			break
		}
	}
}

// TestUnreadBodyIsGivenUp: the answer is complete, and the connection's window does not shrink by what nobody read.
func TestUnreadBodyIsGivenUp(t *testing.T) {
	client, server := pair(t)
	serve(t, server, Config{Handler: teapot})
	cc := stock(t, client)
	for range 10 {
		res, _ := get(t, cc, request("POST", "/", bytes.NewReader(make([]byte, 60_000))))
		if res.StatusCode != http.StatusTeapot {
			t.Fatalf("status %d", res.StatusCode)
		}
	}
}

// FuzzServe: whatever a peer sends, the connection ends when the peer does, and nothing panics.
func FuzzServe(f *testing.F) {
	var b bytes.Buffer
	fr := http2.NewFramer(&b, nil)
	fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 5}, http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0})
	fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x83, 0x87, 0x84}, EndHeaders: true})
	fr.WriteData(1, false, []byte("some"))
	fr.WriteDataPadded(1, true, []byte("more"), make([]byte, 9))
	fr.WriteWindowUpdate(1, 100)
	fr.WritePing(false, [8]byte{})
	fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: []byte{0x82, 0x87, 0x84}, EndHeaders: true, EndStream: true})
	fr.WriteRSTStream(3, http2.ErrCodeCancel)
	fr.WriteGoAway(0, http2.ErrCodeNo, nil)
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, in []byte) {
		client, server := net.Pipe()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			New(server, Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.Copy(w, r.Body)
			})}).Serve()
		}()
		go io.Copy(io.Discard, client)
		io.WriteString(client, http2.ClientPreface)
		client.Write(in)
		client.Close()
		<-ended
	})
}
