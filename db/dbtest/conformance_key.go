package dbtest

import (
	"errors"
	"fmt"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/db"
	"tailscale.com/types/key"
)

func testUsers(t *testing.T, f *fixture) {
	u := &db.User{Name: "Bert@Example.com", DisplayName: "Bert", Email: "bert@example.com", Role: "member",
		Provider: "https://idp.example", ProviderID: "42", ProfilePicURL: "https://idp.example/42.png"}
	f.update(func(tx *db.Tx) error { return tx.CreateUser(u) })
	for field, clash := range map[string]*db.User{
		"Name":       {Name: "bert@example.COM"},
		"ProviderID": {Name: "other", Provider: u.Provider, ProviderID: u.ProviderID},
	} {
		err := f.try(func(tx *db.Tx) error { return tx.CreateUser(clash) })
		if exists, ok := errors.AsType[*db.ExistsError](err); !ok || exists.Field != field {
			t.Errorf("a second user with that %s: %v", field, err)
		}
	}
	// Local accounts have no provider id, and do not clash for that.
	f.update(func(tx *db.Tx) error { return tx.CreateUser(&db.User{Name: "local"}) })
	changed := *u
	changed.Role, changed.DisplayName = "admin", ""
	f.update(func(tx *db.Tx) error { return tx.PutUser(&changed) })
	f.view(func(r *db.Reader) error {
		for what, read := range map[string]func() (*db.User, error){
			"User":        func() (*db.User, error) { return r.User(u.ID) },
			"UserByName":  func() (*db.User, error) { return r.UserByName("BERT@example.com") },
			"UserByEmail": func() (*db.User, error) { return r.UserByEmail(u.Email) },
		} {
			if got, err := read(); err != nil || !reflect.DeepEqual(got, &changed) {
				t.Errorf("%s: got %+v, %v; want %+v", what, got, err, &changed)
			}
		}
		users, err := r.Users()
		if len(users) != 3 {
			t.Errorf("%d users, want 3", len(users))
		}
		return err
	})
	if err := f.try(func(tx *db.Tx) error { return tx.PutUser(&db.User{ID: 99, Name: "x"}) }); !errors.Is(err, db.ErrNotFound) {
		t.Errorf("put of a user who does not exist: %v", err)
	}
}

func testUserInUse(t *testing.T, f *fixture) {
	n := f.node("laptop")
	_, keyID, hash := db.NewKey(db.KeyAuth)
	k := &db.AuthKey{KeyID: keyID, Hash: hash, User: f.user.ID}
	f.update(func(tx *db.Tx) error { return tx.CreateAuthKey(k) })
	if err := f.try(func(tx *db.Tx) error { return tx.DeleteUser(f.user.ID) }); !errors.Is(err, db.ErrInUse) {
		t.Errorf("deleting an owner of nodes: %v", err)
	}
	before := f.revision()
	f.update(func(tx *db.Tx) error {
		if err := tx.DeleteNode(n.ID); err != nil {
			return err
		}
		return tx.DeleteUser(f.user.ID)
	})
	f.view(func(r *db.Reader) error {
		if _, err := r.AuthKey(k.ID); err != db.ErrNotFound {
			t.Errorf("the user's auth key: %v", err)
		}
		return nil
	})
	if b := f.follow(before); b.Users[f.user.ID] != nil || len(b.Users) != 1 {
		t.Errorf("followers are told %v, want the user to be gone", b.Users)
	}
	if err := f.try(func(tx *db.Tx) error { return tx.DeleteUser(f.user.ID) }); !errors.Is(err, db.ErrNotFound) {
		t.Errorf("deleting a user twice: %v", err)
	}
}

func (f *fixture) authKey(change func(*db.AuthKey)) (*db.AuthKey, [32]byte) {
	f.t.Helper()
	secret, keyID, hash := db.NewKey(db.KeyAuth)
	kind, parsedID, parsedHash, err := db.ParseKey(secret)
	if err != nil || kind != db.KeyAuth || parsedID != keyID || parsedHash != hash {
		f.t.Fatalf("ParseKey(%q) = %q, %q, %x, %v", secret, kind, parsedID, parsedHash, err)
	}
	k := &db.AuthKey{KeyID: keyID, Hash: hash, User: f.user.ID}
	change(k)
	f.update(func(tx *db.Tx) error { return tx.CreateAuthKey(k) })
	return k, hash
}

// redeem registers a node by a key, in the way that a login does.
func (f *fixture) redeem(k *db.AuthKey, hash [32]byte, m key.MachinePrivate) (*db.Node, error) {
	var n *db.Node
	_, err := f.Update(f.t.Context(), f.tailnet, admin, func(tx *db.Tx) error {
		if _, err := tx.RedeemAuthKey(k.KeyID, hash, m.Public()); err != nil {
			return err
		}
		have, err := tx.NodesByMachineKey(m.Public())
		if err != nil || len(have) > 0 {
			return err
		}
		n = NewNode(f.user)
		n.MachineKey, n.AuthKeyID = m.Public(), k.ID
		return Register(tx, n, pools, "joined")
	})
	return n, err
}

