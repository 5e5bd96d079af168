package apiv1

import (
	"strings"
	"testing"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control/register"
	"github.com/signalbox-net/signalbox/db"
)

const testAuthID = "0123456789ABCDEFGHJKMNPQKTRX482Q"

// newLoginWorld is a world with a registrar.
func newLoginWorld(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.config.Register = register.New(register.Config{
		Store: w.store, Replica: w.replica, Ledger: w.ledger, ServerURL: "https://mesh.example.com", IDKey: make([]byte, 32), Pools: testPools, Now: w.now,
	})
	w.handler = New(w.config)
	return w
}

// ask makes a device, or an SSH session, wait under testAuthID.
func (w *world) ask(kind string) {
	w.t.Helper()
	w.askAs(testAuthID, kind)
}

func (w *world) askAs(id, kind string) {
	w.t.Helper()
	w.do(func(tx *db.Tx) error {
		return tx.CreateAuthRequest(&db.AuthRequest{
			Hash: register.HashID(id), Kind: kind, Tailnet: tx.Tailnet(), MachineKey: key.NewMachine().Public(), NodeKey: key.NewNode().Public(),
			Hostinfo: &tailcfg.Hostinfo{Hostname: "Kitchen Pi"}, Source: "192.0.2.1", Created: tx.Now(), Expires: tx.Now().Add(register.LoginTTL), State: db.AuthRequestPending,
		})
	})
}

func TestAuthRegisterMakesTheDeviceANode(t *testing.T) {
	w := newLoginWorld(t)
	w.ask(db.AuthRequestRegister)
	w.refused(404, "no such user", "POST", "/api/v1/auth/register", AuthRegisterRequest{User: "nobody", AuthID: testAuthID})
	w.refused(404, "may have expired", "POST", "/api/v1/auth/register", AuthRegisterRequest{User: "alice", AuthID: strings.Repeat("Z", 32)})
	n := get[NodeResponse](w, "POST", "/api/v1/auth/register", AuthRegisterRequest{User: "alice", AuthID: strings.ToLower(testAuthID)}).Node
	if n.ID == 0 || n.GivenName != "kitchen-pi" || n.User.Name != "alice" || n.RegisterMethod != RegisterCLI || len(n.IPAddresses) != 2 {
		t.Errorf("node = %+v", n)
	}
	if w.replica.Current().Node(tailcfg.NodeID(n.ID)) == nil {
		t.Error("the answer came before the snapshot")
	}
	if a := w.lastAudit(); a.Action != "node.register" || a.Actor.Kind != "apikey" {
		t.Errorf("audit = %+v", a)
	}
	w.refused(409, "decided already", "POST", "/api/v1/auth/register", AuthRegisterRequest{User: "alice", AuthID: testAuthID})
}

// The user may be given by id or e-mail address as well.
func TestAuthRegisterFindsTheUser(t *testing.T) {
	for _, user := range []string{"1", "alice@example.com"} {
		w := newLoginWorld(t)
		w.ask(db.AuthRequestRegister)
		if n := get[NodeResponse](w, "POST", "/api/v1/auth/register", AuthRegisterRequest{User: user, AuthID: testAuthID}).Node; n.User.Name != "alice" {
			t.Errorf("user %q: %+v", user, n.User)
		}
	}
}

func TestAuthRequestExpires(t *testing.T) {
	w := newLoginWorld(t)
	w.ask(db.AuthRequestRegister)
	w.clock.Add(int64(15 * time.Minute))
	w.refused(404, "may have expired", "POST", "/api/v1/auth/register", AuthRegisterRequest{User: "alice", AuthID: testAuthID})
}

func TestAuthRejectAndApprove(t *testing.T) {
	w := newLoginWorld(t)
	w.ask(db.AuthRequestRegister)
	w.refused(400, "needs a user", "POST", "/api/v1/auth/approve", AuthRequest{testAuthID})
	get[EmptyResponse](w, "POST", "/api/v1/auth/reject", AuthRequest{testAuthID})
	w.refused(409, "decided already", "POST", "/api/v1/auth/reject", AuthRequest{testAuthID})
	w.refused(400, "body.authId", "POST", "/api/v1/auth/reject", AuthRequest{})

	w = newLoginWorld(t)
	w.ask(db.AuthRequestSSH)
	get[EmptyResponse](w, "POST", "/api/v1/auth/approve", AuthRequest{testAuthID})
	w.refused(409, "decided already", "POST", "/api/v1/auth/approve", AuthRequest{testAuthID})
}

// A pretended device is registered as a real one is, also by the old route.
func TestDebugNodeCanBeRegistered(t *testing.T) {
	w := newLoginWorld(t)
	req := DebugNodeRequest{User: "alice", Key: testAuthID, Name: "Test Box", Routes: []string{"10.0.0.0/8"}}
	n := get[NodeResponse](w, "POST", "/api/v1/debug/node", req).Node
	if n.ID != 0 || n.Name != "Test Box" || n.GivenName != "test-box" || len(n.AvailableRoutes) != 1 {
		t.Errorf("pretended node = %+v", n)
	}
	w.refused(409, "in use", "POST", "/api/v1/debug/node", req)
	real := get[NodeResponse](w, "POST", "/api/v1/node/register?user=alice&key="+testAuthID, nil).Node
	if real.ID == 0 || real.MachineKey != n.MachineKey || real.NodeKey != n.NodeKey || real.AvailableRoutes[0] != "10.0.0.0/8" {
		t.Errorf("registered node = %+v, pretended %+v", real, n)
	}
	w.refused(400, "query.key", "POST", "/api/v1/node/register?user=alice&key=nodekey:123", nil)
	w.refused(400, "body.routes[0]", "POST", "/api/v1/debug/node", DebugNodeRequest{User: "alice", Key: testAuthID, Routes: []string{"127.0.0.0/8"}})
}

func TestBadInputToLoginsIsNeverAServerError(t *testing.T) {
	w := newLoginWorld(t)
	w.ask(db.AuthRequestRegister)
	for _, path := range []string{"/api/v1/auth/register", "/api/v1/auth/approve", "/api/v1/auth/reject", "/api/v1/node/register", "/api/v1/node/register?user=%00&key=%ff"} {
		for _, b := range []string{"", "null", "{", `{"user":1}`, `{"authId":[]}`, `{"user":"alice","authId":"` + strings.Repeat("Z", 100_000) + `"}`, `{"user":"\u0000","authId":"` + testAuthID + `"}`} {
			if rec := w.send("POST", path, b); rec.Code >= 500 {
				t.Errorf("POST %s with %.60q = %d %s", path, b, rec.Code, rec.Body)
			}
		}
	}
}
