package db

import (
	"slices"
	"strings"
)

// MovedSince reports whether something of these kinds changed after a
// revision, what this transaction has done so far aside. It answers yes when
// the changes since then are pruned, and when there is one of a kind that this
// program does not know: a newer server may mean any of these by it.
func (tx *Tx) MovedSince(after Revision, kinds ...Kind) (bool, error) {
	if after >= tx.state.revision || len(kinds) == 0 {
		return false, nil
	}
	// Those of the transactions that are committed together with this one are
	// not in the table yet.
	if slices.ContainsFunc(tx.state.changes, func(c changeRow) bool {
		return Revision(c.Revision) > after && slices.Contains(kinds, Kind(c.Kind))
	}) {
		return true, nil
	}
	var pruned, n int64
	if err := tx.scan("SELECT pruned_revision FROM tailnets WHERE id = ?", []any{tx.tailnet}, &pruned); err != nil {
		return false, err
	}
	if int64(after) < pruned {
		return true, nil
	}
	args := []any{tx.tailnet, after, newestKind}
	for _, k := range kinds {
		args = append(args, k)
	}
	err := tx.scan("SELECT COUNT(*) FROM changes WHERE tailnet_id = ? AND revision > ? AND (kind > ? OR kind IN (?"+strings.Repeat(", ?", len(kinds)-1)+"))", args, &n)
	return n > 0, err
}
