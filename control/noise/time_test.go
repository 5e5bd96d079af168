package noise

import (
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"tailscale.com/control/controlbase"
	"tailscale.com/types/key"
)

// pipe is a connection in memory, for tests in which time is not real.
func (g *rig) pipe(k key.MachinePrivate) (client net.Conn, finish controlbase.HandshakeContinuation) {
	g.t.Helper()
	init, cont, err := controlbase.ClientDeferred(k, g.priv.Public(), currentVersion)
	if err != nil {
		g.t.Fatal(err)
	}
	r := httptest.NewRequest("POST", "/ts2021", nil)
	c, response, no := g.handshake(r, base64.StdEncoding.EncodeToString(init))
	if no != nil {
		g.t.Fatal(no.text)
	}
	client, server := net.Pipe()
	go func() {
		if g.start(c, server, response, nil) {
			c.serve()
		}
	}()
	return client, cont
}

func (g *rig) pipeClient(k key.MachinePrivate) (http.RoundTripper, net.Conn) {
	g.t.Helper()
	c, cont := g.pipe(k)
	nc, err := cont(g.t.Context(), c)
	if err != nil {
		g.t.Fatal(err)
	}
	return newClientConn(g.t, nc), nc
}

// Message 1 can be recorded and sent again. Its sender cannot make a valid
// record, so it must never be found under the machine key, and must go soon.
func TestReplayedHandshakeGetsNoPlace(t *testing.T) {
	for _, send := range []string{"", "\x04\x00\x20" + strings.Repeat("x", 32), "\x04\x0f\xff" + strings.Repeat("x", 20)} {
		synctest.Test(t, func(t *testing.T) {
			g := newBareRig(t, echo, func(c *Config) {
				c.Identify = func(*http.Request) func() {
					return func() { t.Error("a replay counts as a node") }
				}
			})
			begun := time.Now()
			c, _ := g.pipe(g.node())
			go io.WriteString(c, send)
			if _, err := io.Copy(io.Discard, c); err != nil {
				t.Error(err)
			}
			if d := time.Since(begun); d > 10*time.Second {
				t.Errorf("closed after %v", d)
			}
			synctest.Wait()
			if len(g.machines)+len(g.live) != 0 {
				t.Error("a replay is still listed")
			}
			c.Close()
		})
	}
}

func TestRecordsWithoutAPrefaceEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newBareRig(t, echo, nil)
		c, cont := g.pipe(g.node())
		nc, err := cont(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		go io.WriteString(nc, http2.ClientPreface[:5])
		io.Copy(io.Discard, nc)
		if d := time.Since(begun); d > 11*time.Second {
			t.Errorf("closed after %v", d)
		}
		nc.Close()
	})
}

func TestBodyWithoutProgressEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		read := make(chan error, 1)
		g := newBareRig(t, func(w http.ResponseWriter, r *http.Request) {
			_, err := io.ReadAll(r.Body)
			read <- err
		}, nil)
		cc, nc := g.pipeClient(g.node())
		defer nc.Close()

		// Slow, but it goes on: 9 s between the pieces.
		pr, pw := io.Pipe()
		go func() {
			for range 5 {
				time.Sleep(9 * time.Second)
				pw.Write([]byte("piece"))
			}
			pw.Close()
		}()
		do(t, cc, "POST", "/machine/map", pr)
		if err := <-read; err != nil {
			t.Errorf("a slow body: %v", err)
		}

		pr, pw = io.Pipe()
		defer pw.Close()
		go pw.Write([]byte("begin"))
		begun := time.Now()
		do(t, cc, "POST", "/machine/map", pr)
		if err := <-read; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a stalled body: %v", err)
		}
		if d := time.Since(begun); d < 10*time.Second || d > 12*time.Second {
			t.Errorf("the stall was noticed after %v", d)
		}
		do(t, cc, "POST", "/machine/map", strings.NewReader("x"))
		if err := <-read; err != nil {
			t.Errorf("the next request of the connection: %v", err)
		}
	})
}

func TestStrangersIdleEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newBareRig(t, echo, nil)
		cc, nc := g.pipeClient(key.NewMachine())
		for range 3 {
			time.Sleep(29 * time.Second)
			if status, _ := do(t, cc, "GET", "/machine/whoami", nil); status != 200 {
				t.Errorf("whoami: %d", status)
			}
		}
		time.Sleep(31 * time.Second)
		synctest.Wait()
		if n := g.Counts().Open; n != 0 {
			t.Error("the connection is still open after 31 s without a request")
		}
		nc.Close()
	})
}

func TestStrangersLifeEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ended time.Time
		g := newBareRig(t, func(w http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			ended = time.Now()
		}, nil)
		begun := time.Now()
		cc, nc := g.pipeClient(key.NewMachine())
		req, _ := http.NewRequest("POST", "http://unused/machine/register", nil)
		if _, err := cc.RoundTrip(req); err == nil {
			t.Error("the long poll was answered")
		}
		synctest.Wait()
		// A follow-up long poll outlives the idle time, but not the life.
		if d := ended.Sub(begun); d < 14*time.Minute || d > 16*time.Minute {
			t.Errorf("the long poll ended after %v", d)
		}
		nc.Close()
	})
}

// The follow-up of a registration is answered on the connection on which it
// waited, and the map stream follows on it.
func TestStrangerThatGetsANodeKeepsItsConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		identified := 0
		g := newBareRig(t, func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(40 * time.Minute)
		}, func(c *Config) {
			c.Identify = func(*http.Request) func() { return func() { identified++ } }
		})
		k := key.NewMachine()
		cc, nc := g.pipeClient(k)
		time.AfterFunc(10*time.Minute, func() { g.known.Store(k.Public(), true) })
		if status, _ := do(t, cc, "POST", "/machine/register", nil); status != 200 {
			t.Errorf("long poll: %d", status)
		}
		time.Sleep(time.Hour)
		if status, _ := do(t, cc, "POST", "/machine/map", nil); status != 200 {
			t.Errorf("after an idle hour: %d", status)
		}
		if identified != 1 {
			t.Errorf("identified %d times", identified)
		}

		// The node is deleted: the limits are back.
		g.known.Delete(k.Public())
		if status, _ := do(t, cc, "GET", "/machine/id-token", nil); status != http.StatusUnauthorized {
			t.Errorf("after the deletion: %d", status)
		}
		time.Sleep(31 * time.Second)
		synctest.Wait()
		if n := g.Counts().Open; n != 0 {
			t.Error("the idle connection of a deleted node stays open")
		}
		nc.Close()
	})
}

func TestWriteWithoutProgressEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan struct{})
		g := newBareRig(t, func(w http.ResponseWriter, r *http.Request) {
			defer close(ended)
			for {
				if _, err := w.Write(make([]byte, 8000)); err != nil {
					return
				}
			}
		}, nil)
		c, cont := g.pipe(g.node())
		nc, err := cont(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		go nc.Write(mapRequest(1 << 30))
		// Some of the answer is taken, the rest never.
		io.CopyN(io.Discard, nc, 100_000)
		<-ended
		if d := time.Since(begun); d != 30*time.Second {
			t.Errorf("closed after %v, want 30 s", d)
		}
		nc.Close()
	})
}

func TestGateRefusesWhenItsQueueIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newBareRig(t, echo, func(c *Config) {
			c.Limits.Handshakes = 1
			c.Limits.HandshakeQueue = 2
		})
		g.gate.Acquire(t.Context(), 1)
		begun := time.Now()
		waits := make(chan time.Duration, 2)
		for range 2 {
			go func() {
				if no := g.enter(t.Context()); no == nil || no.status != http.StatusServiceUnavailable || no.retry == 0 {
					t.Errorf("refusal %+v", no)
				}
				waits <- time.Since(begun)
			}()
		}
		synctest.Wait()
		if no := g.enter(t.Context()); no == nil || time.Since(begun) > 0 {
			t.Errorf("the third was not refused at once: %+v", no)
		}
		for range 2 {
			if d := <-waits; d != 10*time.Second {
				t.Errorf("waited %v, want 10 s", d)
			}
		}
		go func() { time.Sleep(5 * time.Second); g.gate.Release(1) }()
		if no := g.enter(t.Context()); no != nil {
			t.Errorf("a place became free: %+v", no)
		}
	})
}
