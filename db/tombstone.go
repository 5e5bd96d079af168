package db

import (
	"fmt"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// keepTombstones is how long a deleted node's keys are remembered.
const keepTombstones = 180 * 24 * time.Hour

type tombstoneRow struct {
	ID         int64 `gorm:"primaryKey"`
	TailnetID  int64
	MachineKey string
	NodeKey    string
	NodeID     int64
	StableID   string
	Name       string
	Deleted    int64
}

func (tombstoneRow) TableName() string { return "tombstones" }

func rowToTombstone(r *tombstoneRow) (*Tombstone, error) {
	t := &Tombstone{
		ID: r.ID, Tailnet: TailnetID(r.TailnetID), Node: tailcfg.NodeID(r.NodeID),
		StableID: tailcfg.StableNodeID(r.StableID), Name: r.Name, Deleted: fromMicros(r.Deleted),
	}
	if err := parseKey(r.MachineKey, &t.MachineKey); err != nil {
		return nil, err
	}
	return t, parseKey(r.NodeKey, &t.NodeKey)
}

// Tombstone returns the newest tombstone of a machine key and node key, if it
// is not older than 180 days.
func (r *Reader) Tombstone(m key.MachinePublic, n key.NodePublic) (*Tombstone, error) {
	since := micros(r.conn.store.now().Add(-keepTombstones))
	return findOne(r, r.mine().Where("machine_key = ? AND node_key = ? AND deleted > ?", keyText(m), keyText(n), since).
		Order("id DESC"), rowToTombstone)
}

// DeleteTombstones forgets a pair of keys: the client has registered again.
func (tx *Tx) DeleteTombstones(m key.MachinePublic, n key.NodePublic) error {
	var ids []int64
	q := tx.mine().Table("tombstones").Where("machine_key = ? AND node_key = ?", keyText(m), keyText(n)).Order("id")
	if err := tx.err(q.Pluck("id", &ids).Error); err != nil {
		return fmt.Errorf("delete tombstones: %w", err)
	}
	return tx.dropTombstones(ids)
}

func (tx *Tx) dropTombstones(ids []int64) error {
	if len(ids) == 0 {
		return nil
	}
	if _, err := tx.exec("DELETE FROM tombstones WHERE id IN ?", ids); err != nil {
		return fmt.Errorf("delete tombstones: %w", err)
	}
	for _, id := range ids {
		tx.note(KindTombstone, id)
	}
	return nil
}

// SweepTombstones removes tombstones older than 180 days, and what is no
// longer held for former owners. It works in steps: more may be left when it
// returns 500 or more.
func (tx *Tx) SweepTombstones() (int, error) {
	held := micros(tx.now.Add(-holdFor))
	for _, table := range []string{"released_names", "released_addresses"} {
		if _, err := tx.exec("DELETE FROM "+table+" WHERE tailnet_id = ? AND released <= ?", tx.tailnet, held); err != nil {
			return 0, fmt.Errorf("sweep tombstones: %w", err)
		}
	}
	var ids []int64
	q := tx.mine().Table("tombstones").Where("deleted <= ?", micros(tx.now.Add(-keepTombstones))).Order("id").Limit(500)
	if err := tx.err(q.Pluck("id", &ids).Error); err != nil {
		return 0, fmt.Errorf("sweep tombstones: %w", err)
	}
	return len(ids), tx.dropTombstones(ids)
}
