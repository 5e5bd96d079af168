package db

import (
	"fmt"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

type authKeyRow struct {
	ID            int64 `gorm:"primaryKey"`
	KeyID         string
	Hash          []byte
	TailnetID     int64
	UserID        *int64
	Description   string
	Reusable      bool
	Ephemeral     bool
	Preauthorized bool
	Tags          string
	Uses          int64
	Expires       int64
	Created       int64
	Revoked       int64
}

func (authKeyRow) TableName() string { return "auth_keys" }

func authKeyToRow(k *AuthKey) *authKeyRow {
	return &authKeyRow{
		ID: k.ID, KeyID: k.KeyID, Hash: k.Hash[:], UserID: optional(int64(k.User)), Description: clean(k.Description),
		Reusable: k.Reusable, Ephemeral: k.Ephemeral, Preauthorized: k.Preauthorized, Tags: list(sortedTags(k.Tags)),
		Uses: int64(k.Uses), Expires: micros(k.Expires), Created: micros(k.Created), Revoked: micros(k.Revoked),
	}
}

func rowToAuthKey(r *authKeyRow) (*AuthKey, error) {
	k := &AuthKey{
		ID: r.ID, KeyID: r.KeyID, Tailnet: TailnetID(r.TailnetID), Description: r.Description, Reusable: r.Reusable,
		Ephemeral: r.Ephemeral, Preauthorized: r.Preauthorized, Uses: int(r.Uses),
		Expires: fromMicros(r.Expires), Created: fromMicros(r.Created), Revoked: fromMicros(r.Revoked),
	}
	copy(k.Hash[:], r.Hash)
	if r.UserID != nil {
		k.User = tailcfg.UserID(*r.UserID)
	}
	var err error
	k.Tags, err = parseList[string](r.Tags)
	return k, err
}

// AuthKey returns the auth key of that id.
func (r *Reader) AuthKey(id int64) (*AuthKey, error) {
	return findOne(r, r.mine().Where("id = ?", id), rowToAuthKey)
}

// AuthKeys returns all auth keys, also those that no longer work, by id.
func (r *Reader) AuthKeys() ([]*AuthKey, error) {
	return find(r, r.mine().Order("id"), rowToAuthKey)
}

// MaxLiveKeys is how many auth keys of one user may work at a time.
const MaxLiveKeys = 1000

// CreateAuthKey adds an auth key and sets k.ID, k.Tailnet and, when zero,
// k.Created. ErrLimit when its user has MaxLiveKeys that work.
func (tx *Tx) CreateAuthKey(k *AuthKey) error {
	if k.KeyID == "" || k.Hash == [32]byte{} {
		return &InvalidError{"KeyID", "a key has an id and a hash"}
	}
	if k.User != 0 {
		var live int
		err := tx.one(&live, "SELECT count(*) FROM auth_keys WHERE tailnet_id = ? AND user_id = ? AND revoked = 0 AND (expires = 0 OR expires > ?) AND (reusable OR uses = 0)",
			tx.tailnet, int64(k.User), micros(tx.now))
		if err != nil {
			return fmt.Errorf("create auth key: %w", err)
		}
		if live >= MaxLiveKeys {
			return fmt.Errorf("create auth key: %w: the user has %d that work", ErrLimit, live)
		}
	}
	row := authKeyToRow(k)
	row.ID, row.TailnetID = 0, int64(tx.tailnet)
	if row.Created == 0 {
		row.Created = micros(tx.now)
	}
	if err := tx.guard(func() error { return tx.err(tx.g.Create(row).Error) }); err != nil {
		return fmt.Errorf("create auth key: %w", err)
	}
	k.ID, k.Tailnet, k.Created = row.ID, tx.tailnet, fromMicros(row.Created)
	tx.note(KindAuthKey, k.ID)
	return nil
}

// PutAuthKey writes an auth key's description, tags, flags, expiry and
// revocation. The credential itself, its owner and its uses stay.
func (tx *Tx) PutAuthKey(k *AuthKey) error {
	row := authKeyToRow(k)
	g := tx.mine().Model(&authKeyRow{}).Where("id = ?", k.ID).
		Select("description", "reusable", "ephemeral", "preauthorized", "tags", "expires", "revoked").Updates(row)
	if err := tx.touched(g.RowsAffected, tx.err(g.Error)); err != nil {
		return fmt.Errorf("put auth key %d: %w", k.ID, err)
	}
	tx.note(KindAuthKey, k.ID)
	return nil
}

// DeleteAuthKey removes an auth key. Nodes that it admitted stay.
func (tx *Tx) DeleteAuthKey(id int64) error {
	n, err := tx.exec("DELETE FROM auth_keys WHERE id = ? AND tailnet_id = ?", id, tx.tailnet)
	if err := tx.touched(n, err); err != nil {
		return fmt.Errorf("delete auth key %d: %w", id, err)
	}
	tx.note(KindAuthKey, id)
	return nil
}

// RedeemAuthKey uses an auth key for a machine. It does not fail a second time
// where it did not the first: the machine that used a key may use it again
// without a further use being counted, since stock clients send the same
// registration twice. That ends when the node is deleted that the key had
// admitted: a single-use key does not bring it back.
//
// Of a single-use key's concurrent users exactly one succeeds. The others get
// ErrKeyUsed; further verdicts are ErrKeyExpired, ErrKeyRevoked and, for a key
// that does not exist or whose hash differs, ErrNotFound.
func (tx *Tx) RedeemAuthKey(keyID string, hash [32]byte, m key.MachinePublic) (*AuthKey, error) {
	k, err := tx.redeem(keyID, hash, m)
	if err != nil {
		return nil, fmt.Errorf("redeem auth key: %w", err)
	}
	return k, nil
}

// authKeyFor returns the auth key of that public part, and whether m has used
// it for a node that is still there, or for a registration that goes on.
func (r *Reader) authKeyFor(keyID string, m key.MachinePublic) (k *AuthKey, open bool, err error) {
	if keyID != clean(keyID) {
		return nil, false, ErrNotFound
	}
	var rows []struct {
		Key    authKeyRow `gorm:"embedded"`
		Closed *int64
	}
	err = r.err(r.g.Raw("SELECT k.*, u.closed FROM auth_keys k LEFT JOIN auth_key_uses u ON u.auth_key_id = k.id AND u.machine_key = ? "+
		"WHERE k.tailnet_id = ? AND k.key_id = ?", keyText(m), r.tailnet, keyID).Find(&rows).Error)
	if err == nil && len(rows) == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return nil, false, err
	}
	k, err = rowToAuthKey(&rows[0].Key)
	return k, rows[0].Closed != nil && *rows[0].Closed == 0, err
}

