package fault

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/integration/sim"
)

// idle is how long the server may keep a connection that does not get on: ten
// seconds by its configuration, and some for a busy machine.
const idle = 14 * time.Second

// connect opens a TCP connection that the test closes.
func connect(t *testing.T, s *Server) net.Conn {
	t.Helper()
	c, err := new(net.Dialer).DialContext(t.Context(), "tcp", s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	return c
}

// closes reads until the server ends the connection, and fails when that takes
// longer than idle.
func closes(t *testing.T, what string, c net.Conn) string {
	t.Helper()
	begin := time.Now()
	c.SetReadDeadline(begin.Add(idle))
	said, err := io.ReadAll(io.LimitReader(c, 1<<20))
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
		t.Errorf("%s: the connection is open after %v", what, time.Since(begin))
	}
	return string(said)
}

// starved is how long an honest request may take while others misbehave. It
// is far above what the server needs, since tests share their machine, and
// below the ten seconds that a place taken by a slow client stays taken.
const starved = 8 * time.Second

// latency measures an honest request while something else happens.
func latency(t *testing.T, s *Server, stop <-chan struct{}) (worst time.Duration, n int) {
	t.Helper()
	for {
		begin := time.Now()
		code, _, err := Get(t.Context(), s.URL+"/key?v=142")
		if err != nil || code != 200 {
			t.Errorf("an honest /key: status %d, %v", code, err)
			return worst, n
		}
		worst, n = max(worst, time.Since(begin)), n+1
		select {
		case <-stop:
			return worst, n
		case <-time.After(20 * time.Millisecond): // as a probe does
		}
	}
}

func TestSlowloris(t *testing.T) {
	t.Parallel()
	s := StartServer(t)
	p := gather(t, s, 2)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var honest sync.WaitGroup
	honest.Go(func() {
		worst, n := latency(t, s, stop)
		t.Logf("%d honest requests, the slowest took %v", n, worst)
		if worst > starved && !raced {
			t.Errorf("an honest request took %v", worst)
		}
	})
	trickle := func(what, head, drop string) {
		wg.Go(func() {
			c, err := new(net.Dialer).DialContext(t.Context(), "tcp", s.Addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			go func() {
				_, err := io.WriteString(c, head)
				for err == nil && drop != "" {
					<-time.After(500 * time.Millisecond) // slowness is the attack
					_, err = io.WriteString(c, drop)
				}
			}()
			closes(t, what, c)
		})
	}
	for i := range 40 {
		trickle("silence", "", "")
		trickle("a header without end", "GET /key HTTP/1.1\r\nHost: x\r\n", fmt.Sprintf("X-%d: y\r\n", i))
		trickle("a request line without end", "GET /", "a")
		trickle("half an upgrade", "POST /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: tailscale-control-protocol\r\nX-Tailscale-Handshake: A", "A")
		trickle("a body without end", "POST /verify HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n{", " ")
		trickle("chunks without end", "POST /verify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", "1\r\n \r\n")
	}
	wg.Wait()
	close(stop)
	honest.Wait()
	p.unbroken(t)
}

// upgraded opens a connection and does the HTTP part of a handshake.
func upgraded(t *testing.T, s *Server, srv *sim.Server, initiation string) net.Conn {
	t.Helper()
	c := connect(t, s)
	if _, err := srv.Upgrade(c, initiation); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestTruncatedHandshakes(t *testing.T) {
	t.Parallel()
	s := StartServer(t)
	p := gather(t, s, 2)
	stranger := sim.NewMachine("stranger")
	initiation, _, err := p.srv.Initiation(stranger)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("stalled", func(t *testing.T) {
		for what, after := range map[string][]byte{
			"nothing after the upgrade":            nil,
			"half the head of a record":            {4, 0},
			"a record that is announced only":      {4, 0, 200},
			"half a record":                        append([]byte{4, 0, 200}, make([]byte, 100)...),
			"a record longer than the longest":     append([]byte{4, 0xff, 0xff}, make([]byte, 5000)...),
			"a record of an unknown type":          append([]byte{9, 0, 16}, make([]byte, 16)...),
			"a record that nobody can have sealed": append([]byte{4, 0, 64}, make([]byte, 64)...),
		} {
			t.Run(what, func(t *testing.T) {
				t.Parallel()
				c := upgraded(t, s, p.srv, initiation)
				c.Write(after)
				closes(t, what, c)
			})
		}
	})
	t.Run("cut", func(t *testing.T) {
		request := "POST /ts2021 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: upgrade\r\n" +
			"Upgrade: tailscale-control-protocol\r\nX-Tailscale-Handshake: " + initiation + "\r\n\r\n"
		for n := 1; n < len(request); n += 7 {
			c := connect(t, s)
			io.WriteString(c, request[:n])
			c.Close()
		}
		p.alive(t, "after-cuts")
	})
	t.Cleanup(func() { p.unbroken(t) })
}

func TestReplayedHandshake(t *testing.T) {
	t.Parallel()
	s := StartServer(t)
	p := gather(t, s, 2)
	victim := sim.NewMachine("victim")
	conn, err := p.srv.Dial(t.Context(), victim)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Register(t.Context(), p.key); err != nil {
		t.Fatal(err)
	}
	stream, err := conn.Poll(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// Who listens on the wire has the victim's first message, but not its keys.
	overheard, _, err := p.srv.Initiation(victim)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			c := upgraded(t, s, p.srv, overheard)
			// A record that an earlier connection might have carried.
			c.Write(append([]byte{4, 0, 40}, bytes.Repeat([]byte{7}, 40)...))
			closes(t, "a replay", c)
		})
	}
	wg.Wait()
	if err := stream.Err(); err != nil {
		t.Errorf("the victim's stream ended: %v", err)
	}
	if _, err := conn.Whoami(t.Context()); err != nil {
		t.Errorf("the victim's connection: %v", err)
	}
	p.alive(t, "after-replays")
}

