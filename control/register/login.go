package register

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// LoginTTL is how long a person has to approve a login.
const LoginTTL = 15 * time.Minute

// crockford is Crockford's base 32: no I, L, O and U, so that a code survives being read aloud.
var crockford = base32.NewEncoding("0123456789ABCDEFGHJKMNPQRSTVWXYZ").WithPadding(base32.NoPadding)

// IDBytes of an id are written as 32 characters.
const IDBytes = 20

// EncodeID writes an id as people see it.
func EncodeID(b [IDBytes]byte) string { return crockford.EncodeToString(b[:]) }

// loginID is the id of a pending login. It is not stored: it is made again from the row and the server's secret, so that a client that asks
// twice is shown the same address, and a reader of the database cannot approve a login.
func (r *Registrar) loginID(a *db.AuthRequest) string {
	mac := hmac.New(sha256.New, r.cfg.IDKey)
	mac.Write([]byte(a.MachineKey.String()))
	mac.Write([]byte(a.NodeKey.String()))
	var when [8]byte
	binary.BigEndian.PutUint64(when[:], uint64(a.Created.UnixMicro()))
	mac.Write(when[:])
	return crockford.EncodeToString(mac.Sum(nil)[:IDBytes])
}

// ParseID takes an id as people paste it: alone, in lower case, or as the end of the address. The second result tells whether it can be one.
func ParseID(s string) (string, bool) {
	s = strings.TrimSpace(s)
	if i := strings.LastIndexByte(s, '/'); i >= 0 {
		s = s[i+1:]
	}
	s = strings.ToUpper(s)
	b, err := crockford.DecodeString(s)
	return s, err == nil && len(b) == IDBytes
}

// HashID is how an id is stored and found.
func HashID(id string) [32]byte { return sha256.Sum256([]byte(id)) }

// begin starts an interactive login, or names again the one that waits already.
func (a *attempt) begin(ctx context.Context) (*tailcfg.RegisterResponse, error) {
	var url string
	var fresh bool
	info := shownHostinfo(a.req.Hostinfo)
	if len(strings.Join(info.RequestTags, "")) > maxTagText {
		return nil, refusal("too many tags are requested")
	}
	_, err := a.cfg.Ledger.Do(ctx, db.Actor{Kind: "unauthenticated", Source: a.source.String()}, func(tx *db.Tx) error {
		fresh = false
		if open, err := tx.PendingLogin(a.machine); err == nil && a.repeats(open, info) && tx.Now().Before(open.Expires.Add(-time.Minute)) {
			url = a.url(a.loginID(open))
			return nil
		} else if err != nil && !errors.Is(err, db.ErrNotFound) {
			return err
		}
		row := &db.AuthRequest{
			Kind: db.AuthRequestRegister, MachineKey: a.machine, NodeKey: a.req.NodeKey, OldNodeKey: a.req.OldNodeKey, NLKey: a.req.NLKey,
			Hostinfo: info, Expiry: a.req.Expiry, Ephemeral: a.req.Ephemeral, Cap: a.req.Version, Source: a.source.String(),
			Created: tx.Now(), Expires: tx.Now().Add(LoginTTL),
		}
		fresh = true
		id := a.loginID(row)
		row.Hash = HashID(id)
		url = a.url(id)
		return tx.CreateAuthRequest(row)
	})
	if errors.Is(err, db.ErrLimit) {
		return nil, refusal("too many logins are waiting for approval; try again in a few minutes")
	}
	if err != nil {
		return nil, fmt.Errorf("begin login: %w", err)
	}
	if fresh {
		a.machines.Debit(machineKey(a.machine), a.cfg.Now(), 1) // whoever makes up logins without end writes no more than this allows
	}
	return &tailcfg.RegisterResponse{AuthURL: url}, nil
}

