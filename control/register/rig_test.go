package register_test

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control"
	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/db"
)

var admin = db.Actor{Kind: "cli", Name: "test"}

// rig is a server with helpers for registrations.
type rig struct {
	*controltest.Server
	noted notes
}

func start(t *testing.T, opts controltest.Options) rig {
	t.Helper()
	noted := make(notes, 1)
	change := opts.Change
	opts.Change = func(c *control.Config) {
		c.Log = slog.New(noted)
		if change != nil {
			change(c)
		}
	}
	return rig{controltest.Start(t, opts), noted}
}

// notes is a log handler that tells when the server notes who waits for a login.
type notes chan struct{}

func (n notes) Enabled(context.Context, slog.Level) bool { return true }
func (n notes) WithAttrs([]slog.Attr) slog.Handler       { return n }
func (n notes) WithGroup(string) slog.Handler            { return n }
func (n notes) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "login followed" {
		select {
		case n <- struct{}{}:
		default:
		}
	}
	return nil
}

// waitFollowed waits until n pending logins are noted as followed.
func (g rig) waitFollowed(n int) {
	g.Helper()
	timeout := time.After(controltest.Patience)
	for {
		count := 0
		for _, a := range g.logins() {
			if a.Followed {
				count++
			}
		}
		if count == n {
			return
		}
		select {
		case <-g.noted:
		case <-timeout:
			g.Fatalf("%d logins are followed, want %d", count, n)
		}
	}
}

// keyOf stores a key of alice's with changes.
func (g rig) keyOf(change func(*db.AuthKey)) string {
	g.Helper()
	k := db.AuthKey{User: g.User("alice")}
	if change != nil {
		change(&k)
	}
	return g.AuthKey(k)
}

func reusable(k *db.AuthKey) { k.Reusable = true }

// register sends the client's request with an auth key and changes.
func (g rig) register(c *controltest.Client, key string, change func(*tailcfg.RegisterRequest)) *tailcfg.RegisterResponse {
	g.Helper()
	req := c.RegisterRequest(key)
	if change != nil {
		change(req)
	}
	resp, status := c.Register(req)
	if resp == nil {
		g.Fatalf("register: status %d", status)
	}
	return resp
}

func (g rig) welcome(resp *tailcfg.RegisterResponse) {
	g.Helper()
	if resp.Error != "" || resp.AuthURL != "" || resp.NodeKeyExpired || !resp.MachineAuthorized {
		g.Fatalf("not welcome: %+v", resp)
	}
}

func (g rig) refused(resp *tailcfg.RegisterResponse, text string) {
	g.Helper()
	if !strings.Contains(resp.Error, text) || resp.MachineAuthorized || resp.AuthURL != "" || resp.NodeKeyExpired {
		g.Fatalf("got %+v, want an error with %q", resp, text)
	}
}

// login is an interactive login that began.
func (g rig) login(c *controltest.Client, change func(*tailcfg.RegisterRequest)) (url string) {
	g.Helper()
	resp := g.register(c, "", change)
	if !strings.HasPrefix(resp.AuthURL, "http://127.0.0.1/register/") || resp.Error != "" || resp.NodeKeyExpired {
		g.Fatalf("got %+v, want an AuthURL", resp)
	}
	return resp.AuthURL
}

func (g rig) approve(url, user string) *db.Node {
	g.Helper()
	n, err := g.Register.Approve(g.Context(), admin, url, g.User(user))
	if err != nil {
		g.Fatalf("approve: %v", err)
	}
	return n
}

// followUp is a follow-up request under way.
type followUp struct {
	g      rig
	answer chan *tailcfg.RegisterResponse
	cancel context.CancelFunc
}

// follow sends a follow-up on a connection of its own and returns when the server has noted that the client waits.
func (g rig) follow(c *controltest.Client, url string) *followUp {
	g.Helper()
	req := c.RegisterRequest("")
	req.Followup = url
	ctx, cancel := context.WithCancel(context.Background())
	g.Cleanup(cancel)
	f := &followUp{g, make(chan *tailcfg.RegisterResponse, 1), cancel}
	own := c.On(g.Server)
	go func() {
		resp := &tailcfg.RegisterResponse{Error: "test: no answer"}
		if res, err := own.Send(ctx, "POST", "/machine/register", req); err == nil {
			text, _ := io.ReadAll(res.Body)
			res.Body.Close()
			if err := json.Unmarshal(text, resp); err != nil {
				resp.Error = "test: " + res.Status
			}
		}
		f.answer <- resp
	}()
	return f
}

func (f *followUp) wait() *tailcfg.RegisterResponse {
	f.g.Helper()
	select {
	case resp := <-f.answer:
		return resp
	case <-time.After(controltest.Patience):
		f.g.Fatal("the follow-up has no answer")
		return nil
	}
}

func (f *followUp) silent() {
	f.g.Helper()
	select {
	case resp := <-f.answer:
		f.g.Fatalf("the follow-up was answered: %+v", resp)
	default:
	}
}

// uses is how many machines a key has admitted.
func (g rig) uses(secret string) int {
	g.Helper()
	_, keyID, _, err := db.ParseKey(secret)
	if err != nil {
		g.Fatal(err)
	}
	var uses int
	err = g.Store.View(g.Context(), func(r *db.Reader) error {
		keys, err := r.In(g.Tailnet).AuthKeys()
		for _, k := range keys {
			if k.KeyID == keyID {
				uses = k.Uses
			}
		}
		return err
	})
	if err != nil {
		g.Fatal(err)
	}
	return uses
}

func (g rig) logins() (list []*db.AuthRequest) {
	g.Helper()
	err := g.Store.View(g.Context(), func(r *db.Reader) (err error) {
		list, err = r.In(g.Tailnet).AuthRequests()
		return err
	})
	if err != nil {
		g.Fatal(err)
	}
	return list
}
