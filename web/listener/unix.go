package listener

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// maxUnixPath is what fits into sockaddr_un with its final zero byte.
const maxUnixPath = 107

// ListenUnix opens a unix socket with the given file mode. A socket that a
// dead process left behind is removed; one that somebody answers is not, nor
// is anything that is not a socket. A directory that is missing is made, open
// to the owner and readable to the group.
func ListenUnix(path string, mode os.FileMode) (net.Listener, error) {
	if len(path) > maxUnixPath {
		return nil, fmt.Errorf("unix socket path %q has %d bytes, at most %d are possible", path, len(path), maxUnixPath)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, fmt.Errorf("directory of the unix socket: %w", err)
	}
	return listenUnix(path, mode)
}

func removeStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at unix socket: %w", err)
	}
	if fi.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%s exists and is not a socket", path)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
		return fmt.Errorf("unix socket %s: another process is listening: %w", path, syscall.EADDRINUSE)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("unix socket %s may be in use: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove stale unix socket: %w", err)
	}
	return nil
}

// listenUnix binds in a directory of our own and moves the socket into place
// with its mode set, so that it is never open to anybody else. Changing the
// umask instead would do the same to every other thread's files.
func listenUnix(path string, mode os.FileMode) (net.Listener, error) {
	dir, err := os.MkdirTemp(filepath.Dir(path), ".s")
	if err != nil {
		return nil, fmt.Errorf("unix socket: %w", err)
	}
	defer os.RemoveAll(dir)
	tmp := filepath.Join(dir, "s")
	bind := tmp
	if len(tmp) > maxUnixPath {
		// The final path fits, the longer one on the way there may not.
		// /proc gives a short name to an open directory.
		d, err := os.Open(dir)
		if err != nil {
			return nil, fmt.Errorf("unix socket: %w", err)
		}
		defer d.Close()
		bind = fmt.Sprintf("/proc/self/fd/%d/s", d.Fd())
	}
	l, err := net.Listen("unix", bind)
	if err != nil {
		return nil, err
	}
	ul := l.(*net.UnixListener)
	ul.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(tmp, mode), os.Rename(tmp, path)); err != nil {
		l.Close()
		return nil, fmt.Errorf("unix socket: %w", err)
	}
	return &unixListener{UnixListener: ul, path: path}, nil
}

// unixListener removes its socket when it closes, and answers for the path
// that it was moved to.
type unixListener struct {
	*net.UnixListener
	path string
}

func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

func (l *unixListener) Close() error {
	err := l.UnixListener.Close()
	if err == nil {
		os.Remove(l.path)
	}
	return err
}

type uidKey struct{}

// PeerUID is the user on the other side of a unix socket, from the context of
// a request that came through one.
func PeerUID(ctx context.Context) (uid uint32, ok bool) {
	uid, ok = ctx.Value(uidKey{}).(uint32)
	return uid, ok
}

func withPeerUID(ctx context.Context, c *net.UnixConn) context.Context {
	rc, err := c.SyscallConn()
	if err != nil {
		return ctx
	}
	var uid uint32
	var uerr error
	if err := rc.Control(func(fd uintptr) { uid, uerr = peerUID(fd) }); err != nil || uerr != nil {
		return ctx
	}
	return context.WithValue(ctx, uidKey{}, uid)
}