func testSingleUseKeyRace(t *testing.T, f *fixture) {
	k, hash := f.authKey(func(*db.AuthKey) {})
	machines := make([]key.MachinePrivate, 50)
	for i := range machines {
		machines[i] = key.NewMachine()
	}
	var mu sync.Mutex
	var winners []key.MachinePrivate
	var wg sync.WaitGroup
	start := make(chan struct{})
	for _, m := range machines {
		wg.Go(func() {
			<-start
			_, err := f.redeem(k, hash, m)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				winners = append(winners, m)
			} else if !errors.Is(err, db.ErrKeyUsed) {
				t.Errorf("a loser got %v, want ErrKeyUsed", err)
			}
		})
	}
	close(start)
	wg.Wait()
	if len(winners) != 1 {
		t.Fatalf("%d of 50 machines were admitted by a single-use key", len(winners))
	}
	// The winner whose answer was lost sends the same again.
	if _, err := f.redeem(k, hash, winners[0]); err != nil {
		t.Errorf("the winner's retry: %v", err)
	}
	f.view(func(r *db.Reader) error {
		nodes, err := r.Nodes()
		if len(nodes) != 1 {
			t.Errorf("%d nodes joined", len(nodes))
		}
		if got, _ := r.AuthKey(k.ID); got.Uses != 1 {
			t.Errorf("%d uses are counted", got.Uses)
		}
		return err
	})
}

