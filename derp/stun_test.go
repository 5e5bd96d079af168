package derp

import (
	"encoding/binary"
	"hash/crc32"
	"net"
	"net/netip"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"tailscale.com/net/stun"
)

func TestSTUNAnswersOnBothPorts(t *testing.T) {
	s := start(t, Config{STUNListen: "127.0.0.1:0", STUNSecondListen: "[::]:0"})
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	pc.SetDeadline(time.Now().Add(10 * time.Second))
	self := pc.LocalAddr().(*net.UDPAddr).AddrPort()
	for _, n := range append(s.Region().Nodes, s.Companion(1000).Nodes...) {
		dst := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: n.STUNPort}
		tx := stun.NewTxID()
		// Garbage in front must change nothing.
		for _, b := range [][]byte{{}, []byte("garbage"), stun.Response(stun.NewTxID(), self), stun.Request(tx)} {
			if _, err := pc.WriteTo(b, dst); err != nil {
				t.Fatal(err)
			}
		}
		buf := make([]byte, 1500)
		read, from, err := pc.ReadFrom(buf)
		if err != nil {
			t.Fatalf("node %s: %v", n.Name, err)
		}
		gotTx, addr, err := stun.ParseResponse(buf[:read])
		if err != nil || gotTx != tx || addr != self {
			t.Errorf("node %s: %v %v %v, want %v %v", n.Name, gotTx, addr, err, tx, self)
		}
		if from.(*net.UDPAddr).Port != n.STUNPort {
			t.Errorf("node %s: answered from %v", n.Name, from)
		}
	}
	if got := s.Metrics(); got.STUNReplies != 2 || got.STUNMalformed != 6 || got.STUNPackets != 8 {
		t.Errorf("metrics: %+v", got)
	}
}

// TestSTUNAnswersFromTheAddressAsked asks at an address that is not the one
// which the route back prefers, on a socket that takes only its answers.
func TestSTUNAnswersFromTheAddressAsked(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("127.0.0.2 is an address of Linux machines only")
	}
	s := start(t, Config{STUNListen: "0.0.0.0:0", STUNSecondListen: ":0"})
	for _, n := range append(s.Region().Nodes, s.Companion(1000).Nodes...) {
		nc, err := net.Dial("udp", net.JoinHostPort("127.0.0.2", strconv.Itoa(n.STUNPort)))
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(10 * time.Second))
		tx := stun.NewTxID()
		if _, err := nc.Write(stun.Request(tx)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 1500)
		read, err := nc.Read(buf)
		if err != nil {
			t.Fatalf("node %s: %v", n.Name, err)
		}
		if got, addr, err := stun.ParseResponse(buf[:read]); err != nil || got != tx || addr.String() != nc.LocalAddr().String() {
			t.Errorf("node %s: %v %v %v, want %v", n.Name, got, addr, err, nc.LocalAddr())
		}
	}
}

// message is a STUN message with attributes given as type and value.
func message(kind uint16, attrs ...any) []byte {
	b := binary.BigEndian.AppendUint16(nil, kind)
	b = append(b, 0, 0, 0x21, 0x12, 0xa4, 0x42)
	b = append(b, "transaction!"...)
	for i := 0; i < len(attrs); i += 2 {
		v := attrs[i+1].(string)
		b = binary.BigEndian.AppendUint16(b, uint16(attrs[i].(int)))
		b = binary.BigEndian.AppendUint16(b, uint16(len(v)))
		b = append(b, v...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)-stunHeader))
	return b
}

