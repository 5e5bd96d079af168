package integration

import (
	"fmt"
	"io"
	"net/http"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
)

// TestInteractiveLogin joins clients of each version without a key: the client
// names a page, the page shows the device, an admin approves it on the command
// line, and the waiting client goes on at once.
func TestInteractiveLogin(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	server.User(t, "alice")
	for i, version := range Versions {
		t.Run(version, func(t *testing.T) {
			c := lab.Client(t, ClientConfig{Version: version, Name: fmt.Sprintf("laptop-%d", i)})
			page, wait := c.Login(t, server)
			if want := server.URL + "/register/"; !strings.HasPrefix(page, want) {
				t.Errorf("the login page is %s, want one below %s", page, want)
			}
			id := path.Base(page)
			body := server.Get(t, page, http.StatusOK)
			last := id[len(id)-8:]
			for _, want := range []string{c.Name, last[:4], last[4:]} {
				if !strings.Contains(body, want) {
					t.Errorf("the login page does not show %q:\n%s", want, body)
				}
			}
			if nodes := server.Nodes(t); len(nodes) != i {
				t.Errorf("before the approval there are nodes %+v", nodes)
			}
			server.CLI(t, "auth", "register", "--user", "alice", "--auth-id", id)
			approved := time.Now()
			wait()
			c.AwaitRunning(t)
			t.Logf("running %v after the approval", time.Since(approved).Round(time.Millisecond))
			if n := server.Node(t, c.IPv4(t)); n.User.Name != "alice" {
				t.Errorf("the node is %+v, want it alice's", n)
			}
			if _, err := server.TryCLI("auth", "register", "--user", "alice", "--auth-id", id); err == nil {
				t.Error("the same login was approved twice")
			}
		})
	}
}

// TestRejectedLogin has an admin reject a login: the device gets no node.
func TestRejectedLogin(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	c := lab.Client(t, ClientConfig{})
	page, _ := c.Login(t, server)
	server.CLI(t, "auth", "reject", "--auth-id", path.Base(page))
	if nodes := server.Nodes(t); len(nodes) != 0 {
		t.Errorf("nodes are %+v", nodes)
	}
	if st := c.Status(t); len(st.TailscaleIPs) != 0 {
		t.Errorf("the client has addresses:\n%s", describe(st))
	}
}

// TestInteractiveRenewal has a connected client ask for a new node key: it keeps
// its node, and the old key serves it until the new one is approved.
func TestInteractiveRenewal(t *testing.T) {
	lab := Open(t)
	server := lab.Server(t, ServerConfig{})
	// A v1.104 that restarts is found again by another only after up to 15 s.
	a := lab.Client(t, ClientConfig{Name: "a", Version: Versions[1]})
	b := lab.Client(t, ClientConfig{Name: "b", Version: Versions[1]})
	two(t, server, a, b)
	addr := b.IPv4(t)
	before := server.Node(t, addr)
	// A client remembers the key that it joined by until it ends.
	b.Kill()
	b.Start(t)
	b.AwaitPeers(t, 1)
	a.AwaitPeers(t, 1)
	Meet(t, a, b)
	vigil := a.Vigil(t, "b is offline or gone", func(st *ipnstate.Status) bool { return !online(st, b) })
	flow := a.Flow(t, addr, 7000)

	// As a person does it in a client's menu. `tailscale up --force-reauth`
	// drops the old session on its own side before it asks.
	if err := b.API.StartLoginInteractive(t.Context()); err != nil {
		t.Fatal(err)
	}
	st, _ := b.Await(t, "a login page", 10*time.Second, func(st *ipnstate.Status) bool { return st.AuthURL != "" })
	if st.BackendState != ipn.Running.String() {
		t.Errorf("the client is %s while it waits, want it running", st.BackendState)
	}
	a.AwaitTCP(t, addr, 7000, 2*time.Second)
	server.CLI(t, "auth", "register", "--user", "alice", "--auth-id", path.Base(st.AuthURL))
	b.Await(t, "running without a login page", 10*time.Second, func(st *ipnstate.Status) bool {
		return st.BackendState == ipn.Running.String() && st.AuthURL == "" && slices.Contains(st.TailscaleIPs, addr)
	})
	after := server.Node(t, addr)
	if after.ID != before.ID || after.NodeKey == before.NodeKey {
		t.Errorf("renewed node is %+v, before it was %+v", after, before)
	}
	a.Await(t, "b's new key", 10*time.Second, func(st *ipnstate.Status) bool {
		p := Peer(st, addr)
		return p != nil && p.PublicKey.String() == after.NodeKey
	})
	a.AwaitTCP(t, addr, 7000, 10*time.Second)
	// A handshake with the new key that reaches the client before the server's
	// answer does is lost, and WireGuard repeats it after five seconds.
	flow.Unbroken(t, 8*time.Second)
	vigil.End(t)
}

// Get fetches a page of the server and checks its status code.
func (s *Server) Get(t testing.TB, url string, want int) (body string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := s.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != want {
		t.Fatalf("GET %s: %s, %v, want %d:\n%s", url, res.Status, err, want, b)
	}
	return string(b)
}
