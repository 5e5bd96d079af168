package integration

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// ServerConfig says how a server is reached. The zero value is the start
// without any configuration: plain HTTP on a private address.
type ServerConfig struct {
	// TLS gives the server a name and a certificate of the lab's own
	// authority. Clients need [Server.Trust].
	TLS bool
	// Host is the name of its machine; empty means "control". One of several
	// servers needs its own, and publishes its relay by address, since they all
	// have the same URL.
	Host string
	// Args follow `signalbox serve`.
	Args []string
	Env  []string
}

// A Server is a host that runs signalbox. Its data directory is the default one
// of root, so the command line finds the server without a flag.
type Server struct {
	*Host
	URL string

	binary string
	args   []string
	env    []string
	caFile string
	client *http.Client
	proc   *process
	out    *journal
	log    *journal
}

// binary builds signalbox once for all tests of this process.
var binary = sync.OnceValues(func() (string, error) {
	lab, err := sharedLab()
	if err != nil {
		return "", err
	}
	file := filepath.Join(lab.dir, "signalbox")
	if out, err := exec.Command("go", "build", "-o", file, "../cmd/signalbox").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build signalbox: %w\n%s", err, out)
	}
	return file, nil
})

// controlName is the name of a server that has a certificate.
const controlName = "control.lab.test"

// Server makes a machine and starts signalbox on it.
func (l *Lab) Server(t testing.TB, cfg ServerConfig) *Server {
	t.Helper()
	file, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{
		Host:   l.Host(t, cmp.Or(cfg.Host, "control")),
		binary: file,
		env:    cfg.Env,
		out:    newJournal(),
		log:    newJournal(),
	}
	transport := &http.Transport{
		// Sockets are opened on the server's own machine, whatever the name.
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(address)
			if err != nil {
				return nil, err
			}
			return s.Dial(ctx, network, net.JoinHostPort(s.Addr.String(), port))
		},
		DisableKeepAlives: true,
	}
	s.client = &http.Client{Transport: transport}
	if cfg.TLS {
		ca, err := l.authority()
		if err != nil {
			t.Fatal(err)
		}
		cert, key, err := ca.issue(l.dir, controlName)
		if err != nil {
			t.Fatal(err)
		}
		s.URL = "https://" + controlName
		s.env = append(slices.Clone(s.env), "SIGNALBOX_TLS_CERT_PATH="+cert, "SIGNALBOX_TLS_KEY_PATH="+key)
		s.caFile = ca.file
		if cfg.Host != "" {
			s.env = append(s.env, "SSL_CERT_FILE="+ca.file, "SIGNALBOX_DERP_SERVER_IPV4="+s.Addr.String())
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: ca.pool}
		s.AddName(t, controlName, s.Addr)
	} else {
		s.URL = "http://" + netip.AddrPortFrom(s.Addr, 8080).String()
	}
	s.args = append([]string{"serve", "--url", s.URL}, cfg.Args...)
	s.log.showOnFailure(t, "the server's log", 100)
	s.Start(t)
	return s
}

// Trust makes a client's machine ready for a server that has a name and a
// certificate: it returns the environment that tailscaled needs.
func (s *Server) Trust() []string {
	if s.caFile == "" {
		return nil
	}
	return []string{"SSL_CERT_FILE=" + s.caFile}
}

// Introduce tells a client's machine the server's name.
func (s *Server) Introduce(t testing.TB, h *Host) {
	t.Helper()
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := netip.ParseAddr(u.Hostname()); err != nil {
		h.AddName(t, u.Hostname(), s.Addr)
	}
}

