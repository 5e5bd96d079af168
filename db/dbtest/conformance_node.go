package dbtest

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/db"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

func fullState() db.NodeState {
	return db.NodeState{
		DiscoKey: key.NewDisco().Public(),
		Endpoints: []tailcfg.Endpoint{
			{Addr: netip.MustParseAddrPort("192.0.2.7:41641"), Type: tailcfg.EndpointSTUN},
			{Addr: netip.MustParseAddrPort("[2001:db8::7]:41641"), Type: tailcfg.EndpointLocal},
		},
		HomeDERP: 999,
		Hostinfo: &tailcfg.Hostinfo{OS: "linux", Hostname: "Anna's laptop", RoutableIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}},
		Cap:      137, Online: true, Instance: 3,
		LastSeen: time.Date(2026, 11, 21, 13, 14, 15, 123456000, time.UTC),
	}
}

func testNodeRoundTrip(t *testing.T, f *fixture) {
	zone := time.FixedZone("east", 3*3600)
	n := &db.Node{
		MachineKey: key.NewMachine().Public(), NodeKey: key.NewNode().Public(), NLKey: key.NewNLPrivate().Public(),
		Tags: []string{"tag:web", "tag:db", "tag:web"}, Hostname: "Ännas Läptop", GivenName: "laptop",
		IPv4: netip.MustParseAddr("100.64.3.4"), IPv6: netip.MustParseAddr("fd7a:115c:a1e0::304"),
		ApprovedRoutes: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("0.0.0.0/0")},
		Expiry:         time.Date(2027, 5, 1, 2, 3, 4, 0, zone), Expired: true, LoggedOut: true, Ephemeral: true,
		AuthKeyID: 77, RegisterMethod: "authkey", State: fullState(),
	}
	f.update(func(tx *db.Tx) error { return tx.CreateNode(n) })
	if n.ID == 0 || n.Tailnet != f.tailnet || !n.Created.Equal(f.clock.Now()) {
		t.Errorf("CreateNode left %+v", n)
	}
	if s := string(n.StableID); len(s) != 18 || s[0] != 'n' || !strings.HasSuffix(s, "CNTRL") {
		t.Errorf("stable id %q", s)
	}
	want := *n
	want.Tags = []string{"tag:db", "tag:web"}
	want.ApprovedRoutes = []netip.Prefix{n.ApprovedRoutes[1], n.ApprovedRoutes[0]}
	want.Expiry = n.Expiry.UTC()
	f.view(func(r *db.Reader) error {
		for what, read := range map[string]func() (*db.Node, error){
			"Node":          func() (*db.Node, error) { return r.Node(n.ID) },
			"NodeByNodeKey": func() (*db.Node, error) { return r.NodeByNodeKey(n.NodeKey) },
			"NodesByMachineKey": func() (*db.Node, error) {
				l, err := r.NodesByMachineKey(n.MachineKey)
				if err != nil || len(l) != 1 {
					return nil, fmt.Errorf("%d nodes, %v", len(l), err)
				}
				return l[0], nil
			},
		} {
			got, err := read()
			if err != nil {
				t.Errorf("%s: %v", what, err)
			} else if !reflect.DeepEqual(got, &want) {
				t.Errorf("%s:\n got %+v\nwant %+v", what, got, &want)
			}
		}
		if _, err := r.NodeByNodeKey(key.NewNode().Public()); err != db.ErrNotFound {
			t.Errorf("an unknown node key: %v", err)
		}
		return nil
	})
}

func testNodeUniqueFields(t *testing.T, f *fixture) {
	first := f.node("first")
	for field, change := range map[string]func(*db.Node){
		"NodeKey":   func(n *db.Node) { n.NodeKey = first.NodeKey },
		"GivenName": func(n *db.Node) { n.GivenName = first.GivenName },
		"IPv4":      func(n *db.Node) { n.IPv4 = first.IPv4 },
		"IPv6":      func(n *db.Node) { n.IPv6 = first.IPv6 },
		"StableID":  func(n *db.Node) { n.StableID = first.StableID },
	} {
		second := NewNode(f.user)
		f.update(func(tx *db.Tx) error {
			var err error
			if second.IPv4, second.IPv6, err = tx.AllocateAddrs(pools); err != nil {
				return err
			}
			second.GivenName = "second-" + strings.ToLower(field)
			clash := *second
			change(&clash)
			err = tx.CreateNode(&clash)
			if exists, ok := errors.AsType[*db.ExistsError](err); !errors.Is(err, db.ErrExists) || !ok || exists.Field != field {
				t.Errorf("create with the %s of another node: %v", field, err)
			}
			// The transaction goes on after a refused statement.
			if err := tx.CreateNode(second); err != nil {
				return err
			}
			if field != "StableID" { // PutNode does not write identity again
				clash = *second
				change(&clash)
				err = tx.PutNode(&clash)
				if exists, ok := errors.AsType[*db.ExistsError](err); !ok || exists.Field != field {
					t.Errorf("put with the %s of another node: %v", field, err)
				}
			}
			second.Hostname = "went on"
			return tx.PutNode(second)
		})
		f.view(func(r *db.Reader) error {
			got, err := r.Node(second.ID)
			if err == nil && got.Hostname != "went on" {
				t.Errorf("%s: the put after the refused one is lost", field)
			}
			return err
		})
	}
}

