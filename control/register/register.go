// Package register serves /machine/register: how a device becomes a node, proves its key again, and leaves.
//
// Every way in ends in one place: admit, a transaction in which decide says which node the device is, or that it is a new one, and the rows
// are written. An auth key is redeemed in that same transaction, so there is no spent key without its node. A login that a person approves
// runs it at the moment of approval, and the device, which waits in a follow-up request, finds its node.
//
// What a person at the device can act on goes into RegisterResponse.Error, which clients show; HTTP errors are for what only an operator can
// mend. The package owns pending logins and nothing else: policy, maps and presence belong to others.
package register

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control/limit"
	"github.com/signalbox-net/signalbox/control/noise"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// Config configures a Registrar.
type Config struct {
	Store      *db.Store        // required
	Replica    *tailnet.Replica // required
	Ledger     *tailnet.Ledger  // required
	ServerURL  string           // required: base of the addresses that people open
	IDKey      []byte           // required: secret from which the ids of pending logins are made
	Pools      db.Pools
	NodeExpiry time.Duration // key expiry of people's nodes; 0 means never
	MaxNodes   int           // how many nodes the tailnet may have; 0 means 100,000
	Reserved   []string      // labels that no device may have
	// FarewellDue reports whether a map request of the two keys would be answered with the farewell of a deleted node. Nil means never.
	FarewellDue func(key.MachinePublic, key.NodePublic) bool
	Log         *slog.Logger // nil discards
	Now         func() time.Time
}

// A Registrar admits devices.
type Registrar struct {
	cfg Config
	log *slog.Logger

	machines *limit.Table  // failures by machine key
	sources  *limit.Table  // failures by source address
	everyone *limit.Bucket // failures of all

	mu      sync.Mutex // guards the following field
	waiters map[int64]map[chan struct{}]bool
}

