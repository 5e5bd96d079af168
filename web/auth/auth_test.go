package auth

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/db"
)

// A rig is a database with API keys and a Checker.
type rig struct {
	t       *testing.T
	at      time.Time
	store   *db.Store
	tailnet db.TailnetID
	checker *Checker
}

// Do is the Ledger of the rig.
func (g *rig) Do(ctx context.Context, a db.Actor, fn func(*db.Tx) error) (db.Revision, error) {
	return g.store.Update(ctx, g.tailnet, a, fn)
}

func newRig(t *testing.T) *rig {
	t.Helper()
	g := &rig{t: t, at: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)}
	now := func() time.Time { return g.at }
	var err error
	if g.store, err = db.Open(t.Context(), db.Config{Path: filepath.Join(t.TempDir(), "signalbox.db"), Now: now}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.store.Close() })
	if g.tailnet, _, err = g.store.Bootstrap(t.Context(), "default", func(*db.Tx) error { return nil }); err != nil {
		t.Fatal(err)
	}
	g.checker = New(Config{Store: g.store, Ledger: g, Now: now})
	return g
}

// key makes an API key, changed by edit.
func (g *rig) key(edit func(*db.APIKey)) string {
	g.t.Helper()
	secret, keyID, hash := db.NewKey(db.KeyAPI)
	_, err := g.Do(g.t.Context(), db.Actor{Kind: "system"}, func(tx *db.Tx) error {
		k := &db.APIKey{KeyID: keyID, Hash: hash, Tailnet: tx.Tailnet(), Description: "test", Created: tx.Now()}
		if edit != nil {
			edit(k)
		}
		return tx.CreateAPIKey(k)
	})
	if err != nil {
		g.t.Fatal(err)
	}
	return secret
}

// forge is a well-formed key that was never made. It has the id of like when
// that is a key.
func forge(like string) string {
	secret, keyID, _ := db.NewKey(db.KeyAPI)
	if like == "" {
		return secret
	}
	_, likeID, _, _ := db.ParseKey(like)
	body := strings.Replace(secret[:len(secret)-6], keyID, likeID, 1)
	const digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	sum := crc32.ChecksumIEEE([]byte(body))
	check := make([]byte, 6)
	for i := range check {
		check[5-i] = digits[sum%62]
		sum /= 62
	}
	return body + string(check)
}

func (g *rig) check(authorization, remote string) (db.Actor, error) {
	r := httptest.NewRequest("GET", "/api/v1/health", nil)
	r.RemoteAddr = remote
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	return g.checker.Check(r)
}

const here = "192.0.2.1:1234"

func TestKeyNamesTheActor(t *testing.T) {
	g := newRig(t)
	secret := g.key(nil)
	_, keyID, _, _ := db.ParseKey(secret)
	r := httptest.NewRequest("GET", "/", nil)
	r.SetBasicAuth(secret, "")
	for _, h := range []string{"Bearer " + secret, "bearer  " + secret, r.Header.Get("Authorization")} {
		a, err := g.check(h, "[::ffff:192.0.2.1]:1234")
		if err != nil || a.Kind != "apikey" || a.KeyID != keyID || a.Source != "192.0.2.1" || a.ID == 0 {
			t.Errorf("%.12q: %+v, %v", h, a, err)
		}
	}
}

