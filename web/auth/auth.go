// Package auth decides who calls the HTTP interfaces: it turns an API key or
// the fact of having come through the unix socket into a db.Actor.
//
// It owns the check of a credential and the rates at which credentials may
// fail. It never decides what an actor may do, sets no cookie, reads none, and
// sends no CORS header, so a browser has nothing to forge a request with.
//
// A request with "Authorization: Bearer tskey-api-…" takes this way: the shape
// and the check digits are tested without the database; the key is looked up
// by its id; the hashes are compared in constant time, against a fixed dummy
// when there is no such key; every way to be wrong gives one and the same
// answer. The handler behind finds the actor with Actor.
package auth

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/signalbox-net/signalbox/control/limit"
	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/web/listener"
)

// ErrCredential says that the request carries no valid credential. It is the
// same for a missing, malformed, unknown, expired and revoked one.
var ErrCredential = errors.New("a valid API key is required")

// A LimitError says that the caller must wait.
type LimitError struct{ RetryAfter time.Duration }

func (e *LimitError) Error() string { return "too many requests, try again later" }

// Config of a Checker.
type Config struct {
	// Store is where keys are looked up. Required.
	Store *db.Store
	// Ledger writes when a key was last used. Nil: that is not recorded.
	Ledger Ledger
	// Now is the clock. Nil: time.Now.
	Now func() time.Time
	// Log gets one line for each batch of last uses that could not be stored.
	// Nil: nothing is logged.
	Log *slog.Logger
}

// Ledger is the door for writes, *tailnet.Ledger.
type Ledger interface {
	Do(context.Context, db.Actor, func(*db.Tx) error) (db.Revision, error)
}

// A Checker knows callers by their credentials. Its Run records when keys were
// used; without it everything else works.
type Checker struct {
	store *db.Store
	now   func() time.Time
	seen  *sightings

	failures *limit.Table // by client address and by key id
	good     *limit.Table // successes by key id

	// proven remembers the start of the hashes that succeeded lately. A key in
	// it is examined even when its source has used up its failures: others at
	// the same address must not lock it out. The key's row still decides.
	proven [1024]atomic.Uint64
}

// Failed credentials: 10 at once and 1 a second, for each source and each key
// id. Good ones: 50 a second for each key.
const (
	failBurst, failRate = 10, 1
	goodBurst, goodRate = 100, 50
)

// New makes a Checker.
func New(c Config) *Checker {
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Checker{
		store:    c.Store,
		now:      c.Now,
		seen:     newSightings(c.Ledger, cmp.Or(c.Log, slog.New(slog.DiscardHandler))),
		failures: limit.New(failRate, failBurst),
		good:     limit.New(goodRate, goodBurst),
	}
}

type contextKey int

const (
	actorKey contextKey = iota
	localKey
)

// Local marks a connection that came through the unix socket: whoever can open
// the socket is an administrator. The listener uses it as http.Server's
// ConnContext with the user id of the peer (SO_PEERCRED); -1 is unknown.
func Local(ctx context.Context, uid int) context.Context {
	name := "unknown uid"
	if uid >= 0 {
		name = "uid " + strconv.Itoa(uid)
	}
	return context.WithValue(ctx, localKey, db.Actor{Kind: "cli", ID: int64(uid), Name: name, Source: "unix"})
}

// WithActor is a context in which Actor finds a.
func WithActor(ctx context.Context, a db.Actor) context.Context {
	return context.WithValue(ctx, actorKey, a)
}

// Actor is who makes the request of this context; false when nobody was
// authenticated.
func Actor(ctx context.Context) (db.Actor, bool) {
	a, ok := ctx.Value(actorKey).(db.Actor)
	return a, ok
}

// Middleware lets authenticated requests through with their actor in the
// context and gives all others to deny, with ErrCredential, a *LimitError, or
// a fault of the store.
func (c *Checker) Middleware(deny func(http.ResponseWriter, *http.Request, error)) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			a, err := c.Check(r)
			if err != nil {
				var wait *LimitError
				switch {
				case errors.As(err, &wait):
					w.Header().Set("Retry-After", strconv.Itoa(int(max(wait.RetryAfter, time.Second).Round(time.Second)/time.Second)))
				case errors.Is(err, ErrCredential):
					w.Header().Set("WWW-Authenticate", `Bearer realm="signalbox"`)
				}
				deny(w, r, err)
				return
			}
			next.ServeHTTP(w, r.WithContext(WithActor(r.Context(), a)))
		})
	}
}