// Start starts the server on the data it has and waits until it is healthy.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	var err error
	if s.proc, err = s.launch(s.env, s.out, s.log, s.binary, s.args...); err != nil {
		t.Fatal(err)
	}
	took := probe(t, 20*time.Second, "healthy server", func(ctx context.Context) error {
		select {
		case <-s.proc.done:
			t.Fatalf("the server ended: %v\n%s", s.proc.err, tail(s.log.String(), 20))
		default:
		}
		req, err := http.NewRequestWithContext(ctx, "GET", s.URL+"/health", nil)
		if err != nil {
			return err
		}
		res, err := s.client.Do(req)
		if err != nil {
			return err
		}
		res.Body.Close()
		if res.StatusCode != http.StatusOK {
			return fmt.Errorf("/health: %s", res.Status)
		}
		return nil
	})
	t.Logf("server healthy after %v", took.Round(time.Millisecond))
}

// Kill ends the server as a power cut would.
func (s *Server) Kill() { s.proc.kill() }

// Stop ends the server in the orderly way.
func (s *Server) Stop(t testing.TB) {
	t.Helper()
	s.proc.signal(syscall.SIGTERM)
	if s.proc.err != nil {
		t.Fatalf("the server did not stop cleanly: %v", s.proc.err)
	}
}

// JoinLine returns the line that the server printed on its first start for
// joining a device.
func (s *Server) JoinLine(t testing.TB) string {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		printed, more := s.out.watch()
		for line := range strings.Lines(printed) {
			if line = strings.TrimSpace(line); strings.Contains(line, "tailscale up ") {
				return line
			}
		}
		select {
		case <-more:
		case <-deadline:
			t.Fatalf("no line for joining a device; the server printed:\n%s", printed)
		}
	}
}

// CLI runs signalbox on the server's machine and returns what it printed.
func (s *Server) CLI(t testing.TB, args ...string) string {
	t.Helper()
	out, err := s.TryCLI(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TryCLI is CLI for a command that may fail.
func (s *Server) TryCLI(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return s.Run(ctx, s.env, s.binary, args...)
}

// User makes a user and returns the id.
func (s *Server) User(t testing.TB, name string) string {
	t.Helper()
	return decode[struct{ ID string }](t, s.CLI(t, "users", "create", name, "-o", "json")).ID
}

// Key makes an auth key of a user, with further flags of `preauthkeys create`.
func (s *Server) Key(t testing.TB, user string, flags ...string) string {
	t.Helper()
	args := append([]string{"preauthkeys", "create", "-e", "1h", "-o", "json"}, flags...)
	if user != "" {
		args = append(args, "-u", user)
	}
	return decode[struct{ Key string }](t, s.CLI(t, args...)).Key
}

// A Node is what `nodes list` says of a device.
type Node struct {
	ID          string
	NodeKey     string
	IPAddresses []netip.Addr
	Name        string
	GivenName   string
	Online      bool
	Expiry      *time.Time
	Tags        []string
	User        struct{ Name string }
}

// Nodes lists the devices.
func (s *Server) Nodes(t testing.TB) []Node {
	t.Helper()
	return decode[[]Node](t, s.CLI(t, "nodes", "list", "-o", "json"))
}

// Node returns the device that has an address.
func (s *Server) Node(t testing.TB, addr netip.Addr) Node {
	t.Helper()
	nodes := s.Nodes(t)
	i := slices.IndexFunc(nodes, func(n Node) bool { return slices.Contains(n.IPAddresses, addr) })
	if i < 0 {
		t.Fatalf("no node has %v among %+v", addr, nodes)
	}
	return nodes[i]
}

// SetPolicy stores a policy.
func (s *Server) SetPolicy(t testing.TB, policy string) {
	t.Helper()
	if _, err := s.TrySetPolicy(policy); err != nil {
		t.Fatal(err)
	}
}

// TrySetPolicy is SetPolicy for one that may be refused.
func (s *Server) TrySetPolicy(policy string) (string, error) {
	const file = "/run/policy.hujson"
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := s.runInput(ctx, nil, policy, "sh", "-c", "cat > "+file); err != nil {
		return "", err
	}
	return s.TryCLI("policy", "set", "-f", file)
}
