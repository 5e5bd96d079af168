package sshaction_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"testing"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

const policy = `{
	"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
	"ssh": [{"action": "check", "src": ["autogroup:member"], "dst": ["autogroup:self"], "users": ["ann"], "checkPeriod": "1h"}],
}`

// site is two servers, and two devices of one person that both know.
type site struct {
	*controltest.Server
	other    *controltest.Server
	src, dst *controltest.Client
}

func newSite(t *testing.T) *site {
	t.Helper()
	g := controltest.Start(t, controltest.Options{Policy: policy})
	x := &site{Server: g, other: g.Beside("other", g.Clock)}
	key := g.AuthKey(db.AuthKey{User: g.User("alice"), Reusable: true})
	x.src, x.dst = g.NewClient("src").Join(key), g.NewClient("dst").Join(key)
	for _, c := range []*controltest.Client{x.src, x.dst} {
		c.Host = "control.mesh.test:8443"
		x.other.WaitNode(c.ID(), "the device", func(n *tailnet.Node) bool { return n != nil })
	}
	return x
}

// get asks a server as the device that somebody connects to.
func (x *site) get(at *controltest.Server, target string) (*tailcfg.SSHAction, error) {
	ctx, cancel := context.WithTimeout(context.Background(), controltest.Patience)
	defer cancel()
	c := x.dst.On(at)
	defer c.Close()
	res, err := c.Send(ctx, "GET", target, "")
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s", res.Status, body)
	}
	a := new(tailcfg.SSHAction)
	if err == nil {
		err = json.Unmarshal(body, a)
	}
	return a, err
}

// ask begins a check at a server and returns where its end is waited for, and the id that a person opens.
func (x *site) ask(at *controltest.Server) (wait, id string) {
	x.Helper()
	a, err := x.get(at, fmt.Sprintf("/machine/ssh/action/%d/to/%d?local_user=ann", x.src.ID(), x.dst.ID()))
	if err != nil {
		x.Fatal(err)
	}
	u, err := url.Parse(a.HoldAndDelegate)
	page := regexp.MustCompile(`https?://\S+/auth/\S+`).FindString(a.Message)
	if err != nil || u.Host != x.dst.Host || page == "" {
		x.Fatalf("the check begins with %+v", a)
	}
	return u.RequestURI(), path.Base(page)
}

// result waits for the end of a check.
func (x *site) result(at *controltest.Server, wait string) <-chan *tailcfg.SSHAction {
	out := make(chan *tailcfg.SSHAction, 1)
	go func() {
		a, err := x.get(at, wait)
		if err != nil {
			a = &tailcfg.SSHAction{Message: err.Error()}
		}
		out <- a
	}()
	return out
}

func (x *site) end(result <-chan *tailcfg.SSHAction) *tailcfg.SSHAction {
	x.Helper()
	select {
	case a := <-result:
		return a
	case <-time.After(2 * controltest.Patience):
		x.Fatal("nobody tells the device of the decision")
		return nil
	}
}

// TestDecisionAtAnotherServer decides checks at one server for which a device waits at another, the one that it had asked or not.
func TestDecisionAtAnotherServer(t *testing.T) {
	t.Parallel()
	x := newSite(t)
	admin := db.Actor{Kind: "cli", Name: "root"}
	for what, c := range map[string]struct{ asked, waited, decided *controltest.Server }{
		"decided elsewhere":             {x.Server, x.Server, x.other},
		"decided elsewhere, other way":  {x.other, x.other, x.Server},
		"the device has moved":          {x.Server, x.other, x.Server},
		"the device has moved, decided": {x.other, x.Server, x.Server},
	} {
		wait, id := x.ask(c.asked)
		result := x.result(c.waited, wait)
		if err := c.decided.Register.Reject(x.Context(), admin, id); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if a := x.end(result); a.Accept || !a.Reject {
			t.Errorf("%s: rejected, the device is told %+v", what, a)
		}
	}
	wait, id := x.ask(x.Server)
	result := x.result(x.Server, wait)
	if err := x.other.Register.Confirm(x.Context(), admin, id); err != nil {
		t.Fatal(err)
	}
	if a := x.end(result); !a.Accept || a.Reject {
		t.Errorf("approved at the other server, the device is told %+v", a)
	}
	// The approval is good for its period, wherever the device asks next.
	for _, at := range []*controltest.Server{x.other, x.Server} {
		a, err := x.get(at, fmt.Sprintf("/machine/ssh/action/%d/to/%d?local_user=ann", x.src.ID(), x.dst.ID()))
		if err != nil || !a.Accept {
			t.Errorf("within the check period: %+v, %v", a, err)
		}
	}
}

// TestWaitIsTheDevicesOwn keeps other devices from a check.
func TestWaitIsTheDevicesOwn(t *testing.T) {
	t.Parallel()
	x := newSite(t)
	wait, id := x.ask(x.Server)
	if status, _ := x.src.Do("GET", wait, ""); status != http.StatusUnauthorized {
		t.Errorf("the connecting device waits: status %d", status)
	}
	if err := x.Register.Confirm(x.Context(), db.Actor{Kind: "cli"}, id); err != nil {
		t.Fatal(err)
	}
	other, err := x.get(x.other, wait[:len(wait)-len("ann")]+"root")
	if err != nil || !other.Reject {
		t.Errorf("an approval for another local user: %+v, %v", other, err)
	}
}