// Check finds out who makes the request.
func (c *Checker) Check(r *http.Request) (db.Actor, error) {
	if a, ok := r.Context().Value(localKey).(db.Actor); ok {
		return a, nil
	}
	secret := credential(r)
	if secret == "" {
		return db.Actor{}, ErrCredential
	}
	now := c.now()
	addr := listener.ClientIP(r)
	source := limit.Addr(addr)
	kind, keyID, hash, err := db.ParseKey(secret)
	if err != nil || kind != db.KeyAPI {
		return db.Actor{}, c.fail(now, source)
	}
	if !c.isProven(hash) {
		if wait := c.failures.Wait(source, now); wait > 0 {
			return db.Actor{}, &LimitError{wait}
		}
	}
	byID := limit.Bytes([]byte(keyID))
	k, err := c.lookUp(r.Context(), keyID, hash, now)
	if errors.Is(err, ErrCredential) {
		return db.Actor{}, c.fail(now, source, byID)
	}
	if err != nil {
		return db.Actor{}, err
	}
	c.prove(hash)
	listener.Identify(r)
	if !c.good.Allow(byID, now) {
		return db.Actor{}, &LimitError{c.good.Wait(byID, now)}
	}
	c.seen.add(k, now)
	return db.Actor{Kind: "apikey", ID: k.ID, Name: k.Description, KeyID: k.KeyID, Source: addr.String()}, nil
}

// fail charges a failure to each of its accounts: the source, and the id of the
// key that was tried. A right secret is never refused for what others tried
// with its id, so nobody can lock a key out.
func (c *Checker) fail(now time.Time, accounts ...limit.Key) error {
	var wait time.Duration
	for _, k := range accounts {
		if !c.failures.Allow(k, now) {
			wait = max(wait, c.failures.Wait(k, now))
		}
	}
	if wait > 0 {
		return &LimitError{wait}
	}
	return ErrCredential
}

// lookUp finds the live key with this id and secret.
func (c *Checker) lookUp(ctx context.Context, keyID string, hash [32]byte, now time.Time) (*db.APIKey, error) {
	var k *db.APIKey
	err := c.store.View(ctx, func(r *db.Reader) error {
		var err error
		k, err = r.APIKeyByKeyID(keyID)
		return err
	})
	if err != nil && !errors.Is(err, db.ErrNotFound) {
		return nil, err
	}
	want := [32]byte{1} // an unknown id costs the same comparison
	if err == nil {
		want = k.Hash
	}
	match := db.KeyHashEqual(want, hash)
	if err != nil || !match {
		return nil, ErrCredential
	}
	if !k.Revoked.IsZero() || !k.Expires.IsZero() && !now.Before(k.Expires) {
		return nil, ErrCredential
	}
	return k, nil
}

func (c *Checker) place(hash [32]byte) (*atomic.Uint64, uint64) {
	i := binary.BigEndian.Uint64(hash[8:]) % uint64(len(c.proven))
	return &c.proven[i], binary.BigEndian.Uint64(hash[:])
}

func (c *Checker) isProven(hash [32]byte) bool {
	p, v := c.place(hash)
	return p.Load() == v
}

func (c *Checker) prove(hash [32]byte) {
	p, v := c.place(hash)
	p.Store(v)
}

// credential is the secret that the request presents: a bearer token, or the
// user name of basic authentication, which is how Tailscale's own tools send
// an API key. Empty when there is none or more than one.
func credential(r *http.Request) string {
	h := r.Header.Values("Authorization")
	if len(h) != 1 || len(h[0]) > 1024 {
		return ""
	}
	if user, _, ok := r.BasicAuth(); ok {
		return user
	}
	scheme, token, _ := strings.Cut(h[0], " ")
	if !strings.EqualFold(scheme, "bearer") {
		return ""
	}
	return strings.TrimSpace(token)
}
