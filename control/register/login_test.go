package register_test

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control"
	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/register"
	"github.com/signalbox-net/signalbox/db"
)

func TestInteractiveLogin(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Change: func(c *control.Config) { c.NodeExpiry = time.Hour }})
	a := g.NewClient("laptop")
	url := g.login(a, nil)
	if id, ok := register.ParseID(url); !ok || len(id) != 32 || !strings.HasSuffix(url, "/"+id) {
		t.Fatalf("address %q", url)
	}
	f := g.follow(a, url)
	f.silent()
	n := g.approve(strings.ToLower(url), "alice") // as people type it
	g.welcome(f.wait())
	if n.ID != a.ID() || n.User != g.User("alice") || n.GivenName != "laptop" || n.RegisterMethod != "cli" || n.Expiry.IsZero() {
		t.Errorf("node %+v", n)
	}
	// The answer may get lost on its way.
	g.welcome(g.follow(a, url).wait())
	g.welcome(g.register(a, "", nil))
	if _, err := g.Register.Approve(g.Context(), admin, url, g.User("bob")); !errors.Is(err, register.ErrDecided) {
		t.Errorf("second approval: %v", err)
	}
	g.Clock.Advance(register.LoginTTL + time.Minute)
	g.welcome(g.follow(a, url).wait())
}

func TestRepeatedLoginShowsTheSameAddress(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.NewClient("laptop")
	url := g.login(a, nil)
	if again := g.login(a, nil); again != url {
		t.Errorf("second address %q, first %q", again, url)
	}
	if again := g.login(a.On(g.Restart()), nil); again != url {
		t.Errorf("address %q after a restart, %q before", again, url)
	}
}

func TestLoginThatAsksForSomethingElseReplacesTheOld(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Policy: tagPolicy})
	a := g.NewClient("laptop")
	first := g.login(a, nil)
	a.Info.RequestTags = []string{"tag:x"}
	second := g.login(a, nil)
	if second == first {
		t.Fatal("the tags that were asked for later are lost")
	}
	if n := g.approve(second, "alice"); !slices.Equal(n.Tags, []string{"tag:x"}) {
		t.Errorf("tags %v", n.Tags)
	}
	if _, err := g.Register.Approve(g.Context(), admin, first, g.User("alice")); !errors.Is(err, register.ErrNoLogin) {
		t.Errorf("approval of the first one: %v", err)
	}
}

func TestApprovalChecksTags(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{Policy: tagPolicy})
	a := g.NewClient("laptop")
	a.Info.RequestTags = []string{"tag:x"}
	url := g.login(a, nil)
	_, err := g.Register.Approve(g.Context(), admin, url, g.User("bob"))
	if !errors.Is(err, register.ErrTagsRefused) || !strings.Contains(err.Error(), "requested tags are invalid or not permitted: [tag:x]") {
		t.Errorf("bob approves alice's tag: %v", err)
	}
	g.approve(url, "alice")
}

func TestRejectedLogin(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.NewClient("laptop")
	url := g.login(a, nil)
	f := g.follow(a, url)
	if err := g.Register.Reject(g.Context(), admin, url); err != nil {
		t.Fatal(err)
	}
	g.refused(f.wait(), "rejected by an administrator")
	if next := g.login(a, nil); next == url {
		t.Error("the rejected address is shown again")
	}
}

func TestExpiredLoginShowsANewAddress(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.NewClient("laptop")
	url := g.login(a, nil)
	f := g.follow(a, url)
	g.waitFollowed(1)
	g.Clock.Advance(register.LoginTTL + time.Second)
	if _, err := g.Register.Approve(g.Context(), admin, url, g.User("alice")); !errors.Is(err, register.ErrNoLogin) {
		t.Errorf("approval after its time: %v", err)
	}
	g.Update(func(tx *db.Tx) error {
		_, err := tx.SweepAuthRequests()
		return err
	})
	resp := f.wait()
	if resp.AuthURL == "" || resp.AuthURL == url || resp.Error != "" {
		t.Fatalf("got %+v, want a new address", resp)
	}
	if again := g.follow(a, url); again.wait().AuthURL != resp.AuthURL {
		t.Error("the old address does not lead to the new one")
	}
	g.approve(resp.AuthURL, "alice")
	g.welcome(g.follow(a, resp.AuthURL).wait())
}

