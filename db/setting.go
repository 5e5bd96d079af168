package db

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"gorm.io/gorm/clause"
	"tailscale.com/tailcfg"
)

type settingRow struct {
	ID        int64 `gorm:"primaryKey"`
	TailnetID int64
	Name      string
	Value     string
	Hash      string
}

func (settingRow) TableName() string { return "settings" }

func rowToSetting(r *settingRow) (*Setting, error) {
	return &Setting{ID: r.ID, Name: r.Name, Value: json.RawMessage(r.Value), Hash: r.Hash}, nil
}

// Setting returns the setting of that name.
func (r *Reader) Setting(name string) (*Setting, error) {
	return findOne(r, r.mine().Where("name = ?", clean(name)), rowToSetting)
}

// Settings returns all settings by name.
func (r *Reader) Settings() (map[string]*Setting, error) {
	return settingsOf(find(r, r.mine().Order("id"), rowToSetting))
}

func settingsOf(found []*Setting, err error) (map[string]*Setting, error) {
	out := make(map[string]*Setting, len(found))
	for _, s := range found {
		out[s.Name] = s
	}
	return out, err
}

// PutSetting stores a JSON document under a name. The same document again is
// no write.
func (tx *Tx) PutSetting(name string, value []byte) (*Setting, error) {
	if !json.Valid(value) || name == "" || name != clean(name) {
		return nil, &InvalidError{"Value", "is not a JSON document with a name"}
	}
	value = bytes.ToValidUTF8(value, []byte("\uFFFD"))
	sum := sha256.Sum256(value)
	row := settingRow{TailnetID: int64(tx.tailnet), Name: name, Value: string(value), Hash: hex.EncodeToString(sum[:])}
	old, err := tx.Setting(name)
	switch {
	case err == nil && old.Hash == row.Hash:
		return old, nil
	case err == nil:
		row.ID = old.ID
		_, err = tx.exec("UPDATE settings SET value = ?, hash = ? WHERE id = ?", row.Value, row.Hash, row.ID)
	case err == ErrNotFound:
		err = tx.err(tx.g.Create(&row).Error)
	}
	if err != nil {
		return nil, fmt.Errorf("put setting %s: %w", name, err)
	}
	tx.note(KindSetting, row.ID)
	return rowToSetting(&row)
}

type primaryRow struct {
	TailnetID int64  `gorm:"primaryKey;autoIncrement:false"`
	Prefix    string `gorm:"primaryKey"`
	NodeID    int64
}

func (primaryRow) TableName() string { return "primaries" }

// Primaries returns which node is the primary router of each route that has one.
func (r *Reader) Primaries() (map[netip.Prefix]tailcfg.NodeID, error) {
	var rows []primaryRow
	if err := r.err(r.mine().Find(&rows).Error); err != nil {
		return nil, err
	}
	out := make(map[netip.Prefix]tailcfg.NodeID, len(rows))
	for _, row := range rows {
		p, err := netip.ParsePrefix(row.Prefix)
		if err != nil {
			return nil, r.damaged("primary of node", row.NodeID, err)
		}
		out[p] = tailcfg.NodeID(row.NodeID)
	}
	return out, nil
}

