package db

import (
	"encoding/json"
	"fmt"
	"time"

	"tailscale.com/tailcfg"
)

// authRequestLife is how long a login waits for a person.
const authRequestLife = 15 * time.Minute

type authRequestRow struct {
	ID         int64 `gorm:"primaryKey"`
	Hash       []byte
	Kind       string
	TailnetID  int64
	MachineKey string
	NodeKey    string
	OldNodeKey string
	NLKey      string `gorm:"column:nl_key"`
	Hostinfo   string
	Expiry     int64
	Ephemeral  bool
	Cap        int64
	Source     string
	Created    int64
	Expires    int64
	Opened     bool
	Followed   bool
	State      string
	NodeID     int64
	UserID     int64
	Message    string
	Detail     []byte
}

func (authRequestRow) TableName() string { return "auth_requests" }

func authRequestToRow(a *AuthRequest) *authRequestRow {
	return &authRequestRow{
		ID: a.ID, Hash: a.Hash[:], Kind: clean(a.Kind), MachineKey: keyText(a.MachineKey), NodeKey: keyText(a.NodeKey),
		OldNodeKey: keyText(a.OldNodeKey), NLKey: keyText(a.NLKey), Hostinfo: hostinfoText(a.Hostinfo),
		Expiry: micros(a.Expiry), Ephemeral: a.Ephemeral, Cap: int64(a.Cap), Source: clean(a.Source),
		Created: micros(a.Created), Expires: micros(a.Expires), Opened: a.Opened, Followed: a.Followed,
		State: clean(a.State), NodeID: int64(a.Node), UserID: int64(a.User), Message: clean(a.Message), Detail: a.Detail,
	}
}

func rowToAuthRequest(r *authRequestRow) (*AuthRequest, error) {
	a := &AuthRequest{
		ID: r.ID, Kind: r.Kind, Tailnet: TailnetID(r.TailnetID), Expiry: fromMicros(r.Expiry), Ephemeral: r.Ephemeral,
		Cap: tailcfg.CapabilityVersion(r.Cap), Source: r.Source, Created: fromMicros(r.Created), Expires: fromMicros(r.Expires),
		Opened: r.Opened, Followed: r.Followed, State: r.State, Node: tailcfg.NodeID(r.NodeID), User: tailcfg.UserID(r.UserID),
		Message: r.Message, Detail: json.RawMessage(r.Detail),
	}
	copy(a.Hash[:], r.Hash)
	var err error
	for _, k := range []struct {
		text string
		key  interface{ UnmarshalText([]byte) error }
	}{{r.MachineKey, &a.MachineKey}, {r.NodeKey, &a.NodeKey}, {r.OldNodeKey, &a.OldNodeKey}, {r.NLKey, &a.NLKey}} {
		if err = parseKey(k.text, k.key); err != nil {
			return nil, err
		}
	}
	a.Hostinfo, err = parseHostinfo(r.Hostinfo)
	return a, err
}

// AuthRequest returns the auth request of that id. One that has expired is
// ErrNotFound.
func (r *Reader) AuthRequest(id int64) (*AuthRequest, error) {
	return findOne(r, r.mine().Where("id = ? AND expires > ?", id, micros(r.conn.store.now())), rowToAuthRequest)
}

// AuthRequestByHash returns the auth request whose id has that SHA-256.
func (r *Reader) AuthRequestByHash(h [32]byte) (*AuthRequest, error) {
	return findOne(r, r.mine().Where("hash = ? AND expires > ?", h[:], micros(r.conn.store.now())), rowToAuthRequest)
}

// AuthRequests returns all auth requests that have not expired, by id.
func (r *Reader) AuthRequests() ([]*AuthRequest, error) {
	return find(r, r.mine().Where("expires > ?", micros(r.conn.store.now())).Order("id"), rowToAuthRequest)
}

// CreateAuthRequest adds an auth request and sets a.ID, a.Tailnet and, when
// they are empty, a.State, a.Created and a.Expires.
//
// Strangers can make any number, so Config bounds them, in all and from one
// source, and each machine key has one login: a newer one replaces it.
// When there is no room, the youngest one goes that nobody has opened or
// follows, of the same source or else of the source that has most. ErrLimit
// when there is none.
//
// Nobody waits for a request that does not exist yet, so this makes no
// revision unless it ends one that is followed.
func (tx *Tx) CreateAuthRequest(a *AuthRequest) error {
	row := authRequestToRow(a)
	row.ID, row.TailnetID = 0, int64(tx.tailnet)
	if row.State == "" {
		row.State = AuthRequestPending
	}
	if row.Created == 0 {
		row.Created = micros(tx.now)
	}
	if row.Expires == 0 {
		row.Expires = micros(fromMicros(row.Created).Add(authRequestLife))
	}
	if err := tx.createAuthRequest(row); err != nil {
		return fmt.Errorf("create auth request: %w", err)
	}
	a.ID, a.Tailnet, a.State = row.ID, tx.tailnet, row.State
	a.Created, a.Expires = fromMicros(row.Created), fromMicros(row.Expires)
	return nil
}

