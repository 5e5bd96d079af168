package apiv1

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/control"
	"github.com/signalbox-net/signalbox/control/controltest"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/web/auth"
)

// calling is a world whose nodes are played: a and b are connected to another server than the one that is asked, c has never been.
func calling(t *testing.T, wait time.Duration) (w *world, id map[string]int64, a *controltest.Stream) {
	t.Helper()
	g := controltest.Start(t, controltest.Options{Change: func(c *control.Config) { c.CallTimeout = wait }})
	other := g.Beside("other", g.Clock)
	w = &world{t: t, store: g.Store, tailnet: g.Tailnet, ledger: g.Ledger, replica: g.Replica}
	w.config = Config{
		Store: g.Store, Tailnet: g.Tailnet, Ledger: g.Ledger, Replica: g.Replica, Calls: g.C2N, Auth: auth.New(auth.Config{Store: g.Store}),
	}
	w.handler = New(w.config)
	secret, keyID, hash := db.NewKey(db.KeyAPI)
	w.apiKey = secret
	g.Update(func(tx *db.Tx) error {
		return tx.CreateAPIKey(&db.APIKey{KeyID: keyID, Hash: hash, Tailnet: tx.Tailnet()})
	})
	key := g.AuthKey(db.AuthKey{User: g.User("alice"), Reusable: true})
	id = map[string]int64{}
	for _, name := range []string{"a", "b", "c"} {
		c := g.NewClient(name).Join(key)
		id[name] = int64(c.ID())
		if name == "c" {
			continue
		}
		other.WaitNode(c.ID(), "the joined node", func(n *tailnet.Node) bool { return n != nil })
		st := c.On(other).Poll()
		if name == "a" {
			a = st
		}
		g.WaitNode(c.ID(), "its stream", func(n *tailnet.Node) bool { return n.State.Online })
	}
	a.Wait("its peer online", func(v *controltest.View) bool {
		p := v.Peer("b")
		return p != nil && p.Online != nil && *p.Online
	})
	return w, id, a
}

const ownNode = "/api/signalbox/v1/node/"

func TestCallANode(t *testing.T) {
	t.Parallel()
	w, id, _ := calling(t, controltest.Patience)
	ping, page := fmt.Sprint(ownNode, id["a"], "/ping"), fmt.Sprint(ownNode, id["a"], "/c2n")
	audited := func(action, after string) {
		t.Helper()
		if e := w.lastAudit(); e.Action != action || e.Target != fmt.Sprint("node:", id["a"]) || !strings.Contains(string(e.After), after) || e.Actor.Kind != "apikey" {
			t.Errorf("the last audit event is %+v, %s", e, e.After)
		}
	}
	if p := get[PingNodeResponse](w, "POST", ping, nil); p.Type != "echo" || p.Seconds <= 0 {
		t.Errorf("echo: %+v", p)
	}
	audited("node.ping", "echo")
	ip := w.replica.Current().NodeAt(1).IPv4.String()
	for by, want := range map[string]string{"": "disco", "disco": "disco", "tsmp": "TSMP", "ICMP": "ICMP", "peerapi": "peerapi"} {
		p := get[PingNodeResponse](w, "POST", ping, PingNodeRequest{IP: ip, Type: by})
		if p.Type != want || p.NodeName != "b" || p.Seconds <= 0 || p.IP != ip || p.Endpoint == "" || p.Error != "" {
			t.Errorf("by %q: %+v", by, p)
		}
		audited("node.ping", want)
	}
	if p := get[PingNodeResponse](w, "POST", ping, PingNodeRequest{IP: "100.100.1.1"}); p.Error != "no matching peer" {
		t.Errorf("nobody's address: %+v", p)
	}
	if c := get[CallNodeResponse](w, "POST", page, CallNodeRequest{"/debug/metrics"}); c.Status != 200 || c.Body != "magicsock_netcheck 1\n" || c.ContentType == "" || c.Seconds <= 0 {
		t.Errorf("metrics: %+v", c)
	}
	audited("node.c2n", "/debug/metrics")
	if c := get[CallNodeResponse](w, "POST", page, CallNodeRequest{"/debug/health"}); c.Status != 400 {
		t.Errorf("a page that the node does not have: %+v", c)
	}
}

func TestCallsThatAreRefused(t *testing.T) {
	t.Parallel()
	w, id, a := calling(t, 50*time.Millisecond)
	before := w.lastAudit().Number
	for _, c := range []struct {
		status                  int
		want, node, verb, input string
	}{
		{404, "4711", "4711", "ping", `{}`},
		{404, "4711", "4711", "c2n", `{"path": "/echo"}`},
		{400, "path.id", "x", "ping", `{}`},
		{400, "body.ip", "a", "ping", `{"ip": "peer"}`},
		{400, "body.ip", "a", "ping", `{"ip": "fe80::1%eth0"}`},
		{400, "body.ip", "a", "ping", `{"type": "disco"}`},
		{400, "body.ip", "a", "ping", `{"ip": 1}`},
		{400, "body.type", "a", "ping", `{"ip": "100.64.0.1", "type": "c2n"}`},
		{400, "body.type", "a", "ping", `{"ip": "100.64.0.1", "type": "disco,TSMP"}`},
		{400, "body.path", "a", "c2n", `{}`},
		{400, "body.path", "a", "c2n", `{"path": "/debug/prefs"}`},
		{400, "body.path", "a", "c2n", `{"path": "/echo\r\nX: y"}`},
		{400, "body", "a", "c2n", ``},
	} {
		node := c.node
		if n := id[c.node]; n != 0 {
			node = fmt.Sprint(n)
		}
		w.refused(c.status, c.want, "POST", ownNode+node+"/"+c.verb, c.input)
	}
	if now := w.lastAudit().Number; now != before {
		t.Errorf("%d audit events of calls that were not made", now-before)
	}
	w.refused(http.StatusConflict, "not connected", "POST", fmt.Sprint(ownNode, id["c"], "/ping"), nil)
	a.Silence(true)
	w.refused(http.StatusGatewayTimeout, "did not answer", "POST", fmt.Sprint(ownNode, id["a"], "/ping"), nil)
	w.refused(http.StatusGatewayTimeout, "did not answer", "POST", fmt.Sprint(ownNode, id["a"], "/c2n"), CallNodeRequest{"/echo"})
}