// repeats reports whether the request asks for what open already waits for.
func (a *attempt) repeats(open *db.AuthRequest, info *tailcfg.Hostinfo) bool {
	return open.NodeKey == a.req.NodeKey && open.OldNodeKey == a.req.OldNodeKey && open.Ephemeral == a.req.Ephemeral && open.Hostinfo != nil &&
		open.Hostinfo.Hostname == info.Hostname && slices.Equal(open.Hostinfo.RequestTags, info.RequestTags)
}

// shownHostinfo is the part of Hostinfo that a pending login keeps: what the page shows and what the node is made with. Strangers store it, so
// it is small; the rest comes with the first report.
func shownHostinfo(h *tailcfg.Hostinfo) *tailcfg.Hostinfo {
	return &tailcfg.Hostinfo{
		Hostname: h.Hostname, OS: cut(h.OS), OSVersion: cut(h.OSVersion), Distro: cut(h.Distro), DistroVersion: cut(h.DistroVersion),
		DeviceModel: cut(h.DeviceModel), IPNVersion: cut(h.IPNVersion), RequestTags: h.RequestTags,
	}
}

// maxTagText bounds the requested tags of a pending login, in bytes.
const maxTagText = 1024

// cut bounds a text of a pending login.
func cut(s string) string {
	const most = 64
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "")
}

func (r *Registrar) url(id string) string {
	return strings.TrimSuffix(r.cfg.ServerURL, "/") + "/register/" + id
}

// errOther answers a follow-up of a login that is not the asker's, in the words for one that does not exist.
const errOther = refusal("this login does not exist or belongs to another device; start again")

// followUp waits until a person has decided. It belongs to the machine and node key that began the login: whoever else knows the address
// learns nothing.
func (a *attempt) followUp(ctx context.Context, known *tailnet.Node) (*tailcfg.RegisterResponse, error) {
	id, ok := ParseID(a.req.Followup)
	if !ok {
		return nil, errOther
	}
	row, err := a.request(ctx, HashID(id))
	switch {
	case errors.Is(err, db.ErrNotFound) && known != nil && !known.Dead():
		return a.welcome(known.Node), nil // approved long ago: the answer was lost
	case errors.Is(err, db.ErrNotFound):
		return a.begin(ctx) // it expired: the client shows the new address
	case err != nil:
		return nil, err
	}
	if row.MachineKey != a.machine || row.NodeKey != a.req.NodeKey || row.Kind != db.AuthRequestRegister {
		return nil, errOther
	}
	request := row.ID
	wake, stop := a.Watch(request)
	if row.State == db.AuthRequestPending {
		a.follow(ctx, request, true)
	}
	defer func() {
		// A client that lost its connection asks again before the old request is seen to be dead: the last one to leave counts. Whether
		// the login is still open is for the database to say: the read that would have told may be what the end of the connection cut off.
		if stop() {
			a.follow(context.WithoutCancel(ctx), request, false)
		}
	}()
	for {
		if row, err = a.request(ctx, HashID(id)); errors.Is(err, db.ErrNotFound) {
			return a.begin(ctx)
		} else if err != nil {
			return nil, err
		}
		switch row.State {
		case db.AuthRequestApproved:
			return a.approved(ctx, row)
		case db.AuthRequestRejected:
			return nil, refusal(rejected(row))
		}
		left := row.Expires.Sub(a.cfg.Now())
		if left <= 0 {
			return a.begin(ctx)
		}
		expired := time.NewTimer(left)
		select {
		case <-wake:
		case <-expired.C:
		case <-ctx.Done():
			expired.Stop()
			return nil, ctx.Err()
		}
		expired.Stop()
	}
}

func rejected(row *db.AuthRequest) string {
	if row.Message != "" {
		return row.Message
	}
	return "this login was rejected by an administrator"
}

