package integration

import (
	"errors"
	"fmt"
	"os/exec"
	"path"
	"strings"
	"testing"
	"time"

	"tailscale.com/ipn/ipnstate"
)

// A Login is a running `tailscale ssh`.
type Login struct {
	what     string
	proc     *process
	out, log *journal // what the remote command and what ssh says
}

// SSH runs a command as a user of another client, over `tailscale ssh`.
func (c *Client) SSH(t testing.TB, user string, to *Client, command string) *Login {
	t.Helper()
	l := &Login{what: fmt.Sprintf("tailscale ssh %s@%s on %s", user, to.Name, c.Name), out: newJournal(), log: newJournal()}
	var err error
	if l.proc, err = c.launch(c.env, l.out, l.log, c.dir+"/tailscale", "ssh", user+"@"+to.Name, command); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.proc.kill)
	return l
}

// end waits until ssh ends.
func (l *Login) end(t testing.TB) error {
	t.Helper()
	select {
	case <-l.proc.done:
	case <-time.After(20 * time.Second):
		t.Fatalf("%s does not end; it says:\n%s%s", l.what, l.out, l.log)
	}
	return l.proc.err
}

// Printed waits for the end of a login that is let in, and returns what the
// remote command printed.
func (l *Login) Printed(t testing.TB) string {
	t.Helper()
	if err := l.end(t); err != nil {
		t.Fatalf("%s: %v\n%s%s", l.what, err, l.out, l.log)
	}
	return strings.TrimSpace(l.out.String())
}

// Refused waits for the end of a login that is not let in, and returns what ssh
// said.
func (l *Login) Refused(t testing.TB) string {
	t.Helper()
	err := l.end(t)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 255 || l.out.String() != "" {
		t.Fatalf("%s: %v, want the exit code 255 of ssh itself; it says:\n%s%s", l.what, err, l.out, l.log)
	}
	return l.log.String()
}

// Page waits until a login is held and shows where it can be approved.
func (l *Login) Page(t testing.TB, s *Server) string {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		printed, more := l.log.watch()
		for _, word := range strings.Fields(printed) {
			if strings.HasPrefix(word, s.URL+"/auth/") {
				return word
			}
		}
		select {
		case <-more:
		case <-l.proc.done:
			t.Fatalf("%s ended before it showed a page: %v\n%s%s", l.what, l.proc.err, l.out, l.log)
		case <-deadline:
			t.Fatalf("%s shows no page; it says:\n%s%s", l.what, l.out, l.log)
		}
	}
}

// sshPolicy lets ann in as deploy, and as root and operator after a check that
// stays good for a period. Ben reaches the port and nothing else.
func sshPolicy(period string) string {
	return fmt.Sprintf(`{
		"tagOwners": {"tag:srv": []},
		"acls": [{"action": "accept", "src": ["autogroup:member"], "dst": ["tag:srv:22"]}],
		"ssh": [
			{"action": "accept", "src": ["ann@"], "dst": ["tag:srv"], "users": ["deploy"]},
			{"action": "check", "src": ["ann@"], "dst": ["tag:srv"], "users": ["root", "operator"], "checkPeriod": %q},
		],
	}`, period)
}

// TestTailscaleSSH logs in over Tailscale SSH: accepted, denied, and held until
// a person decides.
func TestTailscaleSSH(t *testing.T) {
	t.Parallel()
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	server.SetPolicy(t, sshPolicy("1h"))
	srv := lab.Client(t, ClientConfig{Name: "srv", Version: Versions[1]})
	err := srv.script(`
		for name in deploy operator; do
			echo $name:x:200$((i=${i:-0}+1)):2000::/run/home:/bin/sh >> /etc/passwd
			echo $name:'*':19000:0:99999:7::: >> /etc/shadow
		done
	`)
	if err != nil {
		t.Fatal(err)
	}
	srv.Up(t, server, server.Key(t, "", "--tags", "tag:srv"), "--ssh")
	ann := lab.Client(t, ClientConfig{Name: "ann", Version: Versions[1]})
	ann.Up(t, server, server.Key(t, server.User(t, "ann")))
	ben := lab.Client(t, ClientConfig{Name: "ben", Version: Versions[1]})
	ben.Up(t, server, server.Key(t, server.User(t, "ben")))
	for _, c := range []*Client{ann, ben} {
		c.Await(t, "the host keys of srv", 10*time.Second, func(st *ipnstate.Status) bool {
			p := Peer(st, srv.IPv4(t))
			return p != nil && len(p.SSH_HostKeys) > 0
		})
		Meet(t, c, srv)
	}

	if got := ann.SSH(t, "deploy", srv, "id -un; hostname").Printed(t); got != "deploy\nsrv" {
		t.Errorf("deploy is %q", got)
	}
	ben.SSH(t, "deploy", srv, "id -un").Refused(t)
	ann.SSH(t, "daemon", srv, "id -un").Refused(t)

	held := ann.SSH(t, "root", srv, "id -un")
	page := held.Page(t, server)
	select {
	case <-held.proc.done:
		t.Fatalf("%s ended before anybody decided: %v\n%s%s", held.what, held.proc.err, held.out, held.log)
	default:
	}
	decided := time.Now()
	server.CLI(t, "auth", "approve", "--auth-id", path.Base(page))
	if got := held.Printed(t); got != "root" {
		t.Errorf("root is %q", got)
	}
	t.Logf("let in and done %v after the approval began", time.Since(decided).Round(time.Millisecond))

	again := ann.SSH(t, "root", srv, "id -un")
	if got := again.Printed(t); got != "root" || strings.Contains(again.log.String(), "/auth/") {
		t.Errorf("within the period root is %q, and ssh says:\n%s", got, again.log)
	}

	// An approval is for one user of the machine: another is held again.
	other := ann.SSH(t, "operator", srv, "id -un")
	server.CLI(t, "auth", "reject", "--auth-id", other.Page(t, server))
	if said := other.Refused(t); !strings.Contains(said, "rejected") {
		t.Errorf("the refusal says:\n%s", said)
	}

	// Without a period every connection is held, whatever was approved before.
	server.SetPolicy(t, sshPolicy("always"))
	for range 2 {
		held := ann.SSH(t, "root", srv, "id -un")
		server.CLI(t, "auth", "approve", "--auth-id", held.Page(t, server))
		if got := held.Printed(t); got != "root" {
			t.Errorf("root is %q", got)
		}
	}
}
