// Package postgres runs a PostgreSQL server for tests that drive several
// signalbox servers on one database, and takes it away from them: all at once
// by stopping it, or one server alone by cutting its [Line].
//
// The server listens on a Unix socket in a directory of its own, so that tests
// need no port and hosts with their own network reach it through the shared
// file system.
package postgres

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
)

// User is the superuser, who needs no password.
const User = "postgres"

// Server is a PostgreSQL server with an empty database.
type Server struct {
	t        testing.TB
	database string
	dir      string
	bin      string
	cred     *syscall.Credential // nil: this user
}

// databases numbers them.
var databases atomic.Int64

// Start runs a server until the test ends. It skips the test where PostgreSQL's
// programs are not installed, unless SIGNALBOX_LAB=require says that this
// machine has all that tests need.
func Start(t testing.TB) *Server {
	t.Helper()
	bin, err := programs()
	if err != nil && os.Getenv("SIGNALBOX_LAB") != "require" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{t: t, bin: bin}
	if err := s.launch(); err != nil {
		t.Fatal(err)
	}
	return s
}

func programs() (string, error) {
	if path, err := exec.LookPath("initdb"); err == nil {
		return filepath.Dir(path), nil
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		return "", errors.New("PostgreSQL is not installed here: no initdb in PATH nor in /usr/lib/postgresql (Debian: apt-get install postgresql)")
	}
	return filepath.Dir(found[len(found)-1]), nil
}

func (s *Server) launch() (err error) {
	// A socket's path has at most 107 bytes, so testing's TempDir is too long.
	if s.dir, err = os.MkdirTemp(parent(), "sbpg"); err != nil {
		return err
	}
	s.t.Cleanup(func() {
		s.ctl("stop", "-m", "immediate")
		os.RemoveAll(s.dir)
	})
	// Hosts whose root is not this user's pass through it to the sockets.
	if err := os.Chmod(s.dir, 0o755); err != nil {
		return err
	}
	if os.Geteuid() == 0 {
		// PostgreSQL refuses to run as root.
		if s.cred, err = nobody(); err != nil {
			return err
		}
		if err := os.Chown(s.dir, int(s.cred.Uid), int(s.cred.Gid)); err != nil {
			return err
		}
	}
	initdb := s.command("initdb", "-D", s.data(), "-U", User, "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
	if out, err := initdb.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, out)
	}
	if err := s.start(); err != nil {
		return err
	}
	return s.create()
}

func (s *Server) create() error {
	s.database = fmt.Sprintf("signalbox%d", databases.Add(1))
	ctx := context.Background()
	c, err := pgx.Connect(ctx, s.dsn("postgres"))
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	_, err = c.Exec(ctx, "CREATE DATABASE "+s.database)
	return err
}

// NewDatabase is the same server with another empty database, for a subtest
// that does not stop it.
func (s *Server) NewDatabase(t testing.TB) *Server {
	t.Helper()
	other := *s
	other.t = t
	if err := other.create(); err != nil {
		t.Fatal(err)
	}
	return &other
}

// parent is in memory when there is room: fsync is slow on a busy disk.
func parent() string {
	var st syscall.Statfs_t
	const shm = "/dev/shm"
	if err := syscall.Statfs(shm, &st); err == nil && uint64(st.Bavail)*uint64(st.Bsize) > 1<<30 {
		return shm
	}
	return "/tmp"
}

func nobody() (*syscall.Credential, error) {
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
	}
	return nil, errors.New("no unprivileged user to run PostgreSQL as")
}

func (s *Server) data() string { return filepath.Join(s.dir, "data") }

func (s *Server) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, name), args...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C.UTF-8", "TZ=UTC"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred}
	return cmd
}

func (s *Server) ctl(args ...string) error {
	log := filepath.Join(s.dir, "log")
	args = append([]string{"-D", s.data(), "-l", log, "-w", "-s"}, args...)
	// Its output is not read: the server keeps it open, and pg_ctl would seem
	// to run on.
	if err := s.command("pg_ctl", args...).Run(); err != nil {
		text, _ := os.ReadFile(log)
		return fmt.Errorf("pg_ctl %s: %w\n%s", strings.Join(args, " "), err, text)
	}
	return nil
}

func (s *Server) start() error {
	return s.ctl("start", "-o", "-c listen_addresses= -c unix_socket_directories="+s.dir+
		" -c max_connections=200 -c shared_buffers=32MB -c dynamic_shared_memory_type=mmap")
}

// Start starts the server after Stop.
func (s *Server) Start() {
	s.t.Helper()
	if err := s.start(); err != nil {
		s.t.Fatal(err)
	}
}

// Stop ends the server and all its connections at once.
func (s *Server) Stop() {
	s.t.Helper()
	if err := s.ctl("stop", "-m", "fast"); err != nil {
		s.t.Fatal(err)
	}
}

// Socket is the path of the server's socket.
func (s *Server) Socket() string { return filepath.Join(s.dir, ".s.PGSQL.5432") }

// DSN is the connection string of the database, past all lines.
func (s *Server) DSN() string { return s.dsn(s.database) }

func (s *Server) dsn(database string) string {
	return fmt.Sprintf("host=%s user=%s dbname=%s", s.dir, User, database)
}
