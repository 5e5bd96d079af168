package dbtest

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
)

// Postgres is a PostgreSQL server for the tests of one package. Its zero value
// is ready: the server starts at the first DSN call. TestMain must end it:
//
//	var postgres dbtest.Postgres
//
//	func TestMain(m *testing.M) {
//		code := m.Run()
//		postgres.Stop()
//		os.Exit(code)
//	}
type Postgres struct {
	start sync.Once
	err   error
	dir   string
	bin   string
	cred  *syscall.Credential // nil: this user
	dbs   atomic.Int64
}

// errNoPostgres is a machine without PostgreSQL's binaries.
var errNoPostgres = errors.New("PostgreSQL is not installed here (initdb and pg_ctl were not found in PATH nor in /usr/lib/postgresql)")

// DSN makes an empty database and returns its connection string. The test is
// skipped where PostgreSQL is not installed, unless SIGNALBOX_LAB=require says
// that this machine has all.
func (p *Postgres) DSN(t testing.TB) string {
	t.Helper()
	p.start.Do(func() { p.err = p.launch() })
	if errors.Is(p.err, errNoPostgres) && os.Getenv("SIGNALBOX_LAB") != "require" {
		t.Skip(p.err)
	}
	if p.err != nil {
		t.Fatal(p.err)
	}
	name := fmt.Sprintf("test%d", p.dbs.Add(1))
	if err := p.Exec("CREATE DATABASE " + name); err != nil {
		t.Fatal(err)
	}
	return p.dsn(name)
}

// Exec runs statements as the server's superuser.
func (p *Postgres) Exec(query string) error {
	ctx := context.Background()
	c, err := pgx.Connect(ctx, p.dsn("postgres"))
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	_, err = c.Exec(ctx, query)
	return err
}

func (p *Postgres) dsn(name string) string {
	q := url.Values{"host": {p.dir}, "user": {"postgres"}}
	return "postgres:///" + name + "?" + q.Encode()
}

// Stop ends the server and removes its files.
func (p *Postgres) Stop() {
	if p.dir == "" {
		return
	}
	p.Ctl("stop", "-m", "immediate")
	os.RemoveAll(p.dir)
}

// Ctl runs pg_ctl on the running server, as in Ctl("restart", "-m", "immediate").
func (p *Postgres) Ctl(args ...string) error {
	log := filepath.Join(p.dir, "log")
	args = append([]string{"-D", filepath.Join(p.dir, "data"), "-l", log, "-w", "-s"}, args...)
	cmd := p.command("pg_ctl", args...)
	// The server keeps the output open: a pipe would make pg_ctl seem to run on.
	if err := cmd.Run(); err != nil {
		text, _ := os.ReadFile(log)
		return fmt.Errorf("pg_ctl %s: %w\n%s", strings.Join(args, " "), err, text)
	}
	return nil
}

func (p *Postgres) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(p.bin, name), args...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C.UTF-8", "TZ=UTC"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.cred}
	return cmd
}

func (p *Postgres) launch() error {
	bin, err := findBinaries()
	if err != nil {
		return err
	}
	p.bin = bin
	if p.dir, err = os.MkdirTemp(roomyDir(), "sbpg"); err != nil {
		return err
	}
	if os.Geteuid() == 0 {
		// The server refuses to run as root.
		if p.cred, err = unprivileged(); err != nil {
			return err
		}
		if err := os.Chown(p.dir, int(p.cred.Uid), int(p.cred.Gid)); err != nil {
			return err
		}
	}
	data := filepath.Join(p.dir, "data")
	initdb := p.command("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
	if out, err := initdb.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, out)
	}
	return p.Ctl("start", "-o", "-c listen_addresses= -c unix_socket_directories="+p.dir+" -c max_connections=100 -c shared_buffers=32MB -c dynamic_shared_memory_type=mmap")
}

// roomyDir is where the server's files go: in memory when there is room, since
// making databases is slow on disks. A socket's path is at most 107 bytes, so
// the directory must be a short one, not testing's TempDir.
func roomyDir() string {
	var st syscall.Statfs_t
	const shm = "/dev/shm"
	if err := syscall.Statfs(shm, &st); err == nil && uint64(st.Bavail)*uint64(st.Bsize) > 2<<30 {
		return shm
	}
	return "/tmp"
}

func findBinaries() (string, error) {
	if path, err := exec.LookPath("initdb"); err == nil {
		return filepath.Dir(path), nil
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		return "", errNoPostgres
	}
	return filepath.Dir(found[len(found)-1]), nil
}

func unprivileged() (*syscall.Credential, error) {
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
