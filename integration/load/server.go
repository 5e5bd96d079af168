package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// server is the signalbox process under load. One that was started by somebody
// else can be measured too, but not killed.
type server struct {
	url     string // http://127.0.0.1:PORT
	addr    string // host:port of url
	pid     int    // 0 = unknown: no CPU and memory figures
	metrics string // host:port of the metrics listener, "" = none
	api     *http.Client
	base    string // of API URLs
	apiKey  string

	// Of a process that this tool starts:
	binary string
	dir    string
	args   []string
	env    []string
	cmd    *exec.Cmd
	exited chan error
}

// freePort returns a TCP port that is free on 127.0.0.1 at the moment.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// newServer prepares a server with its data under dir; start runs it.
func newServer(binary, dir, config string, env []string) (*server, error) {
	control, err := freePort()
	if err != nil {
		return nil, err
	}
	metrics, err := freePort()
	if err != nil {
		return nil, err
	}
	data := filepath.Join(dir, "data")
	s := &server{
		addr:    fmt.Sprintf("127.0.0.1:%d", control),
		metrics: fmt.Sprintf("127.0.0.1:%d", metrics),
		binary:  binary,
		dir:     dir,
		base:    "http://signalbox",
	}
	s.url = "http://" + s.addr
	s.args = []string{"serve", "--data-dir", data, "--url", s.url}
	if config != "" {
		s.args = append(s.args, "--config", config)
	}
	// The relay is not under test; its ports must only not be in the way.
	s.env = append(os.Environ(),
		"SIGNALBOX_METRICS_LISTEN_ADDR="+s.metrics,
		"SIGNALBOX_DERP_SERVER_LISTEN_ADDR=127.0.0.1:0",
		"SIGNALBOX_DERP_SERVER_STUN_LISTEN_ADDR=127.0.0.1:0",
		"SIGNALBOX_DERP_SERVER_STUN_SECOND_LISTEN_ADDR=127.0.0.1:0",
	)
	s.env = append(s.env, env...)
	socket := filepath.Join(data, "signalbox.sock")
	s.api = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	return s, nil
}

// attach describes a server that runs already.
func attach(url, apiKey, metrics string, pid int) (*server, error) {
	addr, ok := strings.CutPrefix(strings.TrimSuffix(url, "/"), "http://")
	if !ok {
		return nil, fmt.Errorf("server URL %q: want http://HOST:PORT", url)
	}
	if _, _, err := net.SplitHostPort(addr); err != nil {
		return nil, fmt.Errorf("server URL %q: %w", url, err)
	}
	return &server{url: "http://" + addr, addr: addr, pid: pid, metrics: metrics, api: new(http.Client), base: "http://" + addr, apiKey: apiKey}, nil
}

func (s *server) logPath() string { return filepath.Join(s.dir, "server.log") }