// approved answers with the node, which the approval made in its own transaction.
func (a *attempt) approved(ctx context.Context, row *db.AuthRequest) (*tailcfg.RegisterResponse, error) {
	var rec *db.Node
	var rev db.Revision
	err := a.cfg.Store.View(ctx, func(r *db.Reader) error {
		var err error
		in := r.In(a.cfg.Ledger.Tailnet())
		if rev, err = in.Revision(); err != nil {
			return err
		}
		rec, err = in.Node(row.Node)
		return err
	})
	if errors.Is(err, db.ErrNotFound) {
		return nil, refusal("the node was deleted meanwhile; log in again")
	}
	if err != nil {
		return nil, err
	}
	if _, err := a.cfg.Replica.WaitFor(ctx, rev); err != nil {
		return nil, err
	}
	return a.welcome(rec), nil
}

func (r *Registrar) request(ctx context.Context, hash [32]byte) (row *db.AuthRequest, err error) {
	err = r.cfg.Store.View(ctx, func(rd *db.Reader) error {
		row, err = rd.In(r.cfg.Ledger.Tailnet()).AuthRequestByHash(hash)
		return err
	})
	return row, err
}

// follow notes whether the device waits for the login: one that does is not pushed out by others.
func (r *Registrar) follow(ctx context.Context, id int64, waits bool) {
	_, err := r.cfg.Ledger.Do(ctx, db.Actor{Kind: "unauthenticated"}, func(tx *db.Tx) error {
		row, err := tx.AuthRequest(id)
		if err != nil || row.State != db.AuthRequestPending || row.Followed == waits {
			return err
		}
		row.Followed = waits
		return tx.PutAuthRequest(row)
	})
	if err != nil && !errors.Is(err, db.ErrNotFound) {
		r.log.Warn("note a waiting login", "err", err)
		return
	}
	r.log.Debug("login followed", "request", id, "waits", waits)
}

// Watch returns a channel with one slot that is filled when the auth request moves, and a function that ends the watch and reports whether
// nobody else here watches the request.
func (r *Registrar) Watch(id int64) (<-chan struct{}, func() (last bool)) {
	ch := make(chan struct{}, 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.waiters[id] == nil {
		r.waiters[id] = map[chan struct{}]bool{}
	}
	r.waiters[id][ch] = true
	return ch, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.waiters[id], ch)
		if len(r.waiters[id]) > 0 {
			return false
		}
		delete(r.waiters, id)
		return true
	}
}

// wake is called with each batch of the change log, so that a decision made at another server ends the wait here.
func (r *Registrar) wake(b *db.Batch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	ids := b.AuthRequests
	if b.Full {
		for id := range r.waiters {
			ids = append(ids, id)
		}
	}
	for _, id := range ids {
		for ch := range r.waiters[id] {
			select {
			case ch <- struct{}{}:
			default:
			}
		}
	}
}

// Errors of decisions on logins.
var (
	ErrNoLogin     = errors.New("no login with this id is waiting: it may have expired")
	ErrDecided     = errors.New("this login was decided already")
	ErrUnknownUser = errors.New("no such user")
	ErrTagsRefused = errors.New("requested tags are invalid or not permitted")
	ErrNeedsUser   = errors.New("this is a device's login: it needs a user")
)

// Approve makes the device that waits under authID a node of user and ends its wait. It returns the node.
func (r *Registrar) Approve(ctx context.Context, actor db.Actor, authID string, user tailcfg.UserID) (*db.Node, error) {
	var rec *db.Node
	_, err := r.cfg.Ledger.DoWait(ctx, actor, func(tx *db.Tx) error {
		row, err := r.pending(tx, authID)
		if err != nil {
			return err
		}
		if row.Kind != db.AuthRequestRegister {
			return ErrNoLogin
		}
		if _, err := tx.User(user); err != nil {
			if errors.Is(err, db.ErrNotFound) {
				return ErrUnknownUser
			}
			return err
		}
		d := &device{
			machine: row.MachineKey, node: row.NodeKey, old: row.OldNodeKey, nl: row.NLKey, hostinfo: row.Hostinfo, version: row.Cap, expiry: row.Expiry,
			ephemeral: row.Ephemeral, user: user, method: "cli",
		}
		if d.hostinfo == nil {
			d.hostinfo = new(tailcfg.Hostinfo)
		}
		if d.tags, err = ownedTags(r.cfg.Replica.Current(), user, d.hostinfo.RequestTags); err != nil {
			return err
		}
		if rec, err = r.admit(tx, d); err != nil {
			return err
		}
		row.State, row.Node, row.User = db.AuthRequestApproved, rec.ID, user
		return tx.PutAuthRequest(row)
	})
	return rec, err
}

