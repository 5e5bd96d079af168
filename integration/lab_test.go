package integration

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// childEnv makes TestKilledTestLeavesNothing play the part of the test that is
// killed.
const childEnv = "SIGNALBOX_LAB_CHILD"

// TestKilledTestLeavesNothing kills a test process that has a lab, and checks
// that every process of the lab ends, even one that has left its session.
func TestKilledTestLeavesNothing(t *testing.T) {
	if os.Getenv(childEnv) != "" {
		holdLab(t)
		return
	}
	Open(t)
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledTestLeavesNothing$", "-test.v")
	cmd.Env = append(os.Environ(), childEnv+"=1")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pids []int
	var dir string
	var printed strings.Builder
	for lines := bufio.NewScanner(io.TeeReader(stdout, &printed)); lines.Scan(); {
		what, value, _ := strings.Cut(lines.Text(), "=")
		if what == "dir" {
			dir = value
		}
		if what == "pid" {
			pid, err := strconv.Atoi(value)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
		if lines.Text() == "ready" {
			break
		}
	}
	if len(pids) < 4 || dir == "" {
		cmd.Process.Kill()
		t.Fatalf("the test to be killed did not get ready: %s", printed.String())
	}
	ends := make([]unix.PollFd, len(pids))
	for i, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			t.Fatalf("process %d: %v", pid, err)
		}
		defer unix.Close(fd)
		ends[i] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	}
	cmd.Process.Kill()
	cmd.Wait()

	deadline := time.Now().Add(10 * time.Second)
	for i := range ends {
		left := max(time.Until(deadline), time.Millisecond)
		n, err := unix.Poll(ends[i:i+1], int(left.Milliseconds()))
		for err == unix.EINTR {
			n, err = unix.Poll(ends[i:i+1], int(left.Milliseconds()))
		}
		if n != 1 || err != nil {
			t.Errorf("process %d lives on: %v", pids[i], err)
		}
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", dir, err)
	}
}

// holdLab makes a lab with a host, prints its processes, and waits to be killed.
func holdLab(t *testing.T) {
	lab := Open(t)
	h := lab.Host(t, "victim")
	// One plain process and one that has left its session and its parent.
	for _, args := range [][]string{{"sleep", "600"}, {"sh", "-c", "setsid sleep 600 & wait"}} {
		p, err := h.launch(nil, newJournal(), newJournal(), args[0], args[1:]...)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("pid=%d\n", p.cmd.Process.Pid)
	}
	fmt.Printf("pid=%d\npid=%d\ndir=%s\nready\n", h.pid(), lab.core.pid(), lab.dir)
	io.Copy(io.Discard, os.Stdin)
}

// TestProgramsOfHostsAreGroupsOfTheirOwn: a stopped program in the test's own
// process group can get all of it hung up.
func TestProgramsOfHostsAreGroupsOfTheirOwn(t *testing.T) {
	h := Open(t).Host(t, "group")
	p, err := h.launch(nil, newJournal(), newJournal(), "sleep", "60")
	if err != nil {
		t.Fatal(err)
	}
	defer p.kill()
	if group, err := syscall.Getpgid(p.cmd.Process.Pid); err != nil || group != p.cmd.Process.Pid {
		t.Errorf("process %d is in the group %d, %v", p.cmd.Process.Pid, group, err)
	}
}

// TestHostsArePrivate checks that what a host changes does not reach the
// machine that runs the tests.
func TestHostsArePrivate(t *testing.T) {
	lab := Open(t)
	before, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	h := lab.Host(t, "private")
	if err := h.script("echo nameserver 192.0.2.1 > /etc/resolv.conf; echo x > /run/signalbox-lab-mark; echo x > /var/lib/signalbox-lab-mark"); err != nil {
		t.Fatal(err)
	}
	out, err := h.Run(t.Context(), nil, "hostname")
	if err != nil || strings.TrimSpace(out) != "private" {
		t.Errorf("host name inside is %q, %v", out, err)
	}
	after, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if string(after) != string(before) {
		t.Errorf("/etc/resolv.conf changed to %q", after)
	}
	if now, err := os.Hostname(); now != name || err != nil {
		t.Errorf("the machine's name is %q now, %v", now, err)
	}
	for _, mark := range []string{"/run/signalbox-lab-mark", "/var/lib/signalbox-lab-mark"} {
		if _, err := os.Stat(mark); !os.IsNotExist(err) {
			t.Errorf("%s: %v", mark, err)
		}
	}
}

// TestDropUDP checks by packets that a host without UDP has TCP and no UDP.
func TestDropUDP(t *testing.T) {
	lab := Open(t)
	a, b := lab.Host(t, "a"), lab.Host(t, "b")
	b.Echo(t, 7000)
	a.AwaitTCP(t, b.Addr, 7000, 5*time.Second)
	if err := udpExchange(t, a, b); err != nil {
		t.Fatalf("before: %v", err)
	}
	a.DropUDP(t)
	if err := udpExchange(t, a, b); err == nil {
		t.Error("a datagram passed")
	}
	a.AwaitTCP(t, b.Addr, 7000, 5*time.Second)
}

// udpExchange sends a datagram from a to b and waits briefly for it.
func udpExchange(t *testing.T, a, b *Host) error {
	t.Helper()
	conn, err := b.ListenUDP(":7001")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	out, err := a.Dial(t.Context(), "udp", b.Addr.String()+":7001")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := out.Write([]byte("hello")); err != nil {
		return err
	}
	conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	_, _, err = conn.ReadFrom(make([]byte, 16))
	return err
}