func (tx *Tx) redeem(keyID string, hash [32]byte, m key.MachinePublic) (*AuthKey, error) {
	k, open, err := tx.authKeyFor(keyID, m)
	var stored [32]byte // compared also when there is no such key, to take the same time
	if err == nil {
		stored = k.Hash
	} else if err != ErrNotFound {
		return nil, err
	}
	switch {
	case !KeyHashEqual(stored, hash) || err != nil:
		return nil, ErrNotFound
	case !k.Revoked.IsZero():
		return nil, ErrKeyRevoked
	case expired(k.Expires, tx.now):
		return nil, ErrKeyExpired
	}
	if open {
		return k, nil
	}
	n, err := tx.exec("UPDATE auth_keys SET uses = uses + 1 WHERE id = ? AND (reusable OR uses = 0)", k.ID)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, ErrKeyUsed
	}
	_, err = tx.exec("INSERT INTO auth_key_uses (auth_key_id, machine_key, used, closed) VALUES (?, ?, ?, 0) "+
		"ON CONFLICT (auth_key_id, machine_key) DO UPDATE SET used = excluded.used, closed = 0", k.ID, keyText(m), micros(tx.now))
	if err != nil {
		return nil, err
	}
	k.Uses++
	tx.note(KindAuthKey, k.ID)
	return k, nil
}