// SetPrimary makes a node the primary router of a route. No write when it is.
func (tx *Tx) SetPrimary(p netip.Prefix, n tailcfg.NodeID) error {
	n64, err := tx.exec("INSERT INTO primaries (tailnet_id, prefix, node_id) SELECT tailnet_id, ?, id FROM nodes "+
		"WHERE id = ? AND tailnet_id = ? ON CONFLICT (tailnet_id, prefix) DO UPDATE SET node_id = excluded.node_id "+
		"WHERE primaries.node_id <> excluded.node_id", p.Masked().String(), n, tx.tailnet)
	if err == nil && n64 == 0 {
		_, err = tx.nodeRow(n)
		if err == nil {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("set primary of %v: %w", p, err)
	}
	tx.note(KindPrimary, int64(n))
	return nil
}

// DeletePrimary leaves a route without a primary router. No write when it has none.
func (tx *Tx) DeletePrimary(p netip.Prefix) error {
	n, err := tx.exec("DELETE FROM primaries WHERE tailnet_id = ? AND prefix = ?", tx.tailnet, p.Masked().String())
	if err != nil {
		return fmt.Errorf("delete primary of %v: %w", p, err)
	}
	if n > 0 {
		tx.note(KindPrimary, 0)
	}
	return nil
}

type instanceRow struct {
	ID        int64 `gorm:"primaryKey"`
	Name      string
	Version   string
	Started   int64
	Heartbeat int64
	Revision  int64
	Streams   int64
}

func (instanceRow) TableName() string { return "instances" }

// Instances returns the servers that ever used this database, by id.
func (r *Reader) Instances() ([]*Instance, error) {
	return find(r, r.g.Order("id"), func(r *instanceRow) (*Instance, error) {
		return &Instance{
			ID: r.ID, Name: r.Name, Version: r.Version, Started: fromMicros(r.Started), Heartbeat: fromMicros(r.Heartbeat),
			Revision: Revision(r.Revision), Streams: r.Streams,
		}, nil
	})
}

// Heartbeat records that a server lives: it writes the row of that name, and
// sets i.ID and i.Heartbeat. It makes no revision.
func (tx *Tx) Heartbeat(i *Instance) error {
	row := instanceRow{
		Name: clean(i.Name), Version: clean(i.Version), Started: micros(i.Started), Heartbeat: micros(tx.now), Revision: int64(i.Revision), Streams: i.Streams,
	}
	err := tx.err(tx.g.Clauses(clause.OnConflict{
		Columns:   []clause.Column{{Name: "name"}},
		DoUpdates: clause.AssignmentColumns([]string{"version", "started", "heartbeat", "revision", "streams"}),
	}, clause.Returning{Columns: []clause.Column{{Name: "id"}}}).Create(&row).Error)
	if err != nil {
		return fmt.Errorf("heartbeat of %s: %w", i.Name, err)
	}
	i.ID, i.Heartbeat = row.ID, tx.now
	return nil
}

type secretRow struct {
	Name    string `gorm:"primaryKey"`
	Value   []byte
	Sealed  bool
	Created int64
}

func (secretRow) TableName() string { return "secrets" }

// Secret returns a secret of the server, ErrNotFound when it was never made.
// Secrets belong to no tailnet.
func (r *Reader) Secret(name string) ([]byte, error) {
	row, err := findOne(r, r.g.Where("name = ?", clean(name)), func(r *secretRow) (*secretRow, error) { return r, nil })
	if err != nil {
		return nil, err
	}
	value, err := r.conn.store.unseal(row)
	if err != nil {
		return nil, fmt.Errorf("secret %s: %w", name, err)
	}
	return value, nil
}

// PutSecretIfAbsent stores a secret unless one of that name exists, and
// returns the one that is stored. Of several servers that start at once, all
// get the same. It makes no revision.
func (tx *Tx) PutSecretIfAbsent(name string, value []byte) (stored []byte, err error) {
	if name == "" || name != clean(name) || len(value) == 0 {
		return nil, &InvalidError{"Value", "a secret has a name and a value"}
	}
	row := &secretRow{Name: name, Value: value, Created: micros(tx.now)}
	if err := tx.conn.store.seal(row); err != nil {
		return nil, fmt.Errorf("secret %s: %w", name, err)
	}
	if err := tx.err(tx.g.Clauses(clause.OnConflict{DoNothing: true}).Create(row).Error); err != nil {
		return nil, fmt.Errorf("secret %s: %w", name, err)
	}
	return tx.Secret(name)
}

// seal encrypts a secret under Config.SecretsKey, bound to its name so that
// two rows cannot be exchanged.
func (s *Store) seal(row *secretRow) error {
	if len(s.c.SecretsKey) == 0 {
		return nil
	}
	aead, err := s.aead()
	if err != nil {
		return err
	}
	nonce := make([]byte, aead.NonceSize())
	rand.Read(nonce)
	row.Value, row.Sealed = aead.Seal(nonce, nonce, row.Value, []byte(row.Name)), true
	return nil
}

func (s *Store) unseal(row *secretRow) ([]byte, error) {
	if !row.Sealed {
		return row.Value, nil
	}
	if len(s.c.SecretsKey) == 0 {
		return nil, errors.New("is sealed, and no secrets key is configured")
	}
	aead, err := s.aead()
	if err != nil {
		return nil, err
	}
	if len(row.Value) < aead.NonceSize() {
		return nil, errors.New("is too short")
	}
	value, err := aead.Open(nil, row.Value[:aead.NonceSize()], row.Value[aead.NonceSize():], []byte(row.Name))
	if err != nil {
		return nil, errors.New("was not sealed under this secrets key")
	}
	return value, nil
}

func (s *Store) aead() (cipher.AEAD, error) {
	block, err := aes.NewCipher(s.c.SecretsKey)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}