func TestFollowUpOfAnotherMachinesLogin(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.NewClient("laptop")
	url := g.login(a, nil)
	f := g.follow(a, url)
	g.waitFollowed(1)
	thief := g.NewClient("thief")
	g.refused(g.follow(thief, url).wait(), "belongs to another device")
	sameNodeKey := g.NewClient("thief")
	sameNodeKey.Node = a.Node
	g.refused(g.follow(sameNodeKey, url).wait(), "belongs to another device")
	otherKey := a.On(g.Server)
	otherKey.Node = key.NewNode()
	g.refused(g.follow(otherKey, url).wait(), "belongs to another device")
	f.silent()
	g.approve(url, "alice")
	g.welcome(f.wait())
	g.refused(g.follow(thief, url).wait(), "belongs to another device")
	if n := g.Replica.Current().Node(a.ID()); n.MachineKey != a.Machine.Public() || n.NodeKey != a.Node.Public() {
		t.Errorf("node %+v", n.Node)
	}
}

func TestFollowUpWithAMadeUpAddress(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.NewClient("a")
	for _, url := range []string{"x", "http://127.0.0.1/register/", "http://127.0.0.1/register/" + strings.Repeat("!", 32), strings.Repeat("A", 10000)} {
		g.refused(g.register(a, "", func(r *tailcfg.RegisterRequest) { r.Followup = url }), "does not exist")
	}
	if resp := g.register(a, "", func(r *tailcfg.RegisterRequest) { r.Followup = strings.Repeat("A", 32) }); resp.AuthURL == "" {
		t.Errorf("an address nobody knows: %+v", resp)
	}
}

func TestAbandonedLoginIsNoLongerFollowed(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.NewClient("laptop")
	url := g.login(a, nil)
	first := g.follow(a, url)
	g.waitFollowed(1)
	// The client comes back before its first connection is seen to be dead.
	second := g.follow(a, url)
	second.silent()
	third := g.follow(a, url)
	first.cancel()
	first.wait()
	third.cancel()
	third.wait()
	g.waitFollowed(1)
	second.cancel()
	second.wait()
	g.waitFollowed(0)
	f := g.follow(a, url)
	g.approve(url, "alice")
	g.welcome(f.wait())
}

func TestReauthenticationKeepsTheNode(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	k := g.keyOf(reusable)
	a, b := g.NewClient("a").Join(k), g.NewClient("b").Join(k)
	before := *g.Replica.Current().Node(a.ID()).Node
	oldKey := a.On(g.Server) // the stream of the old key goes on meanwhile
	st, peer := oldKey.Poll(), b.Poll()
	old := a.Rekey()
	url := g.login(a, func(r *tailcfg.RegisterRequest) { r.OldNodeKey = old })
	f := g.follow(a, url)
	// Before the approval nothing changes.
	g.NewClient("c").Join(k)
	st.Wait("news on the old key", func(v *controltest.View) bool { return v.Peer("c") != nil })
	oldKey.HomeDERP = 905
	oldKey.Report()
	peer.Wait("a by its old key", func(v *controltest.View) bool {
		return v.Peer("a") != nil && v.Peer("a").Key == old && v.Peer("a").HomeDERP == 905
	})
	g.approve(url, "alice")
	g.welcome(f.wait())
	st.WaitEnd()
	after := g.Replica.Current().Node(a.ID())
	if after.ID != before.ID || after.StableID != before.StableID || after.IPv4 != before.IPv4 || after.IPv6 != before.IPv6 || after.GivenName != before.GivenName || after.NodeKey != a.Node.Public() {
		t.Errorf("node moved from %+v to %+v", before, after.Node)
	}
	peer.Wait("a by its new key", func(v *controltest.View) bool {
		return v.Peer("a").Key == a.Node.Public() && v.Peer("a").ID == before.ID && len(v.Peers) == 2
	})
	if status, _ := oldKey.Do("POST", "/machine/map", oldKey.MapRequest()); status != http.StatusUnauthorized {
		t.Errorf("a report by the old key: status %d", status)
	}
	a.Poll().Wait("peers", func(v *controltest.View) bool { return len(v.Peers) == 2 && v.Node.Key == a.Node.Public() })
}

func TestLoginOfAnotherPersonIsAnotherNode(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.NewClient("shared").Join(g.keyOf(nil))
	id := a.ID()
	old := a.Rekey()
	url := g.login(a, func(r *tailcfg.RegisterRequest) { r.OldNodeKey = old })
	if n := g.approve(url, "bob"); n.ID == id || n.User != g.User("bob") {
		t.Errorf("bob has %+v", n)
	}
	if n := g.Replica.Current().Node(id); n.NodeKey != old || n.User != g.User("alice") {
		t.Errorf("alice has %+v", n.Node)
	}
}

