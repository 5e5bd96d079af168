package cli

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/signalbox-net/signalbox/cmd/signalbox/internal/config"
)

// maxAnswer bounds what is read from a server: 100,000 nodes have room.
const maxAnswer = 512 << 20

// A client talks to one server's /api/v1.
type client struct {
	http    *http.Client
	base    string // scheme and host
	apiKey  string
	socket  string // path of the unix socket, empty over the network
	where   string // for messages
	timeout time.Duration
}

// client finds the server: --server or cli.address, else the unix socket.
func (m *program) client() (*client, error) {
	cfg, err := m.loadClient()
	if err != nil {
		return nil, err
	}
	c := &client{timeout: cfg.CLI.Timeout}
	if m.timeout != "" {
		if c.timeout, err = config.ParseDuration(m.timeout); err != nil || c.timeout == 0 {
			return nil, usagef("--timeout: want a duration such as 5s, got %q", m.timeout)
		}
	}
	addr, key := m.server, m.apiKey
	if addr == "" {
		addr = cfg.CLI.Address
	}
	if key == "" {
		key = cfg.CLI.APIKey
	}
	if path, ok := socketPath(addr); ok {
		return c.overSocket(path), nil
	}
	if addr == "" {
		if m.apiKey != "" {
			return nil, usagef("--api-key needs --server: over the socket no key is used")
		}
		return c.overSocket(cfg.UnixSocket), nil
	}
	return c.overNetwork(addr, key, m.insecure || cfg.CLI.Insecure)
}

func socketPath(addr string) (string, bool) {
	if path, ok := strings.CutPrefix(addr, "unix://"); ok {
		return path, true
	}
	return addr, strings.HasPrefix(addr, "/") || strings.HasPrefix(addr, "./")
}

func (c *client) overSocket(path string) *client {
	c.socket, c.base, c.where = path, "http://signalbox", path
	var d net.Dialer
	c.http = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", path) },
	}}
	return c
}

func (c *client) overNetwork(addr, key string, insecure bool) (*client, error) {
	if !strings.Contains(addr, "://") {
		addr = "https://" + addr
	}
	u, err := url.Parse(addr)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, usagef("--server: want https://HOST[:PORT] or the path of a socket, got %q", addr)
	}
	if key == "" {
		return nil, usagef("a server at a distance wants an API key: --api-key or SIGNALBOX_CLI_API_KEY")
	}
	c.base, c.where, c.apiKey = u.Scheme+"://"+u.Host, u.Scheme+"://"+u.Host, key
	c.http = &http.Client{
		Transport: &http.Transport{
			Proxy:           http.ProxyFromEnvironment,
			TLSClientConfig: &tls.Config{InsecureSkipVerify: insecure}, // only by --insecure or cli.insecure
		},
		// The key must not follow a redirect to another host.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

// own is where the server has what Headscale lacks.
const own = "/api/signalbox/v1"

// call sends body as JSON (none when nil) and decodes the answer into out.
func (c *client) call(ctx context.Context, method, path string, body, out any) error {
	_, err := c.send(ctx, method, "/api/v1"+path, nil, body, out)
	return err
}

// callOwn is call for paths below own.
func (c *client) callOwn(ctx context.Context, method, path string, body, out any) error {
	_, err := c.send(ctx, method, own+path, nil, body, out)
	return err
}

// send is call for a whole path, with further headers, and returns those of
// the answer.
func (c *client) send(ctx context.Context, method, path string, header http.Header, body, out any) (http.Header, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var in io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		in = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, in)
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, header)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.apiKey != "" {
		req.Header.Set("Authorization", "Bearer "+c.apiKey)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return nil, c.unreachable(err)
	}
	if res.StatusCode/100 != 2 {
		return nil, c.refused(res, answer)
	}
	if out == nil {
		return res.Header, nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return nil, fmt.Errorf("%s: the answer is not what a Signalbox server says: %w", c.where, err)
	}
	return res.Header, nil
}

// unreachable says why there was no answer, and what to do.
func (c *client) unreachable(err error) error {
	var msg string
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		msg = fmt.Sprintf("%s: no answer within %s (--timeout)", c.where, config.FormatDuration(c.timeout))
	case c.socket == "":
		msg = fmt.Sprintf("%s: %v", c.where, err)
	case errors.Is(err, fs.ErrNotExist):
		msg = fmt.Sprintf("no server: there is no socket %s. Start it with 'signalbox serve', or say where it is with --data-dir, -c or --server", c.socket)
	case errors.Is(err, syscall.ECONNREFUSED):
		msg = fmt.Sprintf("no server: nobody listens on %s. Start it with 'signalbox serve'", c.socket)
	case errors.Is(err, fs.ErrPermission):
		msg = fmt.Sprintf("no permission to open %s: whoever can open it administers the server; run this as the server's user or group", c.socket)
	case errors.Is(err, syscall.EINVAL):
		msg = fmt.Sprintf("%s: the path has %d bytes, a unix socket may have %d", c.socket, len(c.socket), config.MaxSocketPath)
	default:
		msg = fmt.Sprintf("%s: %v", c.socket, err)
	}
	return codedError{errors.New(msg), exitNoReply}
}

// A refusal is an answer that something was not done, in the server's words.
type refusal struct {
	status int
	text   string
	faults []struct{ Message, Location string }
	failed []string // checks of /health
}

func (r *refusal) Error() string { return r.text }

// refused turns an error answer into a refusal.
func (c *client) refused(res *http.Response, body []byte) error {
	var p struct {
		Title, Detail, Message string
		Errors                 []struct{ Message, Location string }
		Failed                 []string
	}
	r := &refusal{status: res.StatusCode, text: fmt.Sprintf("%s: answered %s", c.where, res.Status)}
	if json.Unmarshal(body, &p) == nil {
		r.text, r.faults, r.failed = cmp.Or(p.Detail, p.Message, p.Title, r.text), p.Errors, p.Failed
	}
	return r
}

// get fetches the member of an answer, undecoded for the output and decoded
// into out for the table.
func (c *client) get(ctx context.Context, method, path string, body any, member string, out any) (json.RawMessage, error) {
	if !strings.HasPrefix(path, own) {
		path = "/api/v1" + path
	}
	var answer map[string]json.RawMessage
	if _, err := c.send(ctx, method, path, nil, body, &answer); err != nil {
		return nil, err
	}
	raw := answer[member]
	if raw == nil {
		return nil, fmt.Errorf("%s: the answer has no %q", c.where, member)
	}
	if out != nil {
		if err := json.Unmarshal(raw, out); err != nil {
			return nil, fmt.Errorf("%s: the answer is not what a Signalbox server says: %w", c.where, err)
		}
	}
	return raw, nil
}