func testAuthKeyLimit(t *testing.T, f *fixture) {
	now := f.clock.Now()
	create := func(tx *db.Tx, change func(*db.AuthKey)) error {
		_, keyID, hash := db.NewKey(db.KeyAuth)
		k := &db.AuthKey{KeyID: keyID, Hash: hash, User: f.user.ID, Expires: now.Add(time.Hour)}
		if change != nil {
			change(k)
		}
		return tx.CreateAuthKey(k)
	}
	f.update(func(tx *db.Tx) error {
		// What does not work is not counted.
		if err := create(tx, func(k *db.AuthKey) { k.Expires = now }); err != nil {
			return err
		}
		if err := create(tx, func(k *db.AuthKey) { k.Revoked = now }); err != nil {
			return err
		}
		if err := create(tx, func(k *db.AuthKey) { k.Uses = 1 }); err != nil {
			return err
		}
		if err := create(tx, func(k *db.AuthKey) { k.Uses, k.Reusable = 1, true }); err != nil {
			return err
		}
		return nil
	})
	// In pieces: an update has its time, and a busy machine takes seconds for all of them.
	for left := db.MaxLiveKeys - 1; left > 0; left -= 50 {
		f.update(func(tx *db.Tx) error {
			for range min(left, 50) {
				if err := create(tx, nil); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := f.try(func(tx *db.Tx) error { return create(tx, nil) }); !errors.Is(err, db.ErrLimit) {
		t.Errorf("one more: %v, want ErrLimit", err)
	}
	f.update(func(tx *db.Tx) error {
		return create(tx, func(k *db.AuthKey) { k.User, k.Tags = 0, []string{"tag:a"} })
	})
	f.clock.Advance(time.Hour)
	now = f.clock.Now()
	f.update(func(tx *db.Tx) error { return create(tx, nil) })
}

func testAuthKeyVerdicts(t *testing.T, f *fixture) {
	now := f.clock.Now()
	expired, expiredHash := f.authKey(func(k *db.AuthKey) { k.Expires = now })
	revoked, revokedHash := f.authKey(func(k *db.AuthKey) { k.Revoked = now })
	fresh, freshHash := f.authKey(func(k *db.AuthKey) {
		k.User, k.Tags, k.Ephemeral, k.Preauthorized = 0, []string{"tag:b", "tag:a"}, true, true
		k.Reusable, k.Description, k.Expires = true, "for CI", now.Add(time.Hour)
	})
	m := key.NewMachine().Public()
	for _, c := range []struct {
		what  string
		keyID string
		hash  [32]byte
		want  error
	}{
		{"expired", expired.KeyID, expiredHash, db.ErrKeyExpired},
		{"revoked", revoked.KeyID, revokedHash, db.ErrKeyRevoked},
		{"unknown", "k000000000000000", freshHash, db.ErrNotFound},
		{"another key's secret", fresh.KeyID, revokedHash, db.ErrNotFound},
		{"no secret", "k000000000000000", [32]byte{}, db.ErrNotFound},
	} {
		err := f.try(func(tx *db.Tx) error { _, err := tx.RedeemAuthKey(c.keyID, c.hash, m); return err })
		if !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.what, err, c.want)
		}
	}
	for range 3 {
		f.update(func(tx *db.Tx) error {
			_, err := tx.RedeemAuthKey(fresh.KeyID, freshHash, key.NewMachine().Public())
			return err
		})
	}
	want := *fresh
	want.Tags, want.Uses = []string{"tag:a", "tag:b"}, 3
	f.view(func(r *db.Reader) error {
		got, err := r.AuthKey(fresh.ID)
		if !reflect.DeepEqual(got, &want) {
			t.Errorf("\n got %+v\nwant %+v", got, &want)
		}
		all, _ := r.AuthKeys()
		if len(all) != 3 {
			t.Errorf("%d auth keys, want 3", len(all))
		}
		return err
	})
	// Putting a record that was read before must not take uses back.
	fresh.Revoked = now
	f.update(func(tx *db.Tx) error { return tx.PutAuthKey(fresh) })
	f.view(func(r *db.Reader) error {
		got, err := r.AuthKey(fresh.ID)
		if got.Uses != 3 || !got.Revoked.Equal(now) {
			t.Errorf("after revocation: %+v", got)
		}
		return err
	})
	f.update(func(tx *db.Tx) error { return tx.DeleteAuthKey(fresh.ID) })
	if err := f.try(func(tx *db.Tx) error { return tx.DeleteAuthKey(fresh.ID) }); !errors.Is(err, db.ErrNotFound) {
		t.Errorf("deleting a key twice: %v", err)
	}
}

func testSpentKeyAfterDeletion(t *testing.T, f *fixture) {
	single, singleHash := f.authKey(func(*db.AuthKey) {})
	reusable, reusableHash := f.authKey(func(k *db.AuthKey) { k.Reusable = true })
	for _, c := range []struct {
		k    *db.AuthKey
		hash [32]byte
		want error
		uses int
	}{{single, singleHash, db.ErrKeyUsed, 1}, {reusable, reusableHash, nil, 2}} {
		m := key.NewMachine()
		n, err := f.redeem(c.k, c.hash, m)
		if err != nil {
			t.Fatal(err)
		}
		f.update(func(tx *db.Tx) error { return tx.DeleteNode(n.ID) })
		if _, err := f.redeem(c.k, c.hash, m); !errors.Is(err, c.want) {
			t.Errorf("reusable=%v: after its node was deleted: %v, want %v", c.k.Reusable, err, c.want)
		}
		f.view(func(r *db.Reader) error {
			got, err := r.AuthKey(c.k.ID)
			if got.Uses != c.uses {
				t.Errorf("reusable=%v: %d uses, want %d", c.k.Reusable, got.Uses, c.uses)
			}
			return err
		})
	}
}

func testAPIKeys(t *testing.T, f *fixture) {
	_, keyID, hash := db.NewKey(db.KeyAPI)
	k := &db.APIKey{KeyID: keyID, Hash: hash, User: f.user.ID, Description: "ci", Expires: f.clock.Now().Add(time.Hour)}
	f.update(func(tx *db.Tx) error { return tx.CreateAPIKey(k) })
	if err := f.try(func(tx *db.Tx) error { return tx.CreateAPIKey(&db.APIKey{KeyID: keyID, Hash: hash}) }); !errors.Is(err, db.ErrExists) {
		t.Errorf("a second key of that id: %v", err)
	}
	k.LastSeen, k.Revoked = f.clock.Now(), f.clock.Now()
	f.update(func(tx *db.Tx) error { return tx.PutAPIKey(k) })
	f.view(func(r *db.Reader) error {
		got, err := r.APIKeyByKeyID(keyID)
		if !reflect.DeepEqual(got, k) {
			t.Errorf("\n got %+v\nwant %+v", got, k)
		}
		return err
	})
	f.update(func(tx *db.Tx) error { return tx.DeleteAPIKey(k.ID) })
	f.view(func(r *db.Reader) error {
		if all, err := r.APIKeys(); err != nil || len(all) != 0 {
			t.Errorf("%d keys are left, %v", len(all), err)
		}
		return nil
	})
}

func testAuthRequests(t *testing.T, f *fixture) {
	a := &db.AuthRequest{
		Hash: [32]byte{1, 2, 3}, Kind: db.AuthRequestRegister, MachineKey: key.NewMachine().Public(), NodeKey: key.NewNode().Public(),
		OldNodeKey: key.NewNode().Public(), NLKey: key.NewNLPrivate().Public(), Hostinfo: fullState().Hostinfo,
		Expiry: f.clock.Now().Add(time.Hour), Ephemeral: true, Cap: 137, Source: "192.0.2.1", Detail: []byte(`{"a":1}`),
	}
	before := f.revision()
	f.update(func(tx *db.Tx) error { return tx.CreateAuthRequest(a) })
	if a.State != db.AuthRequestPending || !a.Expires.Equal(f.clock.Now().Add(15*time.Minute)) {
		t.Errorf("CreateAuthRequest left state %q, expiry %v", a.State, a.Expires)
	}
	if rev := f.revision(); rev != before {
		t.Errorf("a stranger's login made revision %d", rev)
	}
	read := func(id [32]byte) (got *db.AuthRequest, err error) {
		f.view(func(r *db.Reader) error { got, err = r.AuthRequestByHash(id); return nil })
		return got, err
	}
	if got, err := read(a.Hash); err != nil || !reflect.DeepEqual(got, a) {
		t.Errorf("\n got %+v, %v\nwant %+v", got, err, a)
	}
	a.Opened, a.Followed = true, true
	f.update(func(tx *db.Tx) error { return tx.PutAuthRequest(a) })
	if rev := f.revision(); rev != before {
		t.Errorf("a follow-up poll made revision %d", rev)
	}
	a.State, a.User, a.Node = db.AuthRequestApproved, f.user.ID, 7
	f.update(func(tx *db.Tx) error { return tx.PutAuthRequest(a) })
	if b := f.follow(before); len(b.AuthRequests) != 1 || b.AuthRequests[0] != a.ID {
		t.Errorf("followers are told of %v, want %d", b.AuthRequests, a.ID)
	}

	// A newer login of the machine replaces it, and tells its follower.
	before = f.revision()
	newer := *a
	newer.Hash, newer.State, newer.Followed = [32]byte{9}, "", false
	f.update(func(tx *db.Tx) error { return tx.CreateAuthRequest(&newer) })
	if _, err := read(a.Hash); err != db.ErrNotFound {
		t.Errorf("the replaced request: %v", err)
	}
	if b := f.follow(before); len(b.AuthRequests) != 1 || b.AuthRequests[0] != a.ID {
		t.Errorf("followers are told of %v, want %d", b.AuthRequests, a.ID)
	}

	f.clock.Advance(15 * time.Minute)
	newer.Expires = f.clock.Now()
	if _, err := read(newer.Hash); err != db.ErrNotFound {
		t.Errorf("an expired request: %v", err)
	}
	f.update(func(tx *db.Tx) error {
		n, err := tx.SweepAuthRequests()
		if n != 1 {
			t.Errorf("%d swept, want 1", n)
		}
		return err
	})
}

func testAuthRequestEviction(t *testing.T, f *fixture) {
	made := 0
	create := func(tx *db.Tx, source string, opened bool) (*db.AuthRequest, error) {
		made++
		a := &db.AuthRequest{Hash: [32]byte{byte(made), byte(made >> 8), byte(made >> 16), 1}, Kind: db.AuthRequestRegister,
			MachineKey: key.NewMachine().Public(), Source: source, Opened: opened}
		return a, tx.CreateAuthRequest(a)
	}
	var honest, youngest, fresh *db.AuthRequest
	f.update(func(tx *db.Tx) (err error) {
		if honest, err = create(tx, "honest", false); err != nil {
			return err
		}
		for range 20 {
			if youngest, err = create(tx, "flood", false); err != nil {
				return err
			}
		}
		fresh, err = create(tx, "flood", false)
		return err
	})
	exists := func(a *db.AuthRequest) bool {
		var err error
		f.view(func(r *db.Reader) error { _, err = r.AuthRequest(a.ID); return nil })
		return err == nil
	}
	if !exists(honest) || exists(youngest) || !exists(fresh) {
		t.Errorf("one source over its limit: honest %v, its youngest %v, its newest %v; want true, false, true",
			exists(honest), exists(youngest), exists(fresh))
	}

	// Many sources: the one with most gives way, also for a stranger.
	var stranger *db.AuthRequest
	f.update(func(tx *db.Tx) (err error) {
		for i := range 79 {
			if _, err = create(tx, fmt.Sprintf("other%d", i%8), false); err != nil {
				return err
			}
		}
		if stranger, err = create(tx, "stranger", false); err != nil {
			return err
		}
		all, err := tx.AuthRequests()
		if len(all) != 100 {
			t.Errorf("%d requests wait, want 100", len(all))
		}
		return err
	})
	if !exists(honest) || !exists(stranger) || exists(fresh) {
		t.Errorf("all sources over the limit: honest %v, stranger %v, the largest source's youngest %v; want true, true, false",
			exists(honest), exists(stranger), exists(fresh))
	}

	// What a person has opened never goes.
	f.update(func(tx *db.Tx) error {
		for range 20 {
			if _, err := create(tx, "opened", true); err != nil {
				return err
			}
		}
		if _, err := create(tx, "opened", false); !errors.Is(err, db.ErrLimit) {
			t.Errorf("a source whose logins are all open: %v, want ErrLimit", err)
		}
		return nil
	})
}