func TestApprovalErrors(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	url := g.login(g.NewClient("a"), nil)
	if _, err := g.Register.Approve(g.Context(), admin, url, 4711); !errors.Is(err, register.ErrUnknownUser) {
		t.Errorf("unknown user: %v", err)
	}
	if err := g.Register.Confirm(g.Context(), admin, url); !errors.Is(err, register.ErrNeedsUser) {
		t.Errorf("confirm without a user: %v", err)
	}
	for _, id := range []string{"", "x", strings.Repeat("U", 32)} {
		if err := g.Register.Reject(g.Context(), admin, id); err == nil || errors.Is(err, register.ErrNoLogin) {
			t.Errorf("%q: %v", id, err)
		}
	}
	if err := g.Register.Reject(g.Context(), admin, strings.Repeat("A", 32)); !errors.Is(err, register.ErrNoLogin) {
		t.Errorf("an id nobody has: %v", err)
	}
}

func TestStrangersCannotPushOutAFollowedLogin(t *testing.T) {
	t.Parallel()
	const room, mine = 40, 10
	g := start(t, controltest.Options{DB: func(c *db.Config) { c.MaxAuthRequests, c.MaxAuthRequestsPerSource = room, mine }})
	honest := g.NewClient("honest")
	honest.Source = "192.0.2.1"
	url := g.login(honest, nil)
	f := g.follow(honest, url)
	g.waitFollowed(1)
	for i := range 3 * room {
		c := g.NewClient("flood")
		c.Source = fmt.Sprintf("198.51.100.%d", i%7)
		if i%3 == 0 {
			c.Source = honest.Source // from the same network, too
		}
		if resp, status := c.Register(c.RegisterRequest("")); status >= 500 || resp != nil && resp.AuthURL == "" {
			t.Fatalf("login %d: status %d %+v", i, status, resp)
		}
		c.Close()
	}
	if n := len(g.logins()); n > room {
		t.Errorf("%d logins are kept, more than %d", n, room)
	}
	f.silent()
	g.approve(url, "alice")
	g.welcome(f.wait())
}

func TestPendingLoginIsSmall(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	c := g.NewClient(strings.Repeat("h", 5000))
	big := strings.Repeat("x", 400)
	c.Info.OS, c.Info.OSVersion, c.Info.DeviceModel, c.Info.PushDeviceToken, c.Info.Cloud = big, big, big, big, big
	for i := range 400 {
		c.Info.Services = append(c.Info.Services, tailcfg.Service{Proto: "tcp", Port: uint16(i), Description: "x"})
	}
	g.login(c, nil)
	if h := g.logins()[0].Hostinfo; len(h.Hostname)+len(h.OS)+len(h.OSVersion)+len(h.DeviceModel) > 512 || h.Services != nil || h.PushDeviceToken != "" {
		t.Errorf("stored %+v", h)
	}
	c.Info.RequestTags = []string{"tag:" + big, "tag:a" + big, "tag:b" + big}
	req := c.RegisterRequest("")
	req.Hostinfo.Services = nil
	resp, _ := c.Register(req)
	g.refused(resp, "too many tags")
}

func TestMadeUpLoginsOfOneMachineAreBounded(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	c := g.NewClient("a")
	refused := 0
	for range 40 {
		c.Rekey()
		resp, status := c.Register(c.RegisterRequest(""))
		switch {
		case status == http.StatusTooManyRequests:
			refused++
		case resp == nil || resp.AuthURL == "":
			t.Fatalf("status %d %+v", status, resp)
		}
	}
	if refused < 20 || len(g.logins()) != 1 {
		t.Errorf("%d of 40 were refused, %d logins are stored", refused, len(g.logins()))
	}
	// Others of the same network are not.
	g.login(g.NewClient("b"), nil)
}

func TestFailuresOfANetworkDoNotStopItsNodes(t *testing.T) {
	t.Parallel()
	g := start(t, controltest.Options{})
	a := g.NewClient("a").Join(g.keyOf(nil))
	limited := false
	for i := 0; i < 150 && !limited; i++ {
		c := g.NewClient("guess")
		resp, status := c.Register(c.RegisterRequest("tskey-auth-guess"))
		limited = status == http.StatusTooManyRequests
		if !limited && (resp == nil || resp.Error == "") {
			t.Fatalf("status %d %+v", status, resp)
		}
		c.Close()
	}
	if !limited {
		t.Fatal("guessing is never refused")
	}
	g.welcome(g.register(a, "", nil))
	old := a.Rekey()
	g.login(a, func(r *tailcfg.RegisterRequest) { r.OldNodeKey = old })
}