func testNodeInvalid(t *testing.T, f *fixture) {
	for field, change := range map[string]func(*db.Node){
		"NodeKey":    func(n *db.Node) { n.NodeKey = key.NodePublic{} },
		"MachineKey": func(n *db.Node) { n.MachineKey = key.MachinePublic{} },
		"GivenName":  func(n *db.Node) { n.GivenName = "Not_A_Label" },
		"User":       func(n *db.Node) { n.User = 0 },
		"IPv4":       func(n *db.Node) { n.IPv4, n.IPv6 = netip.Addr{}, netip.Addr{} },
		"IPv6":       func(n *db.Node) { n.IPv6 = n.IPv4 },
	} {
		err := f.try(func(tx *db.Tx) error {
			n := NewNode(f.user)
			n.GivenName, n.IPv4 = "fine", netip.MustParseAddr("100.64.0.9")
			change(n)
			return tx.CreateNode(n)
		})
		if invalid, ok := errors.AsType[*db.InvalidError](err); !ok || invalid.Field != field {
			t.Errorf("bad %s: got %v", field, err)
		}
	}
	err := f.try(func(tx *db.Tx) error {
		n := NewNode(&db.User{ID: 999})
		return Register(tx, n, pools, "orphan")
	})
	if invalid, ok := errors.AsType[*db.InvalidError](err); !ok || invalid.Field != "User" {
		t.Errorf("a user who does not exist: %v", err)
	}
}

func testNodePut(t *testing.T, f *fixture) {
	n := f.node("one")
	before := f.revision()
	f.update(func(tx *db.Tx) error { return tx.PutNode(n) })
	if rev := f.revision(); rev != before {
		t.Errorf("putting a node as it is made revision %d", rev)
	}
	changed := *n
	changed.NodeKey = key.NewNode().Public()
	changed.User, changed.Tags = 0, []string{"tag:server"}
	changed.Hostname, changed.GivenName = "", "two"
	changed.Expiry = f.clock.Now().Add(time.Hour)
	changed.Created, changed.StableID = f.clock.Now().Add(time.Hour), "other"
	changed.State = fullState()
	f.update(func(tx *db.Tx) error { return tx.PutNode(&changed) })
	f.view(func(r *db.Reader) error {
		got, err := r.Node(n.ID)
		want := changed
		want.Created, want.StableID, want.State = n.Created, n.StableID, n.State
		if err == nil && !reflect.DeepEqual(got, &want) {
			t.Errorf("\n got %+v\nwant %+v", got, &want)
		}
		if _, err := r.NodeByNodeKey(n.NodeKey); err != db.ErrNotFound {
			t.Errorf("the old node key is still known: %v", err)
		}
		return err
	})
	err := f.try(func(tx *db.Tx) error {
		gone := changed
		gone.ID = 4711
		return tx.PutNode(&gone)
	})
	if !errors.Is(err, db.ErrNotFound) {
		t.Errorf("put of a node that does not exist: %v", err)
	}
}

