package integration

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"tailscale.com/ipn/ipnstate"
)

// Send sends a file of the given content to another client by Taildrop.
func (c *Client) Send(to *Client, name, content string) error {
	if err := c.script(fmt.Sprintf("printf %%s '%s' > /run/home/%s", content, name)); err != nil {
		return err
	}
	_, err := c.TryTailscale("file", "cp", "/run/home/"+name, to.Name+":")
	return err
}

// Received waits for a file and returns its content.
func (c *Client) Received(t testing.TB, name string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := c.Run(ctx, c.env, c.dir+"/tailscale", "file", "get", "--wait", "/run/home"); err != nil {
		t.Fatal(err)
	}
	content, err := c.Run(ctx, nil, "cat", "/run/home/"+name)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// put sends a file past the client's own program, which refuses before it
// asks, and returns the HTTP status of the answer.
func (c *Client) put(t testing.TB, to *Client, name string) (status int) {
	t.Helper()
	p := Peer(c.Status(t), to.IPv4(t))
	if p == nil || len(p.PeerAPIURL) == 0 {
		t.Fatalf("%s does not know where %s takes files", c.Name, to.Name)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "PUT", p.PeerAPIURL[0]+"/v0/put/"+name, strings.NewReader("not for you"))
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{DialContext: c.Dial, DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	return res.StatusCode
}

// TestTaildrop sends files between devices of one person, and between two
// people only while the policy grants it, and only in that direction.
func TestTaildrop(t *testing.T) {
	t.Parallel()
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	policy := func(app string) string {
		return `{"grants": [
			{"src": ["*"], "dst": ["*"], "ip": ["icmp:*"]},
			` + app + `
		]}`
	}
	server.SetPolicy(t, policy(""))
	ann := server.Key(t, server.User(t, "ann"), "--reusable")
	laptop := lab.Client(t, ClientConfig{Name: "laptop", Version: Versions[1]})
	laptop.Up(t, server, ann)
	phone := lab.Client(t, ClientConfig{Name: "phone", Version: Versions[2]})
	phone.Up(t, server, ann)
	ben := lab.Client(t, ClientConfig{Name: "ben", Version: Versions[1]})
	ben.Up(t, server, server.Key(t, server.User(t, "ben")))
	for _, c := range []*Client{laptop, phone, ben} {
		c.AwaitPeers(t, 2)
	}
	Meet(t, laptop, phone)
	Meet(t, laptop, ben)

	if err := laptop.Send(phone, "own.txt", "from one to the other"); err != nil {
		t.Fatal(err)
	}
	if got := phone.Received(t, "own.txt"); got != "from one to the other" {
		t.Errorf("the phone got %q", got)
	}
	refused := func(from, to *Client) {
		t.Helper()
		if err := from.Send(to, "secret.txt", "not for you"); err == nil {
			t.Errorf("%s sent %s a file", from.Name, to.Name)
		}
		if status := from.put(t, to, "secret.txt"); status != http.StatusForbidden {
			t.Errorf("%s answers %s with status %d", to.Name, from.Name, status)
		}
		if list, err := to.Run(t.Context(), nil, "find", "/var/lib/tailscale", "-name", "secret*"); err != nil || list != "" {
			t.Errorf("%s has %q, %v", to.Name, list, err)
		}
	}
	refused(laptop, ben)
	refused(ben, laptop)

	// The capability needs no rule that opens a port.
	server.SetPolicy(t, policy(`{"src": ["ann@"], "dst": ["ben@"], "app": {"signalbox.net/cap/taildrop": [{}]}},`))
	probe(t, 10*time.Second, "ben is a target of the laptop", func(ctx context.Context) error {
		out, err := laptop.Run(ctx, laptop.env, laptop.dir+"/tailscale", "file", "cp", "--targets")
		if err == nil && !strings.Contains(out, "ben") {
			err = errors.New(out)
		}
		return err
	})
	if err := laptop.Send(ben, "granted.txt", "from ann to ben"); err != nil {
		t.Fatal(err)
	}
	if got := ben.Received(t, "granted.txt"); got != "from ann to ben" {
		t.Errorf("ben got %q", got)
	}
	refused(ben, laptop)

	server.SetPolicy(t, policy(""))
	laptop.Await(t, "ben no target", 5*time.Second, func(st *ipnstate.Status) bool {
		p := Peer(st, ben.IPv4(t))
		return p != nil && p.TaildropTarget == ipnstate.TaildropTargetOwnedByOtherUser
	})
	refused(laptop, ben)
}