// ownedTags checks that user may give each of the tags.
func ownedTags(s *tailnet.Snapshot, user tailcfg.UserID, tags []string) ([]string, error) {
	var denied []string
	for _, t := range tags {
		if !mayTag(s, user, nil, t) {
			denied = append(denied, t)
		}
	}
	if len(denied) > 0 {
		return nil, fmt.Errorf("%w: [%s]", ErrTagsRefused, strings.Join(denied, " "))
	}
	return sortedTags(append([]string(nil), tags...)), nil
}

// pending finds the login under authID that waits for a decision.
func (r *Registrar) pending(tx *db.Tx, authID string) (*db.AuthRequest, error) {
	id, ok := ParseID(authID)
	if !ok {
		return nil, &db.InvalidError{Field: "authId", Msg: "is not the 32 characters at the end of the login address"}
	}
	row, err := tx.AuthRequestByHash(HashID(id))
	switch {
	case errors.Is(err, db.ErrNotFound):
		return nil, ErrNoLogin
	case err != nil:
		return nil, err
	case row.State != db.AuthRequestPending:
		return nil, ErrDecided
	case !tx.Now().Before(row.Expires):
		return nil, ErrNoLogin
	}
	return row, nil
}

// Confirm approves an SSH check. A device's login needs a user and is refused.
func (r *Registrar) Confirm(ctx context.Context, actor db.Actor, authID string) error {
	_, err := r.cfg.Ledger.Do(ctx, actor, func(tx *db.Tx) error {
		row, err := r.pending(tx, authID)
		if err != nil {
			return err
		}
		if row.Kind == db.AuthRequestRegister {
			return ErrNeedsUser
		}
		row.State = db.AuthRequestApproved
		// An approval lasts as long as the policy's check period; one that is for this connection only still has to be fetched.
		var d struct {
			Seconds int64 `json:"checkPeriodSeconds"`
		}
		if len(row.Detail) > 0 {
			if err := json.Unmarshal(row.Detail, &d); err != nil {
				return fmt.Errorf("stored check: %w", err)
			}
		}
		if d.Seconds > 0 {
			row.Expires = tx.Now().Add(time.Duration(d.Seconds) * time.Second)
		}
		if err := tx.PutAuthRequest(row); err != nil {
			return err
		}
		return tx.Audit("ssh.approve", fmt.Sprintf("auth:%d", row.ID), nil, row.Detail)
	})
	return err
}

// Reject refuses a login or an SSH check; the device is told so.
func (r *Registrar) Reject(ctx context.Context, actor db.Actor, authID string) error {
	_, err := r.cfg.Ledger.Do(ctx, actor, func(tx *db.Tx) error {
		row, err := r.pending(tx, authID)
		if err != nil {
			return err
		}
		row.State = db.AuthRequestRejected
		if err := tx.PutAuthRequest(row); err != nil {
			return err
		}
		return tx.Audit(row.Kind+".reject", fmt.Sprintf("auth:%d", row.ID), nil, row.Detail)
	})
	return err
}

// CreateNode makes a node without a device, for `debug create-node`.
func (r *Registrar) CreateNode(ctx context.Context, actor db.Actor, d NewNode) (*db.Node, error) {
	var rec *db.Node
	_, err := r.cfg.Ledger.DoWait(ctx, actor, func(tx *db.Tx) error {
		var err error
		rec, err = r.create(tx, &device{
			machine: d.MachineKey, node: d.NodeKey, hostinfo: &tailcfg.Hostinfo{Hostname: d.Name, RoutableIPs: d.Routes}, user: d.User, method: "cli",
		})
		return err
	})
	return rec, err
}
