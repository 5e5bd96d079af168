// Package integration drives the built signalbox binary and unmodified
// Tailscale clients of several versions on a small internet of network
// namespaces, and looks at real packets.
//
// A [Lab] is a switch (10.77.0.0/16) that hosts plug into. A [Host] is a
// network, mount, UTS and PID namespace held open by one process that reads a
// pipe from the test: when the test ends, even by SIGKILL, the pipe closes, the
// process ends, and the kernel takes every process, interface and mount of the
// host with it. A [Server] is a host that runs signalbox; a [Client] is a host
// that runs tailscaled. State lives on a tmpfs inside the host and disappears
// with it, but a process may be killed and started again on the same state.
//
// Nothing here knows signalbox from inside: tests speak through the command
// line, HTTP, the clients' LocalAPI and packets. Waiting for a client's state
// is done on its notification bus, and only packet probes are repeated.
//
// A test reads like this:
//
//	lab := integration.Open(t)
//	server := lab.Server(t, integration.ServerConfig{})
//	a := lab.Client(t, integration.ClientConfig{Version: "v1.80.3"})
//	b := lab.Client(t, integration.ClientConfig{Version: "v1.102.5", NAT: integration.EasyNAT})
//	a.Join(t, server.JoinLine(t))
//	b.Join(t, server.JoinLine(t))
//	a.AwaitPeers(t, 1)
//	a.PingDirect(t, b)
package integration

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
)

// network is the switch's address range. It is private on purpose: stock
// clients that were told an http:// URL come back after a disconnect only when
// its host is loopback or a private address.
var network = netip.MustParsePrefix("10.77.0.0/16")

// A Lab is a switch and the hosts on it. One serves a whole test process; its
// methods may be called by parallel
// tests.
type Lab struct {
	core *Host
	dir  string // shared by all hosts, gone with the lab

	mu    sync.Mutex // guards the following fields
	hosts int        // numbers hosts and their addresses
	ca    *authority
}

// requireEnv names the environment variable that turns a machine's inability to
// run the lab from a skip into a failure.
const requireEnv = "SIGNALBOX_LAB"

// Open returns the lab of this test process, which ends with the process. It
// skips the test with -short, and where the machine cannot do it (not Linux as
// root, no namespaces, missing tools), unless SIGNALBOX_LAB=require is set.
func Open(t testing.TB) *Lab {
	t.Helper()
	if testing.Short() {
		t.Skip("namespace tests do not run with -short")
	}
	l, err := sharedLab()
	if err != nil {
		skipOrFail(t, err)
	}
	return l
}

var sharedLab = sync.OnceValues(newLab)

func skipOrFail(t testing.TB, err error) {
	t.Helper()
	if os.Getenv(requireEnv) == "require" {
		t.Fatalf("this machine cannot run the namespace tests: %v", err)
	}
	t.Skipf("this machine cannot run the namespace tests: %v", err)
}

// missing says what the machine lacks that can be known before trying.
func missing() error {
	if os.Geteuid() != 0 {
		return errors.New("they need root for namespaces, veth pairs and /dev/net/tun")
	}
	for _, tool := range []string{"bash", "ip", "nft", "iptables", "ping", "mount", "getent"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("no %s (see .ci/install)", tool)
		}
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		return err
	}
	return nil
}

func newLab() (*Lab, error) {
	if err := missing(); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "signalbox-lab-")
	if err != nil {
		return nil, err
	}
	core, err := startHost("switch", dir)
	if err != nil {
		os.RemoveAll(dir)
		return nil, fmt.Errorf("start a host: %w", err)
	}
	l := &Lab{core: core, dir: dir, hosts: 1}
	err = core.script(fmt.Sprintf(`
		ip link add br0 type bridge
		ip addr add %s/%d dev br0
		ip link set br0 up
	`, l.gateway(), network.Bits()))
	if err != nil {
		core.close()
		return nil, fmt.Errorf("make a switch: %w", err)
	}
	return l, nil
}

