package integration

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A Host is a machine of the lab: its own network, mounts, host name and
// processes on the shared file system, with /etc, /run and /var/lib private.
type Host struct {
	Name string
	Addr netip.Addr // on the switch, or on the inner side of a router

	holder *exec.Cmd
	stdin  io.Closer // the host lives while this is open
	closed sync.Once
	spaces []space
}

// space is one of the host's namespaces.
type space struct {
	kind int // CLONE_NEW…
	file *os.File
}

// holdScript makes the host and then waits for its standard input to end. It
// is the first process of a PID namespace, so nothing that runs in the host
// outlives it.
//
// /etc needs an overlay because tailscaled rewrites resolv.conf, /var/lib is
// hidden because the client looks for settings in /var/lib/tailscale whatever
// its state directory is.
const holdScript = `
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/.etc/upper /run/.etc/work /run/home /run/lock
mount -t overlay -o lowerdir=/etc,upperdir=/run/.etc/upper,workdir=/run/.etc/work overlay /etc
mount -t tmpfs -o mode=755 tmpfs /var/lib
mount -t proc proc /proc
hostname "$1"
echo "127.0.0.1 localhost $1" > /etc/hosts
ip link set lo up
echo ready
cat > /dev/null
if [ -n "$2" ]; then rm -rf -- "$2"; fi
`

// startHost makes a host that has only a loopback interface. If ownedDir is not
// empty, it is removed when the host ends.
func startHost(name, ownedDir string) (*Host, error) {
	cmd := exec.Command("bash", "-c", holdScript, "host", name, ownedDir)
	cmd.Env = hostEnv()
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWNET | unix.CLONE_NEWPID,
		Setpgid:    true, // an interrupt at the terminal is the test's to handle
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	h := &Host{Name: name, holder: cmd, stdin: stdin}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || line != "ready\n" {
		h.close()
		return nil, fmt.Errorf("set the host up: %q %v %s", line, err, stderr.String())
	}
	for file, kind := range map[string]int{
		"net": unix.CLONE_NEWNET, "mnt": unix.CLONE_NEWNS, "uts": unix.CLONE_NEWUTS, "pid": unix.CLONE_NEWPID,
	} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", cmd.Process.Pid, file))
		if err != nil {
			h.close()
			return nil, err
		}
		h.spaces = append(h.spaces, space{kind, f})
	}
	return h, nil
}

// close ends the host and everything that runs in it.
func (h *Host) close() {
	h.closed.Do(func() {
		h.stdin.Close()
		h.holder.Wait()
		for _, s := range h.spaces {
			s.file.Close()
		}
	})
}

func (h *Host) pid() int { return h.holder.Process.Pid }

// hostEnv is the environment of every process in the lab: nothing that the
// developer or the CI machine has set, such as proxies, reaches it.
func hostEnv(extra ...string) []string {
	path := os.Getenv("PATH")
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		path += ":" + dir
	}
	return append([]string{"PATH=" + path, "HOME=/run/home", "LC_ALL=C"}, extra...)
}

// enter calls fn on a thread that is in the host's namespaces of the given
// kinds. The thread ends with the call: it is locked to its goroutine and never
// unlocked, so the runtime throws it away. fn must return, and must not end the
// goroutine as t.Fatal does.
func (h *Host) enter(kinds int, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- func() error {
			if kinds&unix.CLONE_NEWNS != 0 {
				// A thread that shares its root directory with others
				// cannot change its mounts.
				if err := unix.Unshare(unix.CLONE_FS); err != nil {
					return fmt.Errorf("unshare: %w", err)
				}
			}
			for _, s := range h.spaces {
				if kinds&s.kind == 0 {
					continue
				}
				if err := unix.Setns(int(s.file.Fd()), s.kind); err != nil {
					return fmt.Errorf("enter %s of %s: %w", s.file.Name(), h.Name, err)
				}
			}
			return fn()
		}()
	}()
	return <-done
}

// allSpaces are the namespaces of a host's process.
const allSpaces = unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWPID

// start starts cmd inside the host. It is a child of the test in every respect
// but its namespaces and its process group: tests stop programs, and the kernel
// hangs up a whole group with a stopped member when it thinks that nobody is
// left to let it go on, which the end of an orphan in some host can make it do.
func (h *Host) start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Setpgid = true
	return h.enter(allSpaces, cmd.Start)
}