func testNodeStates(t *testing.T, f *fixture) {
	const n = 600 // more than one statement holds
	states := map[tailcfg.NodeID]db.NodeState{}
	for i := 0; i < n; {
		f.update(func(tx *db.Tx) error {
			for range 50 {
				node := NewNode(f.user)
				node.IPv4 = netip.AddrFrom4([4]byte{100, 64, byte(1 + i/250), byte(1 + i%250)})
				node.GivenName = fmt.Sprintf("n%d", i)
				if err := tx.CreateNode(node); err != nil {
					return err
				}
				states[node.ID] = db.NodeState{DiscoKey: key.NewDisco().Public(), HomeDERP: i, Online: i%2 == 0}
				i++
			}
			return nil
		})
	}
	states[1<<40] = db.NodeState{HomeDERP: 1} // was deleted meanwhile
	before := f.revision()
	rev := f.update(func(tx *db.Tx) error { return tx.PutNodeStates(states) })
	delete(states, 1<<40)
	b := f.follow(before)
	if rev != before+1 || len(b.Changes) != n || len(b.Nodes) != n {
		t.Fatalf("revision %d, %d changes, %d nodes; want %d, %d, %d", rev, len(b.Changes), len(b.Nodes), before+1, n, n)
	}
	for id, want := range states {
		if got := b.Nodes[id]; !reflect.DeepEqual(got.State, want) {
			t.Fatalf("state of node %d:\n got %+v\nwant %+v", id, got.State, want)
		}
	}
	if err := f.try(func(tx *db.Tx) error { return tx.PutNodeState(1<<40, db.NodeState{}) }); !errors.Is(err, db.ErrNotFound) {
		t.Errorf("state of a node that does not exist: %v", err)
	}
	full := fullState()
	first := b.Changes[0].Entity
	f.update(func(tx *db.Tx) error { return tx.PutNodeState(tailcfg.NodeID(first), full) })
	f.view(func(r *db.Reader) error {
		got, err := r.Node(tailcfg.NodeID(first))
		if err == nil && !reflect.DeepEqual(got.State, full) {
			t.Errorf("\n got %+v\nwant %+v", got.State, full)
		}
		return err
	})
}

func testNodeIDsNeverReused(t *testing.T, f *fixture) {
	seen := map[tailcfg.NodeID]bool{}
	for range 4 {
		n := f.node("again")
		if seen[n.ID] {
			t.Fatalf("node id %d came up twice", n.ID)
		}
		seen[n.ID] = true
		f.update(func(tx *db.Tx) error { return tx.DeleteNode(n.ID) })
	}
	var last tailcfg.UserID
	for range 3 {
		u := &db.User{Name: "temp"}
		f.update(func(tx *db.Tx) error { return tx.CreateUser(u) })
		if u.ID <= last || u.ID >= 2147400000 {
			t.Fatalf("user id %d after %d", u.ID, last)
		}
		last = u.ID
		f.update(func(tx *db.Tx) error { return tx.DeleteUser(u.ID) })
	}
}

// Texts that PostgreSQL refuses come from clients: they must not make a write
// fail.
func testHostileText(t *testing.T, f *fixture) {
	n := f.node("hostile")
	n.Hostname = "a\x00b\xffc"
	n.State.Hostinfo = &tailcfg.Hostinfo{Hostname: "x\x00y\xff", OS: strings.Repeat("'\"\\", 100)}
	n.Tags = nil
	f.update(func(tx *db.Tx) error {
		if err := tx.PutNode(n); err != nil {
			return err
		}
		if err := tx.PutNodeState(n.ID, n.State); err != nil {
			return err
		}
		a := &db.AuthRequest{Hash: [32]byte{1}, Kind: db.AuthRequestRegister, MachineKey: n.MachineKey, Source: "\x00", Message: "\xff\x00"}
		if err := tx.CreateAuthRequest(a); err != nil {
			return err
		}
		if _, err := tx.PutSetting("dns", []byte("{\"a\": \"\xff\"}")); err != nil {
			return err
		}
		return tx.Audit("act\x00", "t\xff", n.State.Hostinfo, "\x00")
	})
	f.view(func(r *db.Reader) error {
		got, err := r.Node(n.ID)
		if err != nil {
			return err
		}
		if got.Hostname != "ab\uFFFDc" || got.State.Hostinfo.Hostname != "x\x00y\uFFFD" {
			t.Errorf("stored %q and %q", got.Hostname, got.State.Hostinfo.Hostname)
		}
		for _, name := range []string{"a\x00", "\xff", "' OR 1=1 --", "%"} {
			if _, err := r.UserByName(name); err != db.ErrNotFound {
				t.Errorf("user %q: %v", name, err)
			}
			if _, err := r.APIKeyByKeyID(name); err != db.ErrNotFound {
				t.Errorf("API key %q: %v", name, err)
			}
			if _, err := r.UserByEmail(name); err != db.ErrNotFound {
				t.Errorf("email %q: %v", name, err)
			}
		}
		_, err = r.VerifyAudit()
		return err
	})
	for _, name := range []string{"a\x00", "\xff", "' OR 1=1 --", "%"} {
		err := f.try(func(tx *db.Tx) error {
			_, err := tx.RedeemAuthKey(name, [32]byte{}, n.MachineKey)
			return err
		})
		if !errors.Is(err, db.ErrNotFound) {
			t.Errorf("auth key %q: %v", name, err)
		}
	}
}
