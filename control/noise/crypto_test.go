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

// initiate is how a machine begins, by the library.
func initiate(t testing.TB, machine, server key.MachinePrivate) ([]byte, controlbase.HandshakeContinuation) {
	t.Helper()
	init, finish, err := controlbase.ClientDeferred(machine, server.Public(), currentVersion)
	if err != nil {
		t.Fatal(err)
	}
	return init, finish
}

// pair is both ends of a connection: the library's, and ours.
func pair(t testing.TB) (client *controlbase.Conn, in *recordReader, out *recordWriter, raw net.Conn) {
	t.Helper()
	server, machine := key.NewMachine(), key.NewMachine()
	init, finish := initiate(t, machine, server)
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
	init, _ := initiate(t, key.NewMachine(), server)
	own := ownKey(t, server)
	for bit := range 8 * len(init) {
		if bit/8 >= 2 && bit/8 < initiationHeader {
			continue // type and length, which decodeInitiation looks at
		}
		changed := bytes.Clone(init)
		changed[bit/8] ^= 1 << (bit % 8)
		if _, err := respond(own, changed); err == nil {
			t.Errorf("bit %d of byte %d was changed", bit%8, bit/8)
		}
	}
	if _, err := respond(ownKey(t, key.NewMachine()), init); err == nil {
		t.Error("another server took it")
	}
	if _, err := respond(own, init); err != nil {
		t.Errorf("the unchanged one: %v", err)
	}
}

// Encodings of points of small order (https://cr.yp.to/ecdh.html#validate), with which every private key agrees on zero.
var lowOrder = [][32]byte{
	{},
	{0: 1},
	{0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00},
	{0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57},
}

func TestLowOrderKeysAreRefused(t *testing.T) {
	for _, p := range lowOrder {
		if _, err := newState(currentVersion).mixKey(ownKey(t, key.NewMachine()), p[:]); err == nil {
			t.Errorf("a key of low order was mixed in: %x", p)
		}
	}
}

// A changed response tells the client that this is not the server.
func TestClientRefusesAnotherResponse(t *testing.T) {
	server := key.NewMachine()
	for _, at := range []int{3, 20, 34, 35, 50} {
		init, finish := initiate(t, key.NewMachine(), server)
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

// sealed are the records that the client writes for each text.
func sealed(t *testing.T, client io.Writer, in *recordReader, texts ...string) (out [][]byte) {
	t.Helper()
	for _, text := range texts {
		go io.WriteString(client, text)
		b := make([]byte, recordHeader+len(text)+tagSize)
		if _, err := io.ReadFull(in.w.Conn, b); err != nil {
			t.Fatal(err)
		}
		out = append(out, b)
	}
	return out
}

// Of records that are not as the client wrote them, in its order, nothing is read, and nothing after them.
func TestChangedRecordsEndTheConnection(t *testing.T) {
	flip := func(at int) func([][]byte) {
		return func(r [][]byte) { r[1][(at+len(r[1]))%len(r[1])] ^= 1 }
	}
	for name, c := range map[string]struct {
		change func(r [][]byte) // of five records
		read   int              // records that come before
	}{
		"unchanged":                 {func([][]byte) {}, 5},
		"text":                      {flip(recordHeader), 1},
		"tag":                       {flip(-1), 1},
		"type":                      {flip(0), 1},
		"longer than any record":    {func(r [][]byte) { r[1][1], r[1][2] = 0x0f, 0xfe }, 1},
		"shorter than a tag":        {func(r [][]byte) { r[1] = append(r[1][:2:2], 15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0) }, 1},
		"sent twice":                {func(r [][]byte) { r[1] = r[0] }, 1},
		"left out":                  {func(r [][]byte) { r[1], r[2], r[3] = r[2], r[3], r[4] }, 1},
		"in another order":          {func(r [][]byte) { r[1], r[2] = r[2], r[1] }, 1},
		"the first of all, changed": {func(r [][]byte) { r[0][4] ^= 0x80 }, 0},
		"the last, changed":         {func(r [][]byte) { r[4][4] ^= 0x80 }, 4},
		"cut to nothing":            {func(r [][]byte) { r[0][2] = tagSize }, 0},
	} {
		client, in, _, _ := pair(t)
		records := sealed(t, client, in, "one", "two", "three", "four", "five")
		c.change(records)
		in.w.early = bytes.Join(records, nil)
		in.w.Conn.Close()
		read := 0
		var err error
		for b := make([]byte, 100); ; read++ {
			if _, err = in.Read(b); err != nil {
				break
			}
		}
		if read != c.read {
			t.Errorf("%s: %d records were read, want %d", name, read, c.read)
		}
		if _, again := in.Read(make([]byte, 100)); read < 5 && (again != err || in.err != err) {
			t.Errorf("%s: the next read says %v, want %v", name, again, err)
		}
	}
}

// faltering takes a part of its first write, and all of the others.
type faltering struct {
	net.Conn
	writes int
}

func (f *faltering) SetWriteDeadline(time.Time) error { return nil }

func (f *faltering) Write(p []byte) (int, error) {
	if f.writes++; f.writes == 1 {
		return len(p) / 2, errors.New("too slow")
	}
	return len(p), nil
}

// A write that failed halfway leaves the peer out of step.
func TestNothingIsWrittenAfterAFailedWrite(t *testing.T) {
	_, _, out, _ := pair(t)
	wire := new(faltering)
	out.w.Conn = wire
	_, first := out.Write([]byte("x"))
	if first == nil {
		t.Fatal("half a write was taken for one")
	}
	if _, err := out.Write([]byte("y")); err != first || wire.writes != 1 {
		t.Errorf("the next write: %v after %d writes below, want %v and none", err, wire.writes, first)
	}
}

// At the end of the nonces both directions stop.
func TestConnectionEndsWithItsNonces(t *testing.T) {
	last := counter{4: 0xff, 5: 0xff, 6: 0xff, 7: 0xff, 8: 0xff, 9: 0xff, 10: 0xff, 11: 0xfe}
	client, in, out, _ := pair(t)
	go io.Copy(io.Discard, client)
	out.nonce = last
	for range 2 {
		if _, err := out.Write([]byte("x")); err != errExhausted {
			t.Errorf("a write with the last nonce: %v", err)
		}
	}
	in.nonce = last
	in.w.early = append([]byte{recordType, 0, 1 + tagSize}, in.aead.Seal(nil, last[:], []byte("x"), nil)...)
	if n, err := in.Read(make([]byte, 9)); n != 1 || err != nil {
		t.Errorf("the record with the last nonce: %d bytes, %v", n, err)
	}
	for range 2 {
		if _, err := in.Read(make([]byte, 9)); err != errExhausted {
			t.Errorf("a read after it: %v", err)
		}
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
	init, _ := initiate(b, key.NewMachine(), server)
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