func TestEveryWrongCredentialLooksTheSame(t *testing.T) {
	g := newRig(t)
	good := g.key(nil)
	authSecret, _, _ := db.NewKey(db.KeyAuth)
	for name, secret := range map[string]string{
		"unknown":    forge(""),
		"other's id": forge(good),
		"expired":    g.key(func(k *db.APIKey) { k.Expires = g.at }),
		"revoked":    g.key(func(k *db.APIKey) { k.Revoked = g.at }),
		"mistyped":   good[:len(good)-1] + "!",
		"auth key":   authSecret,
		"empty":      "",
		"huge":       strings.Repeat("a", 100_000),
	} {
		g.at = g.at.Add(time.Minute)
		if a, err := g.check("Bearer "+secret, here); err != ErrCredential || a != (db.Actor{}) {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
	r := httptest.NewRequest("GET", "/", nil)
	r.Header["Authorization"] = []string{"Bearer " + good, "Bearer " + good}
	if _, err := g.checker.Check(r); err != ErrCredential {
		t.Errorf("two credentials: %v", err)
	}
}

func isLimited(err error) bool {
	var l *LimitError
	return errors.As(err, &l) && l.RetryAfter > 0
}

func TestFailuresAreLimitedBySource(t *testing.T) {
	g := newRig(t)
	for i := range failBurst {
		if _, err := g.check("Bearer "+forge(""), here); err != ErrCredential {
			t.Fatalf("failure %d: %v", i, err)
		}
	}
	for _, secret := range []string{forge(""), "nonsense"} {
		if _, err := g.check("Bearer "+secret, here); !isLimited(err) {
			t.Errorf("one more failure: %v, want a limit", err)
		}
	}
	if _, err := g.check("Bearer "+forge(""), "192.0.2.2:1"); err != ErrCredential {
		t.Errorf("another source: %v", err)
	}
	if _, err := g.check("", here); err != ErrCredential {
		t.Errorf("no credential at all: %v", err)
	}
	g.at = g.at.Add(time.Hour)
	if _, err := g.check("Bearer "+forge(""), here); err != ErrCredential {
		t.Errorf("an hour later: %v", err)
	}
}

// One /64 is one source.
func TestSourceOfIPv6IsItsNetwork(t *testing.T) {
	g := newRig(t)
	for range failBurst {
		g.check("Bearer "+forge(""), "[2001:db8::1]:1")
	}
	if _, err := g.check("Bearer "+forge(""), "[2001:db8::2]:1"); !isLimited(err) {
		t.Errorf("same /64: %v", err)
	}
	if _, err := g.check("Bearer "+forge(""), "[2001:db8:0:1::1]:1"); err != ErrCredential {
		t.Errorf("another /64: %v", err)
	}
}

// Failures at the same address, or with the same id, do not lock a key out.
func TestFailuresOfOthersDoNotLockAKeyOut(t *testing.T) {
	g := newRig(t)
	secret := g.key(nil)
	if _, err := g.check("Bearer "+secret, here); err != nil {
		t.Fatal(err)
	}
	for range 3 * failBurst {
		g.check("Bearer "+forge(""), here)
		g.check("Bearer "+forge(secret), here)
	}
	if _, err := g.check("Bearer "+secret, here); err != nil {
		t.Errorf("proven key at a failing source: %v", err)
	}
	if _, err := g.check("Bearer "+secret, "192.0.2.9:1"); err != nil {
		t.Errorf("proven key elsewhere: %v", err)
	}
}

// Guesses at one key from many sources share its id's failures.
func TestFailuresAreLimitedByKey(t *testing.T) {
	g := newRig(t)
	secret := g.key(nil)
	source := func(i int) string { return fmt.Sprintf("10.0.0.%d:1", i) }
	for i := range failBurst {
		if _, err := g.check("Bearer "+forge(secret), source(i+1)); err != ErrCredential {
			t.Fatalf("guess %d: %v", i, err)
		}
	}
	if _, err := g.check("Bearer "+forge(secret), source(77)); !isLimited(err) {
		t.Errorf("one more guess: %v, want a limit", err)
	}
	if _, err := g.check("Bearer "+secret, source(78)); err != nil {
		t.Errorf("the key itself: %v", err)
	}
}

func TestGoodRequestsAreLimitedByKey(t *testing.T) {
	g := newRig(t)
	secret, other := g.key(nil), g.key(nil)
	for i := range goodBurst {
		if _, err := g.check("Bearer "+secret, here); err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
	}
	if _, err := g.check("Bearer "+secret, here); !isLimited(err) {
		t.Errorf("one more: %v, want a limit", err)
	}
	if _, err := g.check("Bearer "+other, here); err != nil {
		t.Errorf("another key: %v", err)
	}
}

func TestRevocationActsAtOnce(t *testing.T) {
	g := newRig(t)
	secret := g.key(nil)
	_, keyID, _, _ := db.ParseKey(secret)
	if _, err := g.check("Bearer "+secret, here); err != nil {
		t.Fatal(err)
	}
	_, err := g.Do(t.Context(), db.Actor{}, func(tx *db.Tx) error {
		k, err := tx.APIKeyByKeyID(keyID)
		if err != nil {
			return err
		}
		return tx.DeleteAPIKey(k.ID)
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.check("Bearer "+secret, here); err != ErrCredential {
		t.Errorf("deleted key: %v", err)
	}
}

func TestUnixSocketIsAnAdministrator(t *testing.T) {
	g := newRig(t)
	r := httptest.NewRequest("GET", "/", nil)
	a, err := g.checker.Check(r.WithContext(Local(r.Context(), 1000)))
	if err != nil || a != (db.Actor{Kind: "cli", ID: 1000, Name: "uid 1000", Source: "unix"}) {
		t.Errorf("local actor = %+v, %v", a, err)
	}
}

func TestMiddleware(t *testing.T) {
	g := newRig(t)
	secret := g.key(nil)
	var seen db.Actor
	var denied error
	h := g.checker.Middleware(func(w http.ResponseWriter, _ *http.Request, err error) { denied = err; w.WriteHeader(499) })(
		http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen, _ = Actor(r.Context()) }))
	send := func(authorization string) *httptest.ResponseRecorder {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Authorization", authorization)
		rec := httptest.NewRecorder()
		seen, denied = db.Actor{}, nil
		h.ServeHTTP(rec, r)
		return rec
	}
	if rec := send("Bearer " + secret); rec.Code != 200 || seen.Kind != "apikey" || denied != nil {
		t.Errorf("good key: %d, actor %+v, denied %v", rec.Code, seen, denied)
	}
	if rec := send("Bearer x"); rec.Code != 499 || seen.Kind != "" || rec.Header().Get("WWW-Authenticate") == "" {
		t.Errorf("bad key: %d, actor %+v, header %v", rec.Code, seen, rec.Header())
	}
	for range failBurst {
		send("Bearer x")
	}
	if rec := send("Bearer x"); !isLimited(denied) || rec.Header().Get("Retry-After") != "1" {
		t.Errorf("limited: %v, header %v", denied, rec.Header())
	}
	g.store.Close()
	if rec := send("Bearer " + secret); rec.Code != 499 || seen.Kind != "" || errors.Is(denied, ErrCredential) || isLimited(denied) {
		t.Errorf("without a database: %d, actor %+v, denied %v", rec.Code, seen, denied)
	}
}

func TestLastSeenIsWrittenOnceAMinute(t *testing.T) {
	g := newRig(t)
	secret := g.key(nil)
	_, keyID, _, _ := db.ParseKey(secret)
	lastSeen := func() (at time.Time, rev db.Revision) {
		t.Helper()
		err := g.store.View(t.Context(), func(r *db.Reader) error {
			k, err := r.In(g.tailnet).APIKeyByKeyID(keyID)
			if err != nil {
				return err
			}
			at = k.LastSeen
			rev, err = r.In(g.tailnet).Revision()
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return at, rev
	}
	use := func() {
		t.Helper()
		if _, err := g.check("Bearer "+secret, here); err != nil {
			t.Fatal(err)
		}
		select {
		case <-g.checker.seen.wake:
			g.checker.seen.store(t.Context())
		default:
		}
	}
	use()
	at, first := lastSeen()
	if !at.Equal(g.at) {
		t.Errorf("last seen = %v, want %v", at, g.at)
	}
	g.at = g.at.Add(30 * time.Second)
	use()
	if _, rev := lastSeen(); rev != first {
		t.Errorf("revision %d after 30 s, want %d", rev, first)
	}
	g.at = g.at.Add(31 * time.Second)
	use()
	if at, _ := lastSeen(); !at.Equal(g.at) {
		t.Errorf("last seen = %v after a minute, want %v", at, g.at)
	}
}
