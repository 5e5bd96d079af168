package derp

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/maphash"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"tailscale.com/net/stun"
)

// stunPerSource is how many replies a second one source gets. A source is an
// IPv4 /24 or an IPv6 /56: an office behind one NAT is one source.
const stunPerSource = 2000

const (
	stunHeader         = 20
	stunAttrFinger     = 0x8028
	stunFingerXOR      = 0x5354554e // RFC 5389 section 15.5
	stunRequiredBelow  = 0x8000     // attributes below must be understood, RFC 5389 section 15
	stunLimiterSlots   = 8192
	stunMaxRequestSize = 1280
)

// stunResponder answers STUN binding requests on any number of sockets.
type stunResponder struct {
	now   func() time.Time
	limit stunLimiter
	stats stunCounters
}

func newSTUNResponder(now func() time.Time) *stunResponder {
	return &stunResponder{now: now, limit: stunLimiter{seed: maphash.MakeSeed()}}
}

// listenUDP opens a STUN socket. The name of the network follows the address,
// so that 0.0.0.0 does not become a dual-stack socket.
func listenUDP(addr string) (*net.UDPConn, error) {
	network := "udp"
	if host, _, err := net.SplitHostPort(addr); err == nil {
		if ip, err := netip.ParseAddr(host); err == nil && ip.Is4() {
			network = "udp4"
		}
	}
	opened, err := new(net.ListenConfig).ListenPacket(context.Background(), network, addr)
	if err != nil {
		return nil, err
	}
	pc := opened.(*net.UDPConn)
	if pc.LocalAddr().(*net.UDPAddr).IP.IsUnspecified() {
		if err := noteLocalAddr(pc); err != nil {
			pc.Close()
			return nil, fmt.Errorf("listen on every address: %w", err)
		}
	}
	return pc, nil
}

// serve answers on pc until it is closed; the error then wraps net.ErrClosed.
func (s *stunResponder) serve(pc *net.UDPConn) error {
	buf, oob := make([]byte, stunMaxRequestSize+1), make([]byte, localAddrSpace)
	transient := 0
	for {
		n, noob, _, from, err := pc.ReadMsgUDPAddrPort(buf, oob)
		if err != nil {
			// An ICMP answer to an earlier reply can surface here; a socket
			// that only ever errs is dead.
			if _, ok := err.(net.Error); ok && !errors.Is(err, net.ErrClosed) && transient < 1000 {
				transient++
				continue
			}
			return err
		}
		transient = 0
		src := netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port())
		reply := s.answer(buf[:n], src)
		if reply == nil {
			continue
		}
		if _, _, err := pc.WriteMsgUDPAddrPort(reply, fromLocalAddr(oob[:noob]), from); err != nil {
			s.stats.writeErrors.Add(1)
		}
	}
}

// answer is the reply to packet, nil when it deserves none.
func (s *stunResponder) answer(packet []byte, src netip.AddrPort) []byte {
	s.stats.packets.Add(1)
	tx, err := parseBinding(packet)
	if err != nil || src.Port() == 0 {
		s.stats.malformed.Add(1)
		return nil
	}
	reply := stun.Response(tx, src)
	if reply == nil || len(reply)*2 > len(packet)*3 {
		// Replies never amplify: at most one and a half times the request.
		s.stats.malformed.Add(1)
		return nil
	}
	if !s.limit.allow(src.Addr(), s.now()) {
		s.stats.limited.Add(1)
		return nil
	}
	s.stats.replies.Add(1)
	return reply
}

// parseBinding accepts a binding request of RFC 5389 whose length is right,
// whose attributes are well formed and all optional, and whose fingerprint, if
// it has one, is last and right. Responses and indications have other types,
// so two servers cannot be made to talk to each other.
func parseBinding(b []byte) (tx stun.TxID, err error) {
	if !stun.Is(b) || len(b) > stunMaxRequestSize {
		return tx, stun.ErrNotSTUN
	}
	if binary.BigEndian.Uint16(b) != 0x0001 {
		return tx, stun.ErrNotBindingRequest
	}
	if n := int(binary.BigEndian.Uint16(b[2:])); n != len(b)-stunHeader || n%4 != 0 {
		return tx, stun.ErrMalformedAttrs
	}
	copy(tx[:], b[8:stunHeader])
	for at := stunHeader; at < len(b); {
		// The length is a multiple of four, so a header is always whole.
		kind := binary.BigEndian.Uint16(b[at:])
		size := int(binary.BigEndian.Uint16(b[at+2:]))
		next := at + 4 + (size+3)&^3
		if next > len(b) {
			return tx, stun.ErrMalformedAttrs
		}
		if kind < stunRequiredBelow {
			return tx, fmt.Errorf("attribute %#04x must be understood: %w", kind, stun.ErrMalformedAttrs)
		}
		if kind == stunAttrFinger {
			if size != 4 || next != len(b) {
				return tx, stun.ErrNoFingerprint
			}
			if binary.BigEndian.Uint32(b[at+4:]) != crc32.ChecksumIEEE(b[:at])^stunFingerXOR {
				return tx, stun.ErrWrongFingerprint
			}
		}
		at = next
	}
	return tx, nil
}

// stunLimiter counts replies per source and second in a table of fixed size.
type stunLimiter struct {
	seed maphash.Seed

	mu    sync.Mutex // guards slots
	slots [stunLimiterSlots]stunSlot
}

type stunSlot struct {
	source netip.Addr
	second int64
	count  int
}

func (l *stunLimiter) allow(a netip.Addr, now time.Time) bool {
	bits := 24
	if a.Is6() {
		bits = 56
	}
	p, err := a.Prefix(bits)
	if err != nil {
		return false
	}
	source, second := p.Addr(), now.Unix()

	l.mu.Lock()
	defer l.mu.Unlock()
	h := maphash.Comparable(l.seed, source)
	set := l.slots[(h%(stunLimiterSlots/ways))*ways:][:ways]
	victim := &set[rand.IntN(ways)]
	for i := range set {
		if set[i].source == source {
			victim = &set[i]
			break
		}
		if set[i].second != second {
			victim = &set[i]
		}
	}
	if victim.source != source || victim.second != second {
		*victim = stunSlot{source: source, second: second}
	}
	victim.count++
	return victim.count <= stunPerSource
}
