package noise

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"tailscale.com/control/controlbase"
)

// countingConn counts the system calls that leave the server.
type countingConn struct {
	net.Conn
	writes atomic.Int32
}

func (c *countingConn) Write(p []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(p)
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkMessage sends messages of 64 KiB to a client that takes the bytes
// off its socket and does nothing with them: cpu-us/op is the server's side
// and the kernel's.
func BenchmarkMessage(b *testing.B) {
	const size = 64 << 10
	for _, piece := range []int{4000, 8000, size} {
		b.Run(fmt.Sprintf("pieces of %d", piece), func(b *testing.B) {
			next := make(chan struct{})
			wrote := make(chan struct{})
			g := newRig(b, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				message := make([]byte, size)
				for range next {
					for p := message; len(p) > 0; {
						n := min(piece, len(p))
						w.Write(p[:n])
						p = p[n:]
					}
					w.(http.Flusher).Flush()
					wrote <- struct{}{}
				}
			}, nil)
			init, cont, err := controlbase.ClientDeferred(g.node(), g.priv.Public(), currentVersion)
			if err != nil {
				b.Fatal(err)
			}
			raw, _, err := g.post(base64.StdEncoding.EncodeToString(init))
			if err != nil {
				b.Fatal(err)
			}
			nc, err := cont(b.Context(), raw)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := nc.Write(mapRequest(1<<31 - 1)); err != nil {
				b.Fatal(err)
			}
			go func() {
				buf := make([]byte, 64<<10)
				for {
					if _, err := raw.(*readAhead).Conn.Read(buf); err != nil {
						return
					}
				}
			}()
			b.SetBytes(size)
			b.ReportAllocs()
			before := cpuTime()
			for b.Loop() {
				next <- struct{}{}
				<-wrote
			}
			b.ReportMetric(float64((cpuTime()-before).Microseconds())/float64(b.N), "cpu-us/op")
			close(next)
			raw.Close()
		})
	}
}

// BenchmarkHandshake is connect, handshake, one request and close; cpu-us/op
// is both sides together.
func BenchmarkHandshake(b *testing.B) {
	g := newRig(b, echo, nil)
	k := g.node()
	before := cpuTime()
	for b.Loop() {
		nc, err := g.dial(k, currentVersion)
		if err != nil {
			b.Fatal(err)
		}
		if err := bareRequest(nc, "/machine/whoami"); err != nil {
			b.Fatal(err)
		}
		nc.Close()
	}
	b.ReportMetric(float64((cpuTime()-before).Microseconds())/float64(b.N), "cpu-us/op")
}

// BenchmarkIdleSession holds b.N sessions whose map stream has received 50 KB
// and reports what each costs, the client's end (a bare Noise connection, its
// socket and reading goroutine) included. Run it with -benchtime 2000x.
func BenchmarkIdleSession(b *testing.B) {
	message := make([]byte, 50_000)
	g := newRig(b, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		for p := message; len(p) > 0; {
			n := min(8000, len(p))
			w.Write(p[:n])
			p = p[n:]
		}
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}, nil)
	measure := func() (heap, stack uint64, goroutines int) {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc, m.StackInuse, runtime.NumGoroutine()
	}
	h0, s0, g0 := measure()
	conns := make([]net.Conn, 0, b.N)
	for range b.N {
		nc, err := g.dial(g.node(), currentVersion)
		if err != nil {
			b.Fatal(err)
		}
		conns = append(conns, nc)
		if err := readStream(nc, len(message)); err != nil {
			b.Fatal(err)
		}
	}
	h1, s1, g1 := measure()
	n := float64(b.N)
	b.ReportMetric(float64(h1-h0)/n/1024, "heap-KiB/session")
	b.ReportMetric(float64(s1-s0)/n/1024, "stack-KiB/session")
	b.ReportMetric(float64(g1-g0)/n, "goroutines/session")
	for _, c := range conns {
		c.Close()
	}
}

// mapRequest is a client's first flight: a map request of 1.5 KB and a window
// for the whole answer.
func mapRequest(window uint32) []byte {
	var block, out bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "https"},
		{Name: ":authority", Value: "unused"}, {Name: ":path", Value: "/machine/map"},
	} {
		enc.WriteField(f)
	}
	out.WriteString(http2.ClientPreface)
	fr := http2.NewFramer(&out, nil)
	fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window})
	fr.WriteWindowUpdate(0, window-65535)
	fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
	fr.WriteData(1, true, make([]byte, 1500))
	return out.Bytes()
}

// readStream posts a map request and reads size bytes of the answer.
func readStream(nc net.Conn, size int) error {
	if _, err := nc.Write(mapRequest(4 << 20)); err != nil {
		return err
	}
	var head [9]byte
	for got := 0; got < size; {
		if _, err := io.ReadFull(nc, head[:]); err != nil {
			return err
		}
		n := int(binary.BigEndian.Uint32(head[:]) >> 8)
		if _, err := io.CopyN(io.Discard, nc, int64(n)); err != nil {
			return err
		}
		if http2.FrameType(head[3]) == http2.FrameData {
			got += n
		}
	}
	return nil
}

func TestOneHTTP2FrameLeavesInOneWrite(t *testing.T) {
	var server atomic.Pointer[countingConn]
	catch := make(chan struct{})
	big := make([]byte, 4*maxPlaintext-9)
	g := newRigOn(t, func(c net.Conn) net.Conn {
		counted := &countingConn{Conn: c}
		server.Store(counted)
		return counted
	}, func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-catch
		w.Write(big)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}, nil)
	cc := g.client(g.node())
	req, _ := http.NewRequest("POST", "http://unused/machine/map", nil)
	res, err := cc.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	// All writes of the answer's head have happened; nothing writes until the
	// handler is let go.
	before := server.Load().writes.Load()
	close(catch)
	if _, err := io.ReadFull(res.Body, big); err != nil {
		t.Fatal(err)
	}
	if n := server.Load().writes.Load() - before; n != 1 {
		t.Errorf("a full frame took %d writes", n)
	}
}

// A batch has room for what is a little more than a full frame, such as the head of its response.
func TestFrameAndHeadLeaveInOneWrite(t *testing.T) {
	client, _, out, _ := pair(t)
	counted := &countingConn{Conn: out.w.Conn}
	out.w.Conn = counted
	text := make([]byte, 4*maxPlaintext+300)
	go out.Write(text)
	if _, err := io.ReadFull(client, text); err != nil {
		t.Fatal(err)
	}
	if n := counted.writes.Load(); n != 1 {
		t.Errorf("%d bytes left in %d writes", len(text), n)
	}
}
