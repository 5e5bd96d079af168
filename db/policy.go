package db

import (
	"cmp"
	"fmt"
)

type policyRow struct {
	ID        int64 `gorm:"primaryKey"`
	TailnetID int64
	Revision  int64
	Text      []byte
	Author    string
	Note      string
	Created   int64
}

func (policyRow) TableName() string { return "policies" }

// keptPolicies is how many versions of a policy are kept.
const keptPolicies = 1000

func rowToPolicy(r *policyRow) (*PolicyVersion, error) {
	return &PolicyVersion{
		ID: r.ID, Tailnet: TailnetID(r.TailnetID), Revision: Revision(r.Revision), Text: r.Text,
		Author: r.Author, Note: r.Note, Created: fromMicros(r.Created),
	}, nil
}

// Policy returns the live policy, ErrNotFound when none was ever stored.
func (r *Reader) Policy() (*PolicyVersion, error) {
	return findOne(r, r.mine().Order("id DESC"), rowToPolicy)
}

// PolicyVersions returns up to limit versions, the newest first.
func (r *Reader) PolicyVersions(limit int) ([]*PolicyVersion, error) {
	return find(r, r.mine().Order("id DESC").Limit(limit), rowToPolicy)
}

// PolicyVersion returns the version of that id.
func (r *Reader) PolicyVersion(id int64) (*PolicyVersion, error) {
	return findOne(r, r.mine().Where("id = ?", id), rowToPolicy)
}

// SetPolicy makes text the live policy; the database does not judge it. With
// ifRevision, that must be the live policy's Revision (0: no policy is stored),
// else ErrStale. The author is the transaction's actor.
func (tx *Tx) SetPolicy(text []byte, note string, ifRevision *Revision) (*PolicyVersion, error) {
	if ifRevision != nil {
		var current Revision
		live, err := tx.Policy()
		switch {
		case err == nil:
			current = live.Revision
		case err != ErrNotFound:
			return nil, fmt.Errorf("set policy: %w", err)
		}
		if current != *ifRevision {
			return nil, fmt.Errorf("set policy: %w: it is at revision %d, not %d", ErrStale, current, *ifRevision)
		}
	}
	if text == nil {
		text = []byte{}
	}
	row := &policyRow{
		TailnetID: int64(tx.tailnet), Revision: int64(tx.NextRevision()), Text: text,
		Author: clean(cmp.Or(tx.actor.Name, tx.actor.KeyID)), Note: clean(note), Created: micros(tx.now),
	}
	if err := tx.err(tx.g.Create(row).Error); err != nil {
		return nil, fmt.Errorf("set policy: %w", err)
	}
	_, err := tx.exec("DELETE FROM policies WHERE tailnet_id = ? AND id <= (SELECT id FROM policies "+
		"WHERE tailnet_id = ? ORDER BY id DESC LIMIT 1 OFFSET ?)", tx.tailnet, tx.tailnet, keptPolicies)
	if err != nil {
		return nil, fmt.Errorf("set policy: %w", err)
	}
	tx.note(KindPolicy, row.ID)
	return rowToPolicy(row)
}