// start runs the process and waits until it answers.
func (s *server) start(ctx context.Context) (key.MachinePublic, error) {
	log, err := os.OpenFile(s.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return key.MachinePublic{}, err
	}
	defer log.Close()
	cmd := exec.Command(s.binary, s.args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = s.env, log, log
	// The server must not outlive a tool that was killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return key.MachinePublic{}, err
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	s.cmd, s.pid, s.exited = cmd, cmd.Process.Pid, exited
	for {
		k, err := s.noiseKey(ctx)
		if err == nil {
			return k, nil
		}
		select {
		case <-ctx.Done():
			return k, fmt.Errorf("server did not answer: %w; log in %s", err, s.logPath())
		case err := <-exited:
			return k, fmt.Errorf("server ended: %v; its last words:\n%s", err, s.logTail(10))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// noiseKey fetches the server's Noise key, as clients do before registering.
func (s *server) noiseKey(ctx context.Context) (key.MachinePublic, error) {
	var k tailcfg.OverTLSPublicKeyResponse
	req, err := http.NewRequestWithContext(ctx, "GET", s.url+"/key?v="+strconv.Itoa(int(capability)), nil)
	if err != nil {
		return k.PublicKey, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return k.PublicKey, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return k.PublicKey, fmt.Errorf("/key: %s", res.Status)
	}
	return k.PublicKey, json.NewDecoder(io.LimitReader(res.Body, 64<<10)).Decode(&k)
}

// kill ends the process with SIGKILL and waits for its end.
func (s *server) kill() {
	if s.cmd == nil {
		return
	}
	s.cmd.Process.Kill()
	<-s.exited
	s.cmd = nil
}

// call makes one API request; in and out may be nil.
func (s *server) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.base+path, body)
	if err != nil {
		return err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if s.apiKey != "" {
		req.Header.Set("Authorization", "Bearer "+s.apiKey)
	}
	res, err := s.api.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 16<<20))
	if err != nil {
		return err
	}
	if res.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %.500s", method, path, res.Status, text)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(text, out); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

func (s *server) setPolicy(ctx context.Context, text string) error {
	return s.call(ctx, "PUT", "/api/v1/policy", map[string]string{"policy": text}, nil)
}

// createKeys makes the users of a scenario and a reusable key for each owner.
func (s *server) createKeys(ctx context.Context, sc *scenario) (map[owner]string, error) {
	keys := map[owner]string{}
	for u, name := range sc.users {
		id, err := s.user(ctx, name)
		if err != nil {
			return nil, err
		}
		if keys[owner{u, -1}], err = s.createKey(ctx, map[string]any{"user": id}); err != nil {
			return nil, err
		}
	}
	for t, name := range sc.tags {
		var err error
		if keys[owner{-1, t}], err = s.createKey(ctx, map[string]any{"aclTags": []string{"tag:" + name}}); err != nil {
			return nil, err
		}
	}
	return keys, nil
}

// user returns the ID of the user of that name, who is created if need be.
func (s *server) user(ctx context.Context, name string) (string, error) {
	type user struct{ ID, Name string }
	var list struct{ Users []user }
	if err := s.call(ctx, "GET", "/api/v1/user?name="+name, nil, &list); err != nil {
		return "", err
	}
	for _, u := range list.Users {
		if u.Name == name {
			return u.ID, nil
		}
	}
	var made struct{ User user }
	err := s.call(ctx, "POST", "/api/v1/user", map[string]string{"name": name}, &made)
	return made.User.ID, err
}

func (s *server) createKey(ctx context.Context, what map[string]any) (string, error) {
	what["reusable"] = true
	what["expiration"] = time.Now().Add(24 * time.Hour).UTC().Format(time.RFC3339)
	var made struct{ PreAuthKey struct{ Key string } }
	err := s.call(ctx, "POST", "/api/v1/preauthkey", what, &made)
	if err == nil && made.PreAuthKey.Key == "" {
		err = errors.New("the API returned no auth key")
	}
	return made.PreAuthKey.Key, err
}

// gauges reads numbers by name from the metrics listener; without one all are
// 0.
func (s *server) gauges(ctx context.Context, names ...string) []float64 {
	out := make([]float64, len(names))
	text, err := s.debug(ctx, "/metrics")
	if err != nil {
		return out
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if i := slices.Index(names, name); i >= 0 {
			out[i], _ = strconv.ParseFloat(value, 64)
		}
	}
	return out
}

func (s *server) goroutines(ctx context.Context) int {
	return int(s.gauges(ctx, "go_goroutines")[0])
}

// revision is the tailnet's: it rises with each write that followers see.
func (s *server) revision(ctx context.Context) int {
	return int(s.gauges(ctx, "signalbox_revision")[0])
}

// trim makes the server collect its garbage and give free memory back.
func (s *server) trim(ctx context.Context) error {
	_, err := s.debugCall(ctx, "POST", "/debug/trim")
	return err
}

// live returns the bytes of heap and stacks in use after a collection, which
// it asks for; 0 without a metrics listener.
func (s *server) live(ctx context.Context) int64 {
	if _, err := s.debug(ctx, "/debug/pprof/heap?gc=1"); err != nil {
		return 0
	}
	g := s.gauges(ctx, "go_memstats_heap_alloc_bytes", "go_memstats_stack_inuse_bytes")
	return int64(g[0] + g[1])
}

// debug fetches a page of the metrics listener.
func (s *server) debug(ctx context.Context, path string) ([]byte, error) {
	return s.debugCall(ctx, "GET", path)
}

func (s *server) debugCall(ctx context.Context, method, path string) ([]byte, error) {
	if s.metrics == "" {
		return nil, errors.New("no metrics listener")
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+s.metrics+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode/100 != 2 {
		return nil, fmt.Errorf("%s: %s", path, res.Status)
	}
	return io.ReadAll(res.Body)
}

var severe = regexp.MustCompile(`(?i)level"?[=:]"?(warn|error)|panic|fatal error|DATA RACE`)

// complaints returns the warnings and errors in the server's log: how many,
// and the first few.
func (s *server) complaints() (count int, first []string) {
	text, err := os.ReadFile(s.logPath())
	if s.dir == "" || err != nil {
		return 0, nil
	}
	for line := range strings.Lines(string(text)) {
		if severe.MatchString(line) {
			if count++; len(first) < 10 {
				first = append(first, strings.TrimSpace(line))
			}
		}
	}
	return count, first
}

func (s *server) logTail(n int) string {
	text, _ := os.ReadFile(s.logPath())
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