// wire lays a cable from an interface of this host to one of another.
func (h *Host) wire(port string, other *Host, otherPort string) error {
	cmd := exec.Command("ip", "link", "add", port, "type", "veth", "peer", "name", otherPort,
		"netns", strconv.Itoa(other.pid()))
	cmd.Env = hostEnv()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	// Only the network is this host's: the other's process number has a
	// meaning in the test's own PID namespace.
	err := h.enter(unix.CLONE_NEWNET, cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("wire %s to %s: %w %s", h.Name, other.Name, err, stderr.String())
	}
	return nil
}

// command prepares a process of this host.
func (h *Host) command(ctx context.Context, env []string, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = hostEnv(env...)
	cmd.Dir = "/"
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// Run runs a program inside the host until it ends and returns what it printed.
// The error of one that failed holds its standard error.
func (h *Host) Run(ctx context.Context, env []string, name string, args ...string) (stdout string, err error) {
	return h.runInput(ctx, env, "", name, args...)
}

func (h *Host) runInput(ctx context.Context, env []string, input, name string, args ...string) (stdout string, err error) {
	cmd := h.command(ctx, env, name, args...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &errOut
	if err = h.start(cmd); err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		if ctx.Err() != nil {
			err = errors.Join(ctx.Err(), err)
		}
		err = fmt.Errorf("%s: %s %s: %w\n%s%s", h.Name, name, strings.Join(args, " "), err, out.String(), errOut.String())
	}
	return out.String(), err
}

// script runs shell lines inside the host; the first that fails ends it.
func (h *Host) script(lines string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var stripped strings.Builder
	for line := range strings.Lines(lines) {
		// Here-documents want their end mark at the start of a line.
		stripped.WriteString(strings.TrimLeft(line, "\t"))
	}
	_, err := h.runInput(ctx, nil, stripped.String(), "bash", "-eu", "-s")
	return err
}

// AddName names another machine in this host's /etc/hosts.
func (h *Host) AddName(t testing.TB, name string, addr netip.Addr) {
	t.Helper()
	if err := h.script(fmt.Sprintf("echo %s %s >> /etc/hosts", addr, name)); err != nil {
		t.Fatal(err)
	}
}

// DropUDP makes the host's network carry no UDP in either direction. What the
// host sends into its own tunnel is not touched.
func (h *Host) DropUDP(t testing.TB) {
	t.Helper()
	err := h.script(`
		nft -f - <<-END
			table inet noudp {
				chain out { type filter hook output priority -200; oifname eth0 meta l4proto udp drop; }
				chain inp { type filter hook input priority -200; iifname eth0 meta l4proto udp drop; }
			}
		END
	`)
	if err != nil {
		t.Fatal(err)
	}
}

// CountOutbound begins to count what the host itself opens to the outside:
// TCP connections and UDP exchanges whose first packet it sends. The returned
// function says how many packets that were.
func (h *Host) CountOutbound(t testing.TB) (opened func() int) {
	t.Helper()
	err := h.script(`
		nft -f - <<-END
			table inet outbound {
				counter opened { }
				chain out { type filter hook output priority 0; oifname != "lo" meta l4proto { tcp, udp } ct state new counter name opened; }
			}
		END
	`)
	if err != nil {
		t.Fatal(err)
	}
	return func() int {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		out, err := h.Run(ctx, nil, "nft", "list", "counter", "inet", "outbound", "opened")
		if err != nil {
			t.Fatal(err)
		}
		words := strings.Fields(out)
		i := slices.Index(words, "packets")
		if i < 0 || i+1 >= len(words) {
			t.Fatalf("nft printed %q", out)
		}
		n, err := strconv.Atoi(words[i+1])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
}

// Dial connects from inside the host. The address is a literal IP and a port.
func (h *Host) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = h.enter(unix.CLONE_NEWNET, func() (err error) {
		// The socket is made by this thread, since a literal address starts no
		// look-up in another goroutine; from then on any thread may use it.
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen accepts TCP connections inside the host.
func (h *Host) Listen(address string) (l net.Listener, err error) {
	err = h.enter(unix.CLONE_NEWNET, func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	return l, err
}

// ListenUDP receives datagrams inside the host.
func (h *Host) ListenUDP(address string) (c net.PacketConn, err error) {
	err = h.enter(unix.CLONE_NEWNET, func() (err error) {
		c, err = net.ListenPacket("udp", address)
		return err
	})
	return c, err
}