func (tx *Tx) createAuthRequest(row *authRequestRow) error {
	if row.Kind == AuthRequestRegister {
		if _, err := tx.dropAuthRequests("machine_key = ? AND kind = ?", row.MachineKey, row.Kind); err != nil {
			return err
		}
	}
	maxAll, maxMine := tx.conn.store.c.MaxAuthRequests, tx.conn.store.c.MaxAuthRequestsPerSource
	mine, all, err := tx.countAuthRequests(row.Source)
	if err != nil {
		return err
	}
	if mine >= maxMine || all >= maxAll {
		if _, err := tx.SweepAuthRequests(); err != nil {
			return err
		}
		if mine, all, err = tx.countAuthRequests(row.Source); err != nil {
			return err
		}
	}
	switch {
	case mine >= maxMine:
		err = tx.evictAuthRequest(row.Source)
	case all >= maxAll:
		err = tx.evictFromLargest()
	}
	if err != nil {
		return err
	}
	if err := tx.guard(func() error { return tx.err(tx.g.Create(row).Error) }); err != nil {
		return err
	}
	_, err = tx.exec("INSERT INTO auth_request_counts (tailnet_id, source, n) VALUES (?, ?, 1), (?, '', 1) "+
		"ON CONFLICT (tailnet_id, source) DO UPDATE SET n = auth_request_counts.n + 1",
		tx.tailnet, countedSource(row.Source), tx.tailnet)
	return err
}

// countedSource is a source's key in auth_request_counts, where "" is the sum.
func countedSource(source string) string { return "s:" + source }

func (tx *Tx) countAuthRequests(source string) (mine, all int, err error) {
	err = tx.scan("SELECT coalesce(sum(CASE WHEN source = '' THEN 0 ELSE n END), 0), coalesce(sum(CASE WHEN source = '' THEN n ELSE 0 END), 0) "+
		"FROM auth_request_counts WHERE tailnet_id = ? AND source IN (?, '')", []any{tx.tailnet, countedSource(source)}, &mine, &all)
	return mine, all, err
}

const evictable = "source = ? AND opened = FALSE AND followed = FALSE"

func (tx *Tx) evictAuthRequest(source string) error {
	n, err := tx.dropAuthRequests("id = (SELECT max(id) FROM auth_requests WHERE tailnet_id = ? AND "+evictable+")", tx.tailnet, source)
	if err == nil && n == 0 {
		return fmt.Errorf("%w: too many logins are waiting", ErrLimit)
	}
	return err
}

// evictFromLargest tries the sources in the order of how many they have, since
// all of the largest one's may be in use.
func (tx *Tx) evictFromLargest() error {
	var sources []string
	q := tx.mine().Table("auth_request_counts").Where("source <> '' AND n > 0").Order("n DESC, source").Limit(64)
	if err := tx.err(q.Pluck("source", &sources).Error); err != nil {
		return err
	}
	for _, s := range sources {
		n, err := tx.dropAuthRequests("id = (SELECT max(id) FROM auth_requests WHERE tailnet_id = ? AND "+evictable+")", tx.tailnet, s[len("s:"):])
		if err != nil || n > 0 {
			return err
		}
	}
	return fmt.Errorf("%w: too many logins are waiting", ErrLimit)
}

// dropAuthRequests deletes requests and keeps the counts. Only a request that
// somebody follows is a change: without that, strangers who start logins could
// wake every session of the tailnet.
func (tx *Tx) dropAuthRequests(condition string, args ...any) (int, error) {
	var rows []authRequestRow
	q := tx.mine().Select("id", "source", "followed").Where(condition, args...)
	if err := tx.err(q.Find(&rows).Error); err != nil || len(rows) == 0 {
		return 0, err
	}
	ids := make([]int64, len(rows))
	gone := map[string]int{}
	for i, row := range rows {
		ids[i] = row.ID
		gone[countedSource(row.Source)]++
		if row.Followed {
			tx.note(KindAuthRequest, row.ID)
		}
	}
	gone[""] = len(rows)
	if _, err := tx.exec("DELETE FROM auth_requests WHERE id IN ?", ids); err != nil {
		return 0, err
	}
	for source, n := range gone {
		query := "UPDATE auth_request_counts SET n = n - ? WHERE tailnet_id = ? AND source = ?"
		if _, err := tx.exec(query, n, tx.tailnet, source); err != nil {
			return 0, err
		}
		if source == "" {
			continue
		}
		if _, err := tx.exec("DELETE FROM auth_request_counts WHERE tailnet_id = ? AND source = ? AND n <= 0", tx.tailnet, source); err != nil {
			return 0, err
		}
	}
	return len(rows), nil
}

// PutAuthRequest writes the fields of an auth request that change while it
// waits: Opened, Followed, Expires, State, Node, User, Message and Detail. It
// makes a revision when one of State, Node, User, Message and Detail moved.
func (tx *Tx) PutAuthRequest(a *AuthRequest) error {
	row := authRequestToRow(a)
	old, err := findOne(tx.Reader, tx.mine().Where("id = ?", a.ID), func(r *authRequestRow) (*authRequestRow, error) { return r, nil })
	if err == nil {
		err = tx.err(tx.mine().Model(&authRequestRow{}).Where("id = ?", a.ID).
			Select("opened", "followed", "expires", "state", "node_id", "user_id", "message", "detail").Updates(row).Error)
	}
	if err != nil {
		return fmt.Errorf("put auth request %d: %w", a.ID, err)
	}
	if old.State != row.State || old.NodeID != row.NodeID || old.UserID != row.UserID || old.Message != row.Message ||
		string(old.Detail) != string(row.Detail) {
		tx.note(KindAuthRequest, a.ID)
	}
	return nil
}

// DeleteAuthRequest removes an auth request.
func (tx *Tx) DeleteAuthRequest(id int64) error {
	n, err := tx.dropAuthRequests("id = ?", id)
	if err := tx.touched(int64(n), err); err != nil {
		return fmt.Errorf("delete auth request %d: %w", id, err)
	}
	tx.note(KindAuthRequest, id)
	return nil
}

// SweepAuthRequests removes those that have expired and returns how many.
func (tx *Tx) SweepAuthRequests() (int, error) {
	n, err := tx.dropAuthRequests("expires <= ?", micros(tx.now))
	if err != nil {
		return n, fmt.Errorf("sweep auth requests: %w", err)
	}
	return n, nil
}