func expired(at, now time.Time) bool { return !at.IsZero() && !now.Before(at) }

type apiKeyRow struct {
	ID          int64 `gorm:"primaryKey"`
	KeyID       string
	Hash        []byte
	TailnetID   int64
	UserID      *int64
	Description string
	Expires     int64
	Created     int64
	Revoked     int64
	LastSeen    int64
}

func (apiKeyRow) TableName() string { return "api_keys" }

func apiKeyToRow(k *APIKey) *apiKeyRow {
	return &apiKeyRow{
		ID: k.ID, KeyID: k.KeyID, Hash: k.Hash[:], UserID: optional(int64(k.User)), Description: clean(k.Description),
		Expires: micros(k.Expires), Created: micros(k.Created), Revoked: micros(k.Revoked), LastSeen: micros(k.LastSeen),
	}
}

func rowToAPIKey(r *apiKeyRow) (*APIKey, error) {
	k := &APIKey{
		ID: r.ID, KeyID: r.KeyID, Tailnet: TailnetID(r.TailnetID), Description: r.Description, Expires: fromMicros(r.Expires),
		Created: fromMicros(r.Created), Revoked: fromMicros(r.Revoked), LastSeen: fromMicros(r.LastSeen),
	}
	copy(k.Hash[:], r.Hash)
	if r.UserID != nil {
		k.User = tailcfg.UserID(*r.UserID)
	}
	return k, nil
}

// APIKey returns the API key of that id.
func (r *Reader) APIKey(id int64) (*APIKey, error) {
	return findOne(r, r.mine().Where("id = ?", id), rowToAPIKey)
}

// APIKeyByKeyID returns the API key of that public part. Whether it still
// works is for the caller to judge.
func (r *Reader) APIKeyByKeyID(keyID string) (*APIKey, error) {
	if keyID != clean(keyID) {
		return nil, ErrNotFound
	}
	return findOne(r, r.mine().Where("key_id = ?", keyID), rowToAPIKey)
}

// APIKeys returns all API keys, also those that no longer work, by id.
func (r *Reader) APIKeys() ([]*APIKey, error) {
	return find(r, r.mine().Order("id"), rowToAPIKey)
}

// CreateAPIKey adds an API key and sets k.ID, k.Tailnet and, when zero,
// k.Created.
func (tx *Tx) CreateAPIKey(k *APIKey) error {
	if k.KeyID == "" || k.Hash == [32]byte{} {
		return &InvalidError{"KeyID", "a key has an id and a hash"}
	}
	row := apiKeyToRow(k)
	row.ID, row.TailnetID = 0, int64(tx.tailnet)
	if row.Created == 0 {
		row.Created = micros(tx.now)
	}
	if err := tx.guard(func() error { return tx.err(tx.g.Create(row).Error) }); err != nil {
		return fmt.Errorf("create API key: %w", err)
	}
	k.ID, k.Tailnet, k.Created = row.ID, tx.tailnet, fromMicros(row.Created)
	tx.note(KindAPIKey, k.ID)
	return nil
}

// PutAPIKey writes an API key's description, expiry, revocation and last use.
func (tx *Tx) PutAPIKey(k *APIKey) error {
	row := apiKeyToRow(k)
	g := tx.mine().Model(&apiKeyRow{}).Where("id = ?", k.ID).
		Select("description", "expires", "revoked", "last_seen").Updates(row)
	if err := tx.touched(g.RowsAffected, tx.err(g.Error)); err != nil {
		return fmt.Errorf("put API key %d: %w", k.ID, err)
	}
	tx.note(KindAPIKey, k.ID)
	return nil
}

// DeleteAPIKey removes an API key.
func (tx *Tx) DeleteAPIKey(id int64) error {
	n, err := tx.exec("DELETE FROM api_keys WHERE id = ? AND tailnet_id = ?", id, tx.tailnet)
	if err := tx.touched(n, err); err != nil {
		return fmt.Errorf("delete API key %d: %w", id, err)
	}
	tx.note(KindAPIKey, id)
	return nil
}