// gateway is the switch's own address. Nothing listens there, so a query to it
// is refused at once.
func (l *Lab) gateway() netip.Addr { return network.Addr().Next() }

// Host plugs a new machine into the switch. It ends with the test.
func (l *Lab) Host(t testing.TB, name string) *Host {
	t.Helper()
	h, err := l.host(name)
	if err != nil {
		t.Fatalf("host %s: %v", name, err)
	}
	t.Cleanup(h.close)
	return h
}

func (l *Lab) host(name string) (*Host, error) {
	h, err := startHost(name, "")
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.hosts++
	n := l.hosts
	l.mu.Unlock()
	addr := network.Addr().As4()
	addr[2], addr[3] = byte(n>>8), byte(n)
	h.Addr = netip.AddrFrom4(addr)

	port := fmt.Sprintf("port%d", n)
	err = l.core.wire(port, h, "eth0")
	if err == nil {
		err = l.core.script(fmt.Sprintf("ip link set %s master br0 up", port))
	}
	if err == nil {
		err = h.script(fmt.Sprintf(`
			ip addr add %s/%d dev eth0
			ip link set eth0 up
			ip route add default via %s
			rm -f /etc/resolv.conf
			echo nameserver %[3]s > /etc/resolv.conf
		`, h.Addr, network.Bits(), l.gateway()))
	}
	if err != nil {
		h.close()
		return nil, fmt.Errorf("plug %s in: %w", name, err)
	}
	return h, nil
}

// NAT is what stands between a client and the switch.
type NAT int

const (
	// NoNAT puts the client on the switch itself.
	NoNAT NAT = iota
	// EasyNAT keeps one outer port for a socket, whoever it talks to.
	EasyNAT
	// HardNAT takes a new outer port for every destination.
	HardNAT
)

// hostBehind makes a machine on a network of its own, behind a router that
// translates addresses.
func (l *Lab) hostBehind(t testing.TB, name string, nat NAT) *Host {
	t.Helper()
	if nat == NoNAT {
		return l.Host(t, name)
	}
	router := l.Host(t, name+"-router")
	h, err := startHost(name, "")
	if err != nil {
		t.Fatalf("host %s: %v", name, err)
	}
	t.Cleanup(h.close)

	// The third octet keeps two NATed networks apart, since clients would
	// otherwise try each other's inner address and find a stranger there.
	outer := router.Addr.As4()
	lan := fmt.Sprintf("192.168.%d", outer[3])
	h.Addr = netip.MustParseAddr(lan + ".2")
	masquerade := "masquerade"
	if nat == HardNAT {
		masquerade = "masquerade random,fully-random"
	}
	err = errors.Join(
		router.wire("lan0", h, "eth0"),
		// Unsolicited datagrams are dropped without an answer: one that is let
		// in leaves a conntrack entry that takes the client's port away, and
		// the translation becomes a hard one.
		router.script(fmt.Sprintf(`
			ip addr add %s.1/24 dev lan0
			ip link set lan0 up
			echo 1 > /proc/sys/net/ipv4/ip_forward
			nft -f - <<-END
				table ip nat {
					chain post { type nat hook postrouting priority srcnat; oifname eth0 %s; }
				}
				table ip guard {
					chain inp { type filter hook input priority 0; iifname eth0 ct state new drop; }
					chain through { type filter hook forward priority 0; iifname eth0 ct state new drop; }
				}
			END
		`, lan, masquerade)),
		h.script(fmt.Sprintf(`
			ip addr add %[1]s.2/24 dev eth0
			ip link set eth0 up
			ip route add default via %[1]s.1
			rm -f /etc/resolv.conf
			echo nameserver %[1]s.1 > /etc/resolv.conf
		`, lan)),
	)
	if err != nil {
		t.Fatalf("network of %s: %v", name, err)
	}
	return h
}

// tail is the end of a log, for a failed test.
func tail(s string, lines int) string {
	all := strings.Split(strings.TrimRight(s, "\n"), "\n")
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return strings.Join(all, "\n")
}