func TestGarbageHandshake(t *testing.T) {
	t.Parallel()
	s := StartServer(t)
	p := gather(t, s, 2)
	random := rand.NewChaCha8([32]byte{1})
	noise := func(n int) string {
		b := make([]byte, n)
		random.Read(b)
		return base64.StdEncoding.EncodeToString(b)
	}
	framed := func() string { // right version, type and length; the rest is noise
		b := make([]byte, 101)
		random.Read(b)
		copy(b, []byte{0, 142, 1, 0, 96})
		return base64.StdEncoding.EncodeToString(b)
	}
	other := &sim.Server{Addr: s.Addr, Key: key.NewMachine().Public()}
	foreign, _, err := other.Initiation(sim.NewMachine("lost"))
	if err != nil {
		t.Fatal(err)
	}
	right, _, err := p.srv.Initiation(sim.NewMachine("right"))
	if err != nil {
		t.Fatal(err)
	}
	for what, initiation := range map[string]string{
		"empty": "", "short": noise(5), "one byte short": noise(100), "one byte long": noise(102), "random": noise(101),
		"framed noise": framed(), "for another server": foreign, "not base64": strings.Repeat("!", 136), "long": noise(8000),
		"right and then more": right + "AAAA", "another alphabet": strings.NewReplacer("+", "-", "/", "_").Replace(right) + "-",
		"all zero": base64.StdEncoding.EncodeToString(make([]byte, 101)),
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			c := connect(t, s)
			begin := time.Now()
			_, err := p.srv.Upgrade(c, initiation)
			if code := sim.Status(err); code < 400 || code > 499 {
				t.Errorf("status %d (%v), want a refusal that is the client's fault", code, err)
			}
			closes(t, what, c)
			if took := time.Since(begin); took > 5*time.Second {
				t.Errorf("the connection was kept for %v", took)
			}
		})
	}
	t.Run("many", func(t *testing.T) {
		t.Parallel()
		for range 500 {
			c, err := new(net.Dialer).DialContext(t.Context(), "tcp", s.Addr)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.srv.Upgrade(c, framed()); sim.Status(err) != 400 {
				t.Fatalf("garbage: %v", err)
			}
			c.Close()
		}
		p.alive(t, "after-garbage")
		p.unbroken(t)
	})
}