func TestSTUNAnswersOnlyProperRequests(t *testing.T) {
	s := newSTUNResponder(time.Now)
	v4 := netip.MustParseAddrPort("192.0.2.1:1000")
	v6 := netip.MustParseAddrPort("[2001:db8::1]:1000")
	software := strings.Repeat("s", 20)
	plain := message(1, 0x8022, software)
	withFinger := func(crc uint32) []byte {
		b := message(1, 0x8022, software, stunAttrFinger, "\x00\x00\x00\x00")
		binary.BigEndian.PutUint32(b[len(b)-4:], crc)
		return b
	}
	body := withFinger(0)
	right := crc32.ChecksumIEEE(body[:len(body)-8]) ^ stunFingerXOR
	for _, tc := range []struct {
		name   string
		packet []byte
		src    netip.AddrPort
		ok     bool
	}{
		{"Tailscale", stun.Request(stun.NewTxID()), v4, true},
		{"Tailscale over IPv6", stun.Request(stun.NewTxID()), v6, true},
		{"RFC 5389", plain, v4, true},
		{"right fingerprint", withFinger(right), v4, true},
		{"wrong fingerprint", withFinger(right ^ 1), v4, false},
		{"fingerprint not last", message(1, stunAttrFinger, "1234", 0x8022, software), v4, false},
		{"would amplify", message(1), v6, false},
		{"source port 0", plain, netip.AddrPortFrom(v4.Addr(), 0), false},
		{"unknown required attribute", message(1, 0x0006, software), v4, false},
		{"indication", message(0x11, 0x8022, software), v4, false},
		{"success response", message(0x101, 0x8022, software), v4, false},
		{"error response", message(0x111, 0x8022, software), v4, false},
		{"other method", message(3, 0x8022, software), v4, false},
		{"cut", plain[:len(plain)-1], v4, false},
		{"longer than it says", append(plain[:len(plain):len(plain)], 0, 0, 0, 0), v4, false},
		{"too long", message(1, 0x8022, strings.Repeat("s", stunMaxRequestSize)), v4, false},
	} {
		reply := s.answer(tc.packet, tc.src)
		if (reply != nil) != tc.ok {
			t.Errorf("%s: reply %x, want one: %v", tc.name, reply, tc.ok)
		}
		if reply != nil && s.answer(reply, tc.src) != nil {
			t.Errorf("%s: a response was answered", tc.name)
		}
	}
	broken := message(1, 0x8022, software)
	binary.BigEndian.PutUint16(broken[stunHeader+2:], 0xfff0) // attribute longer than the packet
	if s.answer(broken, v4) != nil {
		t.Error("attribute beyond the end: answered")
	}
}

func TestSTUNLimitsRepliesPerSource(t *testing.T) {
	now := time.Unix(1e9, 0)
	s := newSTUNResponder(func() time.Time { return now })
	req := stun.Request(stun.NewTxID())
	count := func(addr string) (n int) {
		src := netip.AddrPortFrom(netip.MustParseAddr(addr), 1000)
		for range stunPerSource + 100 {
			if s.answer(req, src) != nil {
				n++
			}
		}
		return n
	}
	if n := count("192.0.2.1"); n != stunPerSource {
		t.Errorf("%d replies in one second, want %d", n, stunPerSource)
	}
	if n := count("192.0.2.200"); n != 0 {
		t.Errorf("same /24: %d replies more", n)
	}
	if n := count("192.0.3.1"); n != stunPerSource {
		t.Errorf("another /24: %d replies, want %d", n, stunPerSource)
	}
	if n := count("2001:db8:0:1::1"); n != stunPerSource {
		t.Errorf("IPv6: %d replies, want %d", n, stunPerSource)
	}
	if n := count("2001:db8:0:ff::1"); n != 0 {
		t.Errorf("same /56: %d replies more", n)
	}
	now = now.Add(time.Second)
	if n := count("192.0.2.1"); n != stunPerSource {
		t.Errorf("a second later: %d replies, want %d", n, stunPerSource)
	}
	if got := s.stats.limited.Load(); got == 0 {
		t.Error("nothing counted as limited")
	}
}

func FuzzSTUN(f *testing.F) {
	f.Add(stun.Request(stun.NewTxID()))
	f.Add(message(1, 0x8022, "tailnode"))
	f.Add(stun.Response(stun.NewTxID(), netip.MustParseAddrPort("192.0.2.1:1")))
	f.Add([]byte("garbage"))
	s := newSTUNResponder(time.Now)
	src := netip.MustParseAddrPort("[2001:db8::1]:1000")
	f.Fuzz(func(t *testing.T, b []byte) {
		reply := s.answer(b, src)
		if len(reply)*2 > len(b)*3 {
			t.Errorf("%d bytes for %d", len(reply), len(b))
		}
		if reply != nil && b[0]|b[1]&^1 != 0 {
			t.Errorf("answered message type %x", b[:2])
		}
	})
}

func BenchmarkSTUN(b *testing.B) {
	// A clock that moves keeps the limit out of the way.
	now := time.Unix(1e9, 0)
	s := newSTUNResponder(func() time.Time { now = now.Add(time.Second); return now })
	req, src := stun.Request(stun.NewTxID()), netip.MustParseAddrPort("192.0.2.1:1000")
	b.ReportAllocs()
	for b.Loop() {
		if s.answer(req, src) == nil {
			b.Fatal("no answer")
		}
	}
}
