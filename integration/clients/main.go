// Command clients builds the stock Tailscale clients that the integration
// tests drive, and prints one line for each: its version and the directory
// that holds its tailscale and tailscaled.
//
// Each version has a module of its own beside this file, which pins every
// dependency and keeps the product's go.mod free of them. A finished build is
// kept in the user's cache directory under signalbox/clients/VERSION-TOOLCHAIN
// and never built again; it appears there by a rename, so an interrupted build
// leaves nothing that looks finished.
//
//	go run ./integration/clients             # all versions
//	go run ./integration/clients v1.80.3     # only this one
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"
)

// client is one version to build.
type client struct {
	version   string
	toolchain string // value of GOTOOLCHAIN; fetched when it is not the local one
	// drop holds a line that is left out of the build for each file of the
	// tailscale.com module that does not compile with it.
	drop map[string]string
}

var clients = []client{
	{version: "v1.80.3", toolchain: "go1.26.8"},
	{version: "v1.102.5", toolchain: "go1.26.8"},
	{
		version:   "v1.104.5",
		toolchain: "go1.27.3",
		// Only Windows runs this line, and the gvisor that go.mod puts in the
		// place of the unavailable one does not have the field.
		drop: map[string]string{
			"wgengine/netstack/netstack.go": "opts.ClockResolution = 500 * time.Microsecond",
		},
	},
}

func main() {
	flag.Parse()
	if err := run(flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "clients:", err)
		os.Exit(1)
	}
}

func run(wanted []string) error {
	for _, v := range wanted {
		if !slices.ContainsFunc(clients, func(c client) bool { return c.version == v }) {
			return fmt.Errorf("no client %q", v)
		}
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	root := filepath.Join(cache, "signalbox", "clients")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	unlock, err := lock(filepath.Join(root, ".lock"))
	if err != nil {
		return err
	}
	defer unlock()

	for _, c := range clients {
		if len(wanted) > 0 && !slices.Contains(wanted, c.version) {
			continue
		}
		dir := filepath.Join(root, c.version+"-"+c.toolchain)
		if err := c.build(dir); err != nil {
			return fmt.Errorf("build %s: %w", c.version, err)
		}
		fmt.Println(c.version, dir)
	}
	return nil
}

// lock keeps two runs from doing the same work side by side. The kernel frees
// it when the process ends, however it ends.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// build makes dir hold the client's two programs, unless it exists.
func (c client) build(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	work, err := os.MkdirTemp(filepath.Dir(dir), ".build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)

	start := time.Now()
	fmt.Fprintf(os.Stderr, "building %s with %s, which takes some minutes once\n", c.version, c.toolchain)
	out := filepath.Join(work, "out")
	args := []string{"build", "-mod=readonly", "-trimpath", "-ldflags=-s -w", "-o", out + "/"}
	if len(c.drop) > 0 {
		flags, err := c.overlay(work)
		if err != nil {
			return err
		}
		args = append(args, flags...)
	}
	args = append(args, "tailscale.com/cmd/tailscale", "tailscale.com/cmd/tailscaled")
	if _, err := c.goTool(args...); err != nil {
		return err
	}
	if err := os.Rename(out, dir); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "built %s in %v\n", c.version, time.Since(start).Round(time.Second))
	return nil
}

// overlay writes what lets the build leave the lines of drop out, and returns
// the flags that say so. The go command accepts no overlay on its module cache,
// so a second go.mod looks at the cached module through a symbolic link. A line
// that is not there exactly once is an error, since then the version is not the
// one that was looked at.
func (c client) overlay(work string) (flags []string, err error) {
	if _, err := c.goTool("mod", "download", "tailscale.com"); err != nil {
		return nil, err
	}
	out, err := c.goTool("list", "-mod=readonly", "-m", "-f={{.Dir}}", "tailscale.com")
	if err != nil {
		return nil, err
	}
	link := filepath.Join(work, "tailscale.com")
	if err := os.Symlink(string(bytes.TrimSpace(out)), link); err != nil {
		return nil, err
	}
	replace := make(map[string]string)
	for name, line := range c.drop {
		original := filepath.Join(link, name)
		src, err := os.ReadFile(original)
		if err != nil {
			return nil, err
		}
		if n := bytes.Count(src, []byte(line)); n != 1 {
			return nil, fmt.Errorf("%s holds %q %d times, want once", original, line, n)
		}
		patched := filepath.Join(work, filepath.Base(name))
		if err := os.WriteFile(patched, bytes.Replace(src, []byte(line), nil, 1), 0o644); err != nil {
			return nil, err
		}
		replace[original] = patched
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return nil, err
	}
	overlay := filepath.Join(work, "overlay.json")
	if err := os.WriteFile(overlay, b, 0o644); err != nil {
		return nil, err
	}
	modfile := filepath.Join(work, "go.mod")
	for _, name := range []string{"go.mod", "go.sum"} {
		b, err := os.ReadFile(filepath.Join(sourceDir(), c.version, name))
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(work, name), b, 0o644); err != nil {
			return nil, err
		}
	}
	if _, err := c.goTool("mod", "edit", "-replace=tailscale.com="+link, modfile); err != nil {
		return nil, err
	}
	return []string{"-modfile=" + modfile, "-overlay=" + overlay}, nil
}

// goTool runs the go command in the client's module and returns its output.
// Programs are built without cgo, so that they run whatever libc there is.
func (c client) goTool(args ...string) ([]byte, error) {
	cmd := exec.Command("go", args...)
	cmd.Dir = filepath.Join(sourceDir(), c.version)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=-buildvcs=false", "GOTOOLCHAIN="+c.toolchain)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go %s: %w", args[0], err)
	}
	return out, nil
}

// sourceDir is where this file was compiled from; `go run` builds it on the
// machine that runs it.
func sourceDir() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(file)
}
