package db

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"time"

	"tailscale.com/tailcfg"
)

type changeRow struct {
	TailnetID int64 `gorm:"primaryKey;autoIncrement:false"`
	Revision  int64 `gorm:"primaryKey;autoIncrement:false"`
	Seq       int64 `gorm:"primaryKey;autoIncrement:false"`
	Kind      int64
	Entity    int64
	At        int64
}

func (changeRow) TableName() string { return "changes" }

const (
	// maxFollow is how many changes are followed one by one; beyond it, loading
	// everything is cheaper.
	maxFollow = 20_000
	// idChunk bounds the ids of one statement.
	idChunk = 200
)

// Load returns everything that a replica holds of a tailnet, at one revision.
func (s *Store) Load(ctx context.Context, tailnet TailnetID) (*Batch, error) {
	var b *Batch
	err := s.view(ctx, tailnet, func(r *Reader) error {
		rev, err := r.Revision()
		if err == nil {
			b, err = r.load(0, rev)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("load tailnet %d: %w", tailnet, err)
	}
	return b, nil
}

// Follow returns what moved after a revision, as it is at the newest one. It
// loads only what moved. The batch is Full when the log no longer reaches back
// that far, holds a kind of change that this program does not know, or is
// behind after (an older database was restored); it is empty, with To equal to
// after, when nothing moved.
func (s *Store) Follow(ctx context.Context, tailnet TailnetID, after Revision) (*Batch, error) {
	var b *Batch
	err := s.view(ctx, tailnet, func(r *Reader) error {
		var err error
		b, err = r.follow(after)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("follow tailnet %d: %w", tailnet, err)
	}
	return b, nil
}

func (r *Reader) follow(after Revision) (*Batch, error) {
	var rev, pruned Revision
	err := r.scan("SELECT revision, pruned_revision FROM tailnets WHERE id = ?", []any{r.tailnet}, &rev, &pruned)
	if err != nil {
		return nil, err
	}
	if after == rev {
		return &Batch{Tailnet: r.tailnet, From: after, To: rev}, nil
	}
	if after < pruned || after > rev {
		return r.load(after, rev)
	}
	b := &Batch{Tailnet: r.tailnet, From: after, To: rev}
	moved := map[Kind][]int64{}
	seen := map[moveKey]bool{}
	err = r.rows("SELECT revision, kind, entity FROM changes WHERE tailnet_id = ? AND revision > ? ORDER BY revision, seq LIMIT ?",
		[]any{r.tailnet, after, maxFollow + 1}, func(rows *sql.Rows) error {
			c := Change{Tailnet: r.tailnet}
			if err := rows.Scan(&c.Revision, &c.Kind, &c.Entity); err != nil {
				return err
			}
			b.Changes = append(b.Changes, c)
			k := moveKey{c.Kind, c.Entity}
			if c.Kind == KindNodeState {
				k.kind = KindNode // both load the same row
			}
			if !seen[k] {
				seen[k] = true
				moved[k.kind] = append(moved[k.kind], c.Entity)
			}
			return nil
		})
	if err != nil {
		return nil, err
	}
	if len(b.Changes) > maxFollow {
		return r.load(after, rev)
	}
	err = r.loadMoved(b, moved)
	if errors.Is(err, errUnknownKind) {
		return r.load(after, rev)
	}
	return b, err
}

type moveKey struct {
	kind   Kind
	entity int64
}

var errUnknownKind = errors.New("unknown kind of change")

func (r *Reader) loadMoved(b *Batch, moved map[Kind][]int64) error {
	for kind, ids := range moved {
		slices.Sort(ids)
		var err error
		switch kind {
		case KindNode:
			err = r.loadNodes(b, ids)
		case KindUser:
			err = r.loadUsers(b, ids)
		case KindPolicy:
			b.Policy, err = r.Policy()
		case KindSetting:
			b.Settings, err = settingsOf(find(r, r.mine().Where("id IN ?", ids), rowToSetting))
		case KindAuthRequest:
			b.AuthRequests = ids
		case KindPrimary:
			b.PrimariesChanged = true
			b.Primaries, err = r.Primaries()
		case KindAuthKey, KindAPIKey, KindTombstone:
			// Read by key when they are needed.
		default:
			err = errUnknownKind
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *Reader) loadNodes(b *Batch, ids []int64) error {
	b.Nodes = make(map[tailcfg.NodeID]*Node, len(ids))
	for _, id := range ids {
		b.Nodes[tailcfg.NodeID(id)] = nil
	}
	for chunk := range slices.Chunk(ids, idChunk) {
		found, err := r.nodes("n.tailnet_id = ? AND n.id IN ?", r.tailnet, chunk)
		if err != nil {
			return err
		}
		for _, n := range found {
			b.Nodes[n.ID] = n
		}
	}
	return nil
}

func (r *Reader) loadUsers(b *Batch, ids []int64) error {
	b.Users = make(map[tailcfg.UserID]*User, len(ids))
	for _, id := range ids {
		b.Users[tailcfg.UserID(id)] = nil
	}
	for chunk := range slices.Chunk(ids, idChunk) {
		found, err := find(r, r.mine().Where("id IN ?", chunk), rowToUser)
		if err != nil {
			return err
		}
		for _, u := range found {
			b.Users[u.ID] = u
		}
	}
	return nil
}

func (r *Reader) load(after, rev Revision) (*Batch, error) {
	b := &Batch{Tailnet: r.tailnet, Full: true, From: after, To: rev, PrimariesChanged: true}
	nodes, err := r.Nodes()
	if err != nil {
		return nil, err
	}
	b.Nodes = make(map[tailcfg.NodeID]*Node, len(nodes))
	for _, n := range nodes {
		b.Nodes[n.ID] = n
	}
	users, err := r.Users()
	if err != nil {
		return nil, err
	}
	b.Users = make(map[tailcfg.UserID]*User, len(users))
	for _, u := range users {
		b.Users[u.ID] = u
	}
	if b.Policy, err = r.Policy(); err != nil && err != ErrNotFound {
		return nil, err
	}
	if b.Settings, err = r.Settings(); err != nil {
		return nil, err
	}
	b.Primaries, err = r.Primaries()
	return b, err
}

const (
	// pruneEvery is how many changes a server writes between two steps of
	// pruning, and pruneStep how many rows one step looks at: the log shrinks
	// at least as fast as it grows.
	pruneEvery = 512
	pruneStep  = 1024
)

// Prune removes change rows that are older than the configured retention, in
// small transactions. Busy servers prune by themselves as they write; this is
// for a duty that runs now and then.
func (s *Store) Prune(ctx context.Context) error {
	var tailnets []TailnetID
	err := s.view(ctx, 0, func(r *Reader) error {
		return r.err(r.g.Raw("SELECT id FROM tailnets ORDER BY id").Scan(&tailnets).Error)
	})
	if err != nil {
		return fmt.Errorf("prune: %w", err)
	}
	for _, id := range tailnets {
		for more := true; more; {
			_, err := s.Update(ctx, id, Actor{Kind: "system"}, func(tx *Tx) error {
				n, err := prune(tx.Reader, id, tx.state.revision, tx.now, s.c)
				more = n >= pruneStep
				return err
			})
			if err != nil {
				return fmt.Errorf("prune: %w", err)
			}
		}
	}
	return nil
}

// prune does one step and returns how many rows it removed. It removes whole
// revisions, so that a follower finds all of a revision or is told that it is
// too late.
func prune(r *Reader, id TailnetID, current Revision, now time.Time, c Config) (int64, error) {
	floor, before := int64(current)-c.RetainRevisions, micros(now.Add(-c.RetainFor))
	var upTo sql.NullInt64
	err := r.one(&upTo, "SELECT max(revision) FROM (SELECT revision, at FROM changes WHERE tailnet_id = ? "+
		"ORDER BY revision, seq LIMIT ?) AS oldest WHERE revision <= ? OR at <= ?", id, pruneStep, floor, before)
	if err != nil || !upTo.Valid {
		return 0, err
	}
	n, err := r.exec("DELETE FROM changes WHERE tailnet_id = ? AND revision <= ?", id, upTo.Int64)
	if err != nil {
		return 0, err
	}
	_, err = r.exec("UPDATE tailnets SET pruned_revision = ? WHERE id = ? AND pruned_revision < ?", upTo.Int64, id, upTo.Int64)
	return n, err
}