// New returns a Registrar.
func New(cfg Config) *Registrar {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	r := &Registrar{
		cfg: cfg, log: cfg.Log, waiters: map[int64]map[chan struct{}]bool{},
		machines: limit.New(0.2, 10),
		sources:  limit.New(5, 60),
		everyone: limit.NewBucket(200, 200),
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	cfg.Replica.OnBatch(r.wake)
	return r
}

// MinVersion is the oldest client that may join: 1.80.
const MinVersion tailcfg.CapabilityVersion = 113

// maxBody is the largest register request that is read.
const maxBody = 256 << 10

// A refusal is what the person at the device is told.
type refusal string

func (r refusal) Error() string { return string(r) }

// errForeign answers a node key that belongs to another machine. It does not say so: the text is that of a key nobody has.
var errForeign = errors.New("node not found")

// ServeHTTP serves POST /machine/register.
func (r *Registrar) ServeHTTP(w http.ResponseWriter, hr *http.Request) {
	conn, ok := noise.Peer(hr.Context())
	if !ok {
		http.Error(w, "not a Noise connection", http.StatusBadRequest)
		return
	}
	req := new(tailcfg.RegisterRequest)
	body := http.MaxBytesReader(w, hr.Body, maxBody)
	err := json.NewDecoder(body).Decode(req)
	if err == nil {
		_, err = io.Copy(io.Discard, body)
	}
	if err != nil {
		if tooBig := (*http.MaxBytesError)(nil); errors.As(err, &tooBig) {
			http.Error(w, "register request is larger than 256 KiB", http.StatusRequestEntityTooLarge)
			return
		}
		http.Error(w, "register request is not valid JSON", http.StatusBadRequest)
		return
	}
	a := &attempt{Registrar: r, req: req, machine: conn.Machine, source: conn.Remote.Addr().Unmap()}
	if !a.admissible() {
		a.tooMany(hr.Context(), w)
		return
	}
	resp, err := a.serve(hr.Context())
	a.answer(w, hr, resp, err)
}

// An attempt is one register request.
type attempt struct {
	*Registrar
	req     *tailcfg.RegisterRequest
	machine key.MachinePublic
	source  netip.Addr
}

// admissible is false while the machine, or its network, pays for failures, and while strangers everywhere together fail too often. Others'
// failures do not stop machines that have a node.
func (a *attempt) admissible() bool {
	now := a.cfg.Now()
	if a.machines.Empty(machineKey(a.machine), now) {
		return false
	}
	return a.cfg.Replica.Current().HasMachine(a.machine) || !a.sources.Empty(limit.Addr(a.source), now) && !a.everyone.Empty(now)
}

// failed charges the source of a failure. What ends well is free: a whole company may enrol from one address.
func (a *attempt) failed() {
	now := a.cfg.Now()
	a.machines.Debit(machineKey(a.machine), now, 1)
	a.sources.Debit(limit.Addr(a.source), now, 1)
	a.everyone.Debit(now, 1)
}

func machineKey(m key.MachinePublic) limit.Key { return limit.Bytes([]byte(m.String())) }

// versionRetryAfter is the first client that waits as a 429 tells it to.
const versionRetryAfter tailcfg.CapabilityVersion = 137

// refusedAfter is how long a client that does not know 429 waits for its refusal: it asks again at once.
const refusedAfter = time.Second

func (a *attempt) tooMany(ctx context.Context, w http.ResponseWriter) {
	if a.req.Version >= versionRetryAfter {
		w.Header().Set("Retry-After", "5")
		http.Error(w, "too many failed attempts", http.StatusTooManyRequests)
		return
	}
	wait := time.NewTimer(refusedAfter)
	defer wait.Stop()
	select {
	case <-wait.C:
	case <-ctx.Done():
		return
	}
	writeJSON(w, &tailcfg.RegisterResponse{Error: "too many failed attempts; try again in a few seconds"})
}

func (a *attempt) answer(w http.ResponseWriter, hr *http.Request, resp *tailcfg.RegisterResponse, err error) {
	var no refusal
	switch {
	case err == nil:
		writeJSON(w, resp)
	case hr.Context().Err() != nil:
	case errors.As(err, &no):
		a.failed()
		a.log.Info("registration refused", "machine", a.machine.ShortString(), "source", a.source, "reason", no.Error())
		writeJSON(w, &tailcfg.RegisterResponse{Error: no.Error()})
	case errors.Is(err, errForeign), takenKey(err):
		a.failed()
		http.Error(w, errForeign.Error(), http.StatusUnauthorized)
	case errors.Is(err, db.ErrUnavailable):
		w.Header().Set("Retry-After", "5")
		http.Error(w, "the database is not available", http.StatusServiceUnavailable)
	default:
		a.log.Error("register", "machine", a.machine.ShortString(), "err", err)
		http.Error(w, "internal error", http.StatusInternalServerError)
	}
}

// takenKey reports that the node key became another node's since the snapshot was looked at.
func takenKey(err error) bool {
	e := (*db.ExistsError)(nil)
	return errors.As(err, &e) && e.Field == "NodeKey"
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

// serve sorts the request into one of the flows. The order matters: a logout names a known key and may carry an auth key too.
func (a *attempt) serve(ctx context.Context) (*tailcfg.RegisterResponse, error) {
	req := a.req
	if req.Version < MinVersion {
		return nil, refusal("this client is too old: Tailscale 1.80 or newer is needed")
	}
	if req.NodeKey.IsZero() {
		return nil, refusal("the request names no node key")
	}
	req.Hostinfo = tailnet.CleanHostinfo(req.Hostinfo)
	if req.Hostinfo == nil {
		req.Hostinfo = new(tailcfg.Hostinfo)
	}
	known := a.cfg.Replica.Current().ByNodeKey(req.NodeKey)
	if known == nil || known.Dead() {
		// It may have joined, or been renewed, at another server a moment ago.
		snap, err := a.cfg.Replica.CatchUp(ctx)
		if err != nil {
			return nil, err
		}
		known = snap.ByNodeKey(req.NodeKey)
	}
	if known != nil && known.MachineKey != a.machine {
		return nil, errForeign
	}
	switch {
	case known != nil && !req.Expiry.IsZero():
		return a.changeExpiry(ctx, known)
	case known == nil && a.logout():
		return &tailcfg.RegisterResponse{}, nil // of a node that was deleted; an auth key that comes with it is not to be spent
	case req.Followup != "":
		return a.followUp(ctx, known)
	case known != nil && known.Dead():
		return &tailcfg.RegisterResponse{NodeKeyExpired: true}, nil
	case known != nil:
		return a.welcome(known.Node), nil
	case req.Auth != nil && req.Auth.AuthKey != "":
		return a.byAuthKey(ctx, req.Auth.AuthKey)
	}
	if due, err := a.farewellDue(ctx); err != nil {
		return nil, err
	} else if due {
		return &tailcfg.RegisterResponse{MachineAuthorized: true}, nil
	}
	return a.begin(ctx)
}

// farewellDue reports whether the client is one of a node that was deleted while it was away and has not been told so yet. Such a client, told
// to log in here, would go on showing the network that it remembers; so it is let through to its map, which says that its key has ended.
func (a *attempt) farewellDue(ctx context.Context) (bool, error) {
	if a.cfg.FarewellDue == nil || !a.cfg.FarewellDue(a.machine, a.req.NodeKey) {
		return false, nil
	}
	err := a.cfg.Store.View(ctx, func(r *db.Reader) error {
		_, err := r.In(a.cfg.Ledger.Tailnet()).Tombstone(a.machine, a.req.NodeKey)
		return err
	})
	if errors.Is(err, db.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// logout reports whether the request asks to end the node key: by an expiry in the past.
func (a *attempt) logout() bool { return !a.req.Expiry.IsZero() && !a.req.Expiry.After(a.cfg.Now()) }

// changeExpiry serves logout and an earlier expiry. A later one changes nothing.
func (a *attempt) changeExpiry(ctx context.Context, n *tailnet.Node) (*tailcfg.RegisterResponse, error) {
	past := a.logout()
	_, err := a.cfg.Ledger.DoWait(ctx, a.actor(n.ID), func(tx *db.Tx) error {
		rec, err := tx.Node(n.ID)
		if err != nil {
			return err
		}
		switch {
		case rec.NodeKey != a.req.NodeKey: // renewed meanwhile: the old key has nothing to say
			return nil
		case past && rec.Ephemeral:
			if err := tx.DeleteNode(rec.ID); err != nil {
				return err
			}
			return tx.Audit("node.delete", target(rec), auditView(rec), nil)
		case past && rec.LoggedOut:
			return nil
		case past:
			before := auditView(rec)
			rec.LoggedOut, rec.Expired, rec.Expiry = true, true, tx.Now()
			if err := tx.PutNode(rec); err != nil {
				return err
			}
			return tx.Audit("node.logout", target(rec), before, auditView(rec))
		case !rec.Expiry.IsZero() && rec.Expiry.Before(a.req.Expiry), len(rec.Tags) > 0, rec.Expired:
			return nil
		default:
			before := auditView(rec)
			rec.Expiry = a.req.Expiry
			if err := tx.PutNode(rec); err != nil {
				return err
			}
			return tx.Audit("node.expiry", target(rec), before, auditView(rec))
		}
	})
	if errors.Is(err, db.ErrNotFound) {
		err = nil // deleted meanwhile, which is as good
	}
	if err != nil {
		return nil, fmt.Errorf("change expiry: %w", err)
	}
	if past || n.Dead() {
		return &tailcfg.RegisterResponse{NodeKeyExpired: true}, nil
	}
	return a.welcome(n.Node), nil
}

// byAuthKey admits the device by an auth key.
func (a *attempt) byAuthKey(ctx context.Context, secret string) (*tailcfg.RegisterResponse, error) {
	kind, keyID, hash, err := db.ParseKey(secret)
	if err != nil || kind != db.KeyAuth {
		return nil, refusal("invalid auth key: it is mistyped or not one of this server")
	}
	var rec *db.Node
	actor := db.Actor{Kind: "node", Name: a.req.Hostinfo.Hostname, KeyID: keyID, Source: a.source.String()}
	_, err = a.cfg.Ledger.DoWait(ctx, actor, func(tx *db.Tx) error {
		k, err := tx.RedeemAuthKey(keyID, hash, a.machine)
		if err != nil {
			return err
		}
		tags, err := a.keyTags(k)
		if err != nil {
			return err
		}
		rec, err = a.admit(tx, &device{
			machine: a.machine, node: a.req.NodeKey, old: a.req.OldNodeKey, nl: a.req.NLKey, hostinfo: a.req.Hostinfo, version: a.req.Version,
			expiry: a.req.Expiry, ephemeral: a.req.Ephemeral || k.Ephemeral, user: k.User, tags: tags, authKey: k.ID, method: "authkey",
		})
		return err
	})
	switch {
	case err == nil:
		return a.welcome(rec), nil
	case errors.Is(err, db.ErrNotFound):
		return nil, refusal("invalid auth key: this server does not know it")
	case errors.Is(err, db.ErrKeyUsed):
		return nil, refusal("auth key already used: it admits one device; ask for a new one, or for a reusable one")
	case errors.Is(err, db.ErrKeyExpired):
		return nil, refusal("auth key expired: ask for a new one")
	case errors.Is(err, db.ErrKeyRevoked):
		return nil, refusal("auth key revoked: ask for a new one")
	}
	return nil, friendly(err)
}

// friendly turns errors that the person can act on into refusals.
func friendly(err error) error {
	if errors.Is(err, db.ErrPoolExhausted) {
		return refusal("the tailnet has no free addresses left; ask its administrator")
	}
	if errors.Is(err, ErrFull) {
		return refusal(ErrFull.Error() + "; ask its administrator")
	}
	return err
}

// keyTags are the tags of a node that joins by k. A key with tags gives its tags; asking for others needs an owner of theirs: the key's
// user, or one of the key's own tags.
func (a *attempt) keyTags(k *db.AuthKey) ([]string, error) {
	snap := a.cfg.Replica.Current()
	var denied []string
	tags := append([]string(nil), k.Tags...)
	for _, t := range a.req.Hostinfo.RequestTags {
		switch {
		case contains(k.Tags, t):
		case mayTag(snap, k.User, k.Tags, t):
			tags = append(tags, t)
		default:
			denied = append(denied, t)
		}
	}
	if len(denied) > 0 {
		return nil, deniedTags(denied)
	}
	return sortedTags(tags), nil
}

func deniedTags(tags []string) error {
	return refusal(fmt.Sprintf("requested tags [%s] are invalid or not permitted", strings.Join(tags, " ")))
}

func mayTag(s *tailnet.Snapshot, user tailcfg.UserID, tags []string, want string) bool {
	p := s.Policy().Parsed
	return p != nil && p.MayTag(s.ACLTailnet(), user, tags, want)
}

// welcome is the answer to a device that is a node.
func (a *attempt) welcome(n *db.Node) *tailcfg.RegisterResponse {
	resp := &tailcfg.RegisterResponse{MachineAuthorized: true}
	if len(n.Tags) > 0 {
		id := tailnet.TaggedSelfUser(n.ID)
		resp.User = tailcfg.User{ID: id, DisplayName: n.GivenName, Created: n.Created}
		resp.Login = tailcfg.Login{ID: tailcfg.LoginID(id), LoginName: "tagged-devices", DisplayName: n.GivenName}
		return resp
	}
	resp.User, resp.Login = tailcfg.User{ID: n.User}, tailcfg.Login{ID: tailcfg.LoginID(n.User)}
	if u := a.cfg.Replica.Current().User(n.User); u != nil {
		name := u.DisplayName
		if name == "" {
			name = u.Name
		}
		resp.User = tailcfg.User{ID: u.ID, DisplayName: name, ProfilePicURL: u.ProfilePicURL, Created: u.Created}
		resp.Login = tailcfg.Login{ID: tailcfg.LoginID(u.ID), Provider: u.Provider, LoginName: tailnet.LoginName(u), DisplayName: name, ProfilePicURL: u.ProfilePicURL}
	}
	return resp
}

func (a *attempt) actor(id tailcfg.NodeID) db.Actor {
	return db.Actor{Kind: "node", ID: int64(id), Name: a.req.Hostinfo.Hostname, Source: a.source.String()}
}
