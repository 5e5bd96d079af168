package derp

import (
	"encoding/binary"
	"net"
	"net/netip"
	"syscall"
)

// localAddrSpace holds the control message that names the local address of a
// datagram.
const localAddrSpace = 128

// noteLocalAddr makes pc tell to which local address each datagram came. A
// socket bound to every address would else answer from whichever address the
// route prefers, and the client's NAT drops an answer from a stranger.
func noteLocalAddr(pc *net.UDPConn) error {
	raw, err := pc.SyscallConn()
	if err != nil {
		return err
	}
	var opt error
	err = raw.Control(func(fd uintptr) {
		if pc.LocalAddr().(*net.UDPAddr).IP.To4() != nil {
			opt = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_PKTINFO, 1)
		} else {
			opt = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IPV6, syscall.IPV6_RECVPKTINFO, 1)
		}
	})
	if err != nil {
		return err
	}
	return opt
}

// fromLocalAddr turns the control messages of a datagram into those of its
// answer, in place: the same address as source, but not the same interface,
// which the route chooses.
func fromLocalAddr(oob []byte) []byte {
	msgs, err := syscall.ParseSocketControlMessage(oob)
	if err != nil || len(msgs) != 1 {
		return nil
	}
	m := msgs[0]
	switch {
	case m.Header.Level == syscall.IPPROTO_IP && m.Header.Type == syscall.IP_PKTINFO && len(m.Data) >= syscall.SizeofInet4Pktinfo:
		binary.NativeEndian.PutUint32(m.Data, 0)
	case m.Header.Level == syscall.IPPROTO_IPV6 && m.Header.Type == syscall.IPV6_PKTINFO && len(m.Data) >= syscall.SizeofInet6Pktinfo:
		if !netip.AddrFrom16([16]byte(m.Data[:16])).IsLinkLocalUnicast() {
			binary.NativeEndian.PutUint32(m.Data[16:], 0)
		}
	default:
		return nil
	}
	return oob
}
