package db

import (
	"fmt"
	"time"

	"tailscale.com/tailcfg"
)

const (
	// MaxMailCall and MaxMailAnswer bound the body of a Mail, in bytes.
	MaxMailCall   = 64 << 10
	MaxMailAnswer = 1 << 20

	// maxMail is how many rows may wait for one server: one that is gone, or
	// of a version that takes no mail, must not fill the database.
	maxMail = 256
	// takeMail is how many rows one TakeMail returns at most.
	takeMail = 16
	// keepMail is how long mail waits that nobody takes. Whoever asked has
	// given up long before; it is generous since servers' clocks may differ.
	keepMail = 10 * time.Minute
)

// A Mail is a word from one server to another about a node whose stream the
// other one holds: a call, or the answer to one. It is no part of the tailnet
// and makes no revision.
type Mail struct {
	ID      int64
	From    int64  // instance
	To      int64  // instance
	Call    string // names the call: chosen at random by who calls, repeated by the answer
	Answer  bool
	Node    tailcfg.NodeID
	Error   string // of an answer: why there is none
	Body    []byte // at most MaxMailCall bytes, of an answer MaxMailAnswer
	Created time.Time
}

type mailRow struct {
	ID        int64 `gorm:"primaryKey"`
	TailnetID int64
	Sender    int64
	Recipient int64
	Call      string
	Answer    bool
	NodeID    int64
	Error     string
	Body      []byte
	Created   int64
}

func (mailRow) TableName() string { return "mail" }

func rowToMail(r *mailRow) (*Mail, error) {
	return &Mail{
		ID: r.ID, From: r.Sender, To: r.Recipient, Call: r.Call, Answer: r.Answer, Node: tailcfg.NodeID(r.NodeID), Error: r.Error, Body: r.Body,
		Created: fromMicros(r.Created),
	}, nil
}

// Mailbox returns a channel that holds a signal when there may be new mail, for
// whichever server. As with Wake, signals may be missed and repeated. cancel
// ends it.
func (s *Store) Mailbox() (ch <-chan struct{}, cancel func()) { return s.posts.subscribe() }

// HasMail reports whether mail waits for a server.
func (r *Reader) HasMail(instance int64) (bool, error) {
	var n int
	err := r.one(&n, "SELECT count(*) FROM (SELECT 1 FROM mail WHERE tailnet_id = ? AND recipient = ? LIMIT 1) AS waiting", r.tailnet, instance)
	return n > 0, err
}

// PostMail adds a row and sets m.ID and m.Created. The commit wakes the
// servers. It is ErrLimit when too much waits for m.To already.
func (tx *Tx) PostMail(m *Mail) error {
	limit := MaxMailCall
	if m.Answer {
		limit = MaxMailAnswer
	}
	if len(m.Body) > limit {
		return &InvalidError{"Body", fmt.Sprintf("has more than %d bytes", limit)}
	}
	var waiting int
	err := tx.one(&waiting, "SELECT count(*) FROM mail WHERE tailnet_id = ? AND recipient = ?", tx.tailnet, m.To)
	if err != nil {
		return fmt.Errorf("post mail: %w", err)
	}
	if waiting >= maxMail {
		return fmt.Errorf("post mail: %w", ErrLimit)
	}
	row := mailRow{
		TailnetID: int64(tx.tailnet), Sender: m.From, Recipient: m.To, Call: clean(m.Call), Answer: m.Answer, NodeID: int64(m.Node), Error: clean(m.Error),
		Body: m.Body, Created: micros(tx.now),
	}
	if row.Body == nil {
		row.Body = []byte{}
	}
	if err := tx.err(tx.g.Create(&row).Error); err != nil {
		return fmt.Errorf("post mail: %w", err)
	}
	m.ID, m.Created = row.ID, tx.now
	tx.mailed = true
	return nil
}

// TakeMail removes the oldest mail for a server and returns it. More is left
// when it returns any: whoever wants all calls it until it returns none.
func (tx *Tx) TakeMail(instance int64) ([]*Mail, error) {
	found, err := find(tx.Reader, tx.mine().Where("recipient = ?", instance).Order("id").Limit(takeMail), rowToMail)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	ids := make([]int64, len(found))
	for i, m := range found {
		ids[i] = m.ID
	}
	if _, err := tx.exec("DELETE FROM mail WHERE id IN ?", ids); err != nil {
		return nil, fmt.Errorf("take mail: %w", err)
	}
	return found, nil
}

// DropMail removes what is left of a call: who made it has given up.
func (tx *Tx) DropMail(call string) error {
	_, err := tx.exec("DELETE FROM mail WHERE tailnet_id = ? AND call = ?", tx.tailnet, clean(call))
	return err
}

// SweepMail removes mail that nobody took for ten minutes.
func (tx *Tx) SweepMail() error {
	_, err := tx.exec("DELETE FROM mail WHERE tailnet_id = ? AND created <= ?", tx.tailnet, micros(tx.now.Add(-keepMail)))
	return err
}
