package noise

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"tailscale.com/control/controlbase"
	"tailscale.com/types/key"
)

func ownKey(t testing.TB, k key.MachinePrivate) *ecdh.PrivateKey {
	t.Helper()
	own, err := ecdh.X25519().NewPrivateKey(k.UntypedBytes())
	if err != nil {
		t.Fatal(err)
	}
	return own
}

// pair is both ends of a connection: the library's, and ours.
func pair(t testing.TB) (client *controlbase.Conn, in *recordReader, out *recordWriter, raw net.Conn) {
	t.Helper()
	server, machine := key.NewMachine(), key.NewMachine()
	init, finish, err := controlbase.ClientDeferred(machine, server.Public(), currentVersion)
	if err != nil {
		t.Fatal(err)
	}
	s, err := respond(ownKey(t, server), init)
	if err != nil {
		t.Fatal(err)
	}
	if s.machine != machine.Public() || s.version != currentVersion || len(s.response) != responseSize {
		t.Fatalf("machine %v, version %d, a response of %d bytes", s.machine, s.version, len(s.response))
	}
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	go b.Write(s.response)
	client, err = finish(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{Conn: b, stall: time.Minute}
	return client, &recordReader{w: w, aead: s.in}, &recordWriter{w: w, aead: s.out}, a
}

// Whatever sizes the ends write and read in, the bytes arrive.
func TestRecordsMeetTheLibrary(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	for range 20 {
		client, in, out, _ := pair(t)
		text := make([]byte, r.IntN(200_000))
		for i := range text {
			text[i] = byte(r.Uint32())
		}
		size := 1 + r.IntN(40_000)
		write := func(w io.Writer) {
			for rest := text; len(rest) > 0; {
				n := min(len(rest), size)
				if _, err := w.Write(rest[:n]); err != nil {
					t.Error(err)
					return
				}
				rest = rest[n:]
			}
		}
		for _, d := range []struct {
			from io.Writer
			to   io.Reader
		}{{client, in}, {out, client}} {
			go write(d.from)
			got := make([]byte, len(text))
			for n := 0; n < len(got); {
				k, err := d.to.Read(got[n:min(len(got), n+1+r.IntN(5000))])
				if err != nil {
					t.Fatal(err)
				}
				n += k
			}
			if !bytes.Equal(got, text) {
				t.Fatalf("%d bytes in writes of %d came out different", len(text), size)
			}
		}
	}
}

// A connection on which nothing comes holds no buffer.
func TestQuietReaderHoldsNoBuffer(t *testing.T) {
	client, in, _, _ := pair(t)
	for range 3 {
		go client.Write([]byte("hello"))
		if _, err := io.ReadFull(in, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
	}
	in.w.Conn.SetReadDeadline(time.Unix(1, 0)) // where it would wait
	if _, err := in.Read(make([]byte, 5)); err == nil {
		t.Fatal("something came")
	}
	if in.buf != nil {
		t.Error("the buffer was kept")
	}
	in.w.Conn.SetReadDeadline(time.Time{})
	go client.Write([]byte("again"))
	if _, err := io.ReadFull(in, make([]byte, 5)); err != nil {
		t.Errorf("after a deadline had passed: %v", err)
	}
}

// No bit of an initiation may be changed, and none of it is for another server.
func TestChangedInitiationsAreRefused(t *testing.T) {
	server := key.NewMachine()
	init, _, err := controlbase.ClientDeferred(key.NewMachine(), server.Public(), currentVersion)
	if err != nil {
		t.Fatal(err)
	}
	own := ownKey(t, server)
	for bit := range 8 * len(init) {
		changed := bytes.Clone(init)
		changed[bit/8] ^= 1 << (bit % 8)
		if _, err := respond(own, changed); err == nil {
			t.Errorf("bit %d of byte %d was changed", bit%8, bit/8)
		}
	}
	for _, b := range [][]byte{nil, init[:100], append(bytes.Clone(init), 0)} {
		if _, err := respond(own, b); err == nil {
			t.Errorf("%d bytes were taken", len(b))
		}
	}
	if _, err := respond(ownKey(t, key.NewMachine()), init); err == nil {
		t.Error("another server took it")
	}
	if _, err := respond(own, init); err != nil {
		t.Errorf("the unchanged one: %v", err)
	}
}

// The points of small order (RFC 7748, 6.1; https://cr.yp.to/ecdh.html#validate), with which every private key agrees on zero.
var lowOrder = [][32]byte{
	{},
	{0: 1},
	{0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00},
	{0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57},
}

func TestLowOrderKeysAreRefused(t *testing.T) {
	server := key.NewMachine()
	init, _, err := controlbase.ClientDeferred(key.NewMachine(), server.Public(), currentVersion)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range lowOrder {
		changed := bytes.Clone(init)
		copy(changed[5:], p[:])
		if _, err := respond(ownKey(t, server), changed); err == nil {
			t.Errorf("an ephemeral key of low order was taken: %x", p)
		}
		st := newState(currentVersion)
		public, err := ecdh.X25519().NewPublicKey(p[:])
		if err == nil && st.mixKey(ownKey(t, server), public) == nil {
			t.Errorf("a key of low order was mixed in: %x", p)
		}
	}
}

// A changed response tells the client that this is not the server.
func TestClientRefusesAnotherResponse(t *testing.T) {
	server := key.NewMachine()
	for _, at := range []int{3, 20, 34, 35, 50} {
		init, finish, err := controlbase.ClientDeferred(key.NewMachine(), server.Public(), currentVersion)
		if err != nil {
			t.Fatal(err)
		}
		s, err := respond(ownKey(t, server), init)
		if err != nil {
			t.Fatal(err)
		}
		s.response[at] ^= 1
		a, b := net.Pipe()
		go b.Write(s.response)
		if _, err := finish(context.Background(), a); err == nil {
			t.Errorf("byte %d was changed", at)
		}
		a.Close()
		b.Close()
	}
}

// After a record that is not the next one, nothing more is read.
func TestChangedRecordsEndTheConnection(t *testing.T) {
	for name, change := range map[string]func([]byte) []byte{
		"text changed":   func(b []byte) []byte { b[3] ^= 1; return b },
		"tag changed":    func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"another type":   func(b []byte) []byte { b[0] = 3; return b },
		"too long":       func(b []byte) []byte { b[1], b[2] = 0x0f, 0xfe; return b },
		"too short":      func(b []byte) []byte { b[2] = 15; return b },
		"sent twice":     func(b []byte) []byte { return append(b, b...) },
		"the next first": func(b []byte) []byte { n := len(b) / 2; return append(b[n:], b[:n]...) },
	} {
		client, in, _, _ := pair(t)
		records := func() []byte {
			var out []byte
			for range 2 {
				go client.Write([]byte("hello"))
				b := make([]byte, recordHeader+5+tagSize)
				if _, err := io.ReadFull(in.w.Conn, b); err != nil {
					t.Fatal(err)
				}
				out = append(out, b...)
			}
			return out
		}()
		if name == "sent twice" {
			records = records[:len(records)/2]
		}
		in.w.early = append(change(records), make([]byte, maxRecord)...)
		var err error
		n := 0
		for ; err == nil && n < 10; n++ {
			_, err = in.Read(make([]byte, 100))
		}
		if err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%s: read %d times, %v", name, n, err)
		}
		in.w.early = records
		if _, again := in.Read(make([]byte, 100)); again == nil {
			t.Errorf("%s: a read after the fault worked", name)
		}
	}
}

// A write that failed halfway leaves the peer out of step.
func TestNothingIsWrittenAfterAFailedWrite(t *testing.T) {
	_, _, out, raw := pair(t)
	raw.Close()
	_, first := out.Write([]byte("x"))
	if first == nil {
		t.Fatal("a write to a closed connection worked")
	}
	if _, err := out.Write([]byte("y")); err != first {
		t.Errorf("the next write: %v, want %v", err, first)
	}
}

// No nonce is used twice, and the greatest not at all.
func TestNoncesAreNotUsedUp(t *testing.T) {
	var n counter
	for i := range 8 {
		n[4+i] = 0xff
	}
	n[11] = 0xfd // two before the greatest
	if !n.next() || n != (counter{4: 0xff, 5: 0xff, 6: 0xff, 7: 0xff, 8: 0xff, 9: 0xff, 10: 0xff, 11: 0xfe}) {
		t.Errorf("after %x came %x", uint64(math.MaxUint64-2), n)
	}
	if n.next() {
		t.Errorf("after the last one came %x", n)
	}
}

func BenchmarkRespond(b *testing.B) {
	server := key.NewMachine()
	init, _, err := controlbase.ClientDeferred(key.NewMachine(), server.Public(), currentVersion)
	if err != nil {
		b.Fatal(err)
	}
	own := ownKey(b, server)
	b.Run("own", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := respond(own, init); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("library", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := controlbase.Server(context.Background(), discard{}, server, init); err != nil {
				b.Fatal(err)
			}
		}
	})
}

type discard struct{ net.Conn }

func (discard) Write(p []byte) (int, error) { return len(p), nil }
