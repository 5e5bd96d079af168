package db_test

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/db"
)

// registerUntilKilled is the child of TestSQLiteKilledAtAnyMoment: it registers
// nodes and prints each name when it is acknowledged.
func registerUntilKilled(t *testing.T, path string) {
	s := newSite(t, path, db.Config{})
	round := rand.Uint64()
	for i := 0; ; i++ {
		name := fmt.Sprintf("n%x-%d", round, i)
		if err := s.register(name); err != nil {
			fmt.Println("error:", err)
			return
		}
		fmt.Println(name)
	}
}

func TestSQLiteSecondProcessIsRefused(t *testing.T) {
	path := sqliteFile(t)
	if os.Getenv("DB_TEST_HOLD") != "" {
		// The child of the test below: hold the database until killed.
		newSite(t, os.Getenv("DB_TEST_HOLD"), db.Config{})
		fmt.Println("holding")
		select {}
	}
	child := exec.Command(os.Args[0], "-test.run=^TestSQLiteSecondProcessIsRefused$")
	child.Env = append(os.Environ(), "DB_TEST_HOLD="+path)
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 7)
	if _, err := out.Read(line); err != nil || string(line) != "holding" {
		t.Fatalf("child says %q, %v", line, err)
	}
	if s, err := db.Open(t.Context(), db.Config{Path: path}); err == nil {
		s.Close()
		t.Error("a database that another process has was opened")
	} else if !strings.Contains(err.Error(), "another process") {
		t.Error(err)
	}
	child.Process.Kill()
	child.Wait()
	s := newSite(t, path, db.Config{})
	if err := s.register("after"); err != nil {
		t.Errorf("after the holder was killed: %v", err)
	}
}

func TestSQLiteDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil && os.Getenv("SIGNALBOX_LAB") == "require" {
		t.Fatalf("mount a small tmpfs: %v", err)
	} else if err != nil {
		t.Skipf("mount a small tmpfs: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	s := newSite(t, filepath.Join(dir, "signalbox.db"), db.Config{})
	if err := s.register("before"); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(dir, "filler")
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	for block := make([]byte, 4096); err == nil; {
		_, err = f.Write(block)
	}
	f.Close()
	acknowledged := 1
	for i := 0; err == nil || !errors.Is(err, db.ErrUnavailable); i++ {
		if i > 2000 {
			t.Fatal("2,000 nodes fit on a full disk")
		}
		if err = s.register(fmt.Sprintf("full%d", i)); err == nil {
			acknowledged++
		}
	}
	if errors.Is(err, db.ErrCorrupt) {
		t.Errorf("a full disk is called damage: %v", err)
	}
	for range 5 {
		if err := s.register("refused"); err == nil {
			acknowledged++
		} else if !errors.Is(err, db.ErrUnavailable) {
			t.Errorf("on a full disk: %v, want ErrUnavailable", err)
		}
	}
	if err := s.Healthy(t.Context()); !errors.Is(err, db.ErrUnavailable) {
		t.Errorf("health on a full disk: %v", err)
	}
	if n := s.nodes(t); n != acknowledged {
		t.Errorf("reads see %d nodes, %d were acknowledged", n, acknowledged)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if err := s.Healthy(t.Context()); err != nil {
		t.Errorf("after room was made: %v", err)
	}
	if err := s.register("after"); err != nil {
		t.Errorf("after room was made: %v", err)
	}
	if n := s.nodes(t); n != acknowledged+1 {
		t.Errorf("%d nodes, want %d", n, acknowledged+1)
	}
	err = s.View(t.Context(), func(r *db.Reader) error {
		n, err := r.VerifyAudit()
		if n != int64(acknowledged+1) {
			t.Errorf("%d audit events, want %d", n, acknowledged+1)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// A process that is killed at any moment loses nothing that it acknowledged and
// leaves nothing half-written.
func TestSQLiteKilledAtAnyMoment(t *testing.T) {
	if path := os.Getenv("DB_TEST_REGISTER"); path != "" {
		registerUntilKilled(t, path)
		return
	}
	path := sqliteFile(t)
	acknowledged := map[string]bool{}
	for round := range 6 {
		child := exec.Command(os.Args[0], "-test.run=^TestSQLiteKilledAtAnyMoment$")
		child.Env = append(os.Environ(), "DB_TEST_REGISTER="+path)
		child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		killAfter := 1 + rand.IntN(40)
		for n := 0; lines.Scan(); n++ {
			if strings.HasPrefix(lines.Text(), "error:") {
				t.Fatal(lines.Text())
			}
			acknowledged[lines.Text()] = true
			if n == killAfter {
				// It goes on meanwhile: the kill meets it anywhere.
				time.AfterFunc(rand.N(5*time.Millisecond), func() { child.Process.Kill() })
			}
		}
		child.Wait()
		s := newSite(t, path, db.Config{})
		there := map[string]bool{}
		err = s.View(t.Context(), func(r *db.Reader) error {
			nodes, err := r.Nodes()
			if err != nil {
				return err
			}
			for _, n := range nodes {
				there[n.GivenName] = true
			}
			rev, err := r.Revision()
			if int(rev) != len(nodes)+1 {
				t.Errorf("round %d: revision %d with %d nodes and a user", round, rev, len(nodes))
			}
			if err != nil {
				return err
			}
			events, err := r.VerifyAudit()
			if int(events) != len(nodes) {
				t.Errorf("round %d: %d audit events for %d nodes", round, events, len(nodes))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		for name := range acknowledged {
			if !there[name] {
				t.Errorf("round %d: %s was acknowledged and is gone", round, name)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(acknowledged) < 6 {
		t.Fatalf("only %d registrations were acknowledged: nothing was tested", len(acknowledged))
	}
}
