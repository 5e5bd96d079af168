package listener

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func unixClient(path string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}
}

func TestUnixSocketTellsWhoCalls(t *testing.T) {
	path := filepath.Join(t.TempDir(), "box.sock")
	start(t, Config{Name: "unix_socket", Unix: path, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		uid, ok := PeerUID(r.Context())
		fmt.Fprint(w, uid, ok, ClientIP(r).IsValid())
	})})
	res, err := unixClient(path).Get("http://local/")
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(res.Body); string(b) != fmt.Sprint(os.Getuid(), true, false) {
		t.Errorf("got %s", b)
	}
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode().Perm() != 0o770 {
		t.Errorf("mode %v", fi.Mode())
	}
}

func TestUnixPathsUpToTheLimit(t *testing.T) {
	dir := t.TempDir()
	name := func(n int) string {
		return filepath.Join(dir, strings.Repeat("s", n-len(dir)-1))
	}
	l, err := ListenUnix(name(maxUnixPath), 0o600)
	if err != nil {
		t.Fatalf("a path of %d bytes: %v", maxUnixPath, err)
	}
	c, err := net.Dial("unix", name(maxUnixPath))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if fi, err := os.Stat(name(maxUnixPath)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", fi, err)
	}
	l.Close()
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	if _, err := ListenUnix(name(maxUnixPath+1), 0o600); err == nil || !strings.Contains(err.Error(), "108 bytes") {
		t.Errorf("a path of 108 bytes: %v", err)
	}
}

func TestUnixSocketOfTheDeadIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "box.sock")
	dead, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	dead.(*net.UnixListener).SetUnlinkOnClose(false)
	dead.Close()
	l, err := ListenUnix(path, 0o770)
	if err != nil {
		t.Fatalf("over a stale socket: %v", err)
	}
	defer l.Close()
	if _, err := ListenUnix(path, 0o770); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("over a live socket: %v", err)
	}
	if _, err := net.Dial("unix", path); err != nil {
		t.Errorf("the live socket is gone: %v", err)
	}
}

func TestUnixSocketNeverReplacesAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(path, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(path, 0o770); err == nil {
		t.Error("a file was replaced by a socket")
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "data" {
		t.Errorf("%q %v", b, err)
	}
}

func TestUnixSocketMakesItsDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run", "box")
	l, err := ListenUnix(filepath.Join(dir, "box.sock"), 0o660)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	fi, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if m := fi.Mode().Perm(); m&^0o750 != 0 || m&0o700 != 0o700 {
		t.Errorf("directory mode %v, want at most 0750", m)
	}
}
