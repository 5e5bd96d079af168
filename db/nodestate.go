package db

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"gorm.io/gorm/clause"
	"tailscale.com/tailcfg"
)

type stateRow struct {
	NodeID    int64 `gorm:"primaryKey;autoIncrement:false"`
	TailnetID int64
	DiscoKey  string
	Endpoints string
	HomeDERP  int64 `gorm:"column:home_derp"`
	Hostinfo  string
	Cap       int64
	Online    bool
	Instance  int64
	LastSeen  int64
}

func (stateRow) TableName() string { return "node_states" }

// storedEndpoint is tailcfg.Endpoint, which has no JSON form of its own.
type storedEndpoint struct {
	Addr netip.AddrPort       `json:"a"`
	Type tailcfg.EndpointType `json:"t,omitempty"`
}

func stateToRow(id tailcfg.NodeID, tailnet TailnetID, s *NodeState) stateRow {
	endpoints := make([]storedEndpoint, len(s.Endpoints))
	for i, e := range s.Endpoints {
		endpoints[i] = storedEndpoint{e.Addr, e.Type}
	}
	return stateRow{
		NodeID: int64(id), TailnetID: int64(tailnet), DiscoKey: keyText(s.DiscoKey), Endpoints: list(endpoints),
		HomeDERP: int64(s.HomeDERP), Hostinfo: hostinfoText(s.Hostinfo), Cap: int64(s.Cap),
		Online: s.Online, Instance: s.Instance, LastSeen: micros(s.LastSeen),
	}
}

func (row *stateRow) into(s *NodeState) error {
	if err := parseKey(row.DiscoKey, &s.DiscoKey); err != nil {
		return err
	}
	stored, err := parseList[storedEndpoint](row.Endpoints)
	if err != nil {
		return err
	}
	if len(stored) > 0 {
		s.Endpoints = make([]tailcfg.Endpoint, len(stored))
		for i, e := range stored {
			s.Endpoints[i] = tailcfg.Endpoint{Addr: e.Addr, Type: e.Type}
		}
	}
	s.HomeDERP, s.Cap = int(row.HomeDERP), tailcfg.CapabilityVersion(row.Cap)
	s.Online, s.Instance, s.LastSeen = row.Online, row.Instance, fromMicros(row.LastSeen)
	s.Hostinfo, err = parseHostinfo(row.Hostinfo)
	return err
}

// hostinfoText is "" for none. Invalid UTF-8 in it is replaced by the encoder.
func hostinfoText(h *tailcfg.Hostinfo) string {
	if h == nil {
		return ""
	}
	text, err := json.Marshal(h)
	if err != nil {
		panic(err) // tailcfg.Hostinfo has no field that fails to marshal
	}
	return string(text)
}

func parseHostinfo(s string) (*tailcfg.Hostinfo, error) {
	if s == "" {
		return nil, nil
	}
	h := new(tailcfg.Hostinfo)
	return h, json.Unmarshal([]byte(s), h)
}

// SetUnhealthy notes that a node does not answer the probes of its server, or
// that it does again. What is noted already is no write.
func (tx *Tx) SetUnhealthy(id tailcfg.NodeID, unhealthy bool) error {
	query := "DELETE FROM unhealthy_nodes WHERE node_id = ? AND tailnet_id = ?"
	args := []any{id, tx.tailnet}
	if unhealthy {
		query = "INSERT INTO unhealthy_nodes (node_id, tailnet_id, since) SELECT id, tailnet_id, CAST(? AS bigint) FROM nodes " +
			"WHERE id = ? AND tailnet_id = ? ON CONFLICT DO NOTHING"
		args = []any{micros(tx.now), id, tx.tailnet}
	}
	n, err := tx.exec(query, args...)
	if err == nil && n == 0 {
		_, err = tx.nodeRow(id)
		if err == nil {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("set health of node %d: %w", id, err)
	}
	tx.note(KindNodeState, int64(id))
	return nil
}

// PutNodeState writes one node's state.
func (tx *Tx) PutNodeState(id tailcfg.NodeID, s NodeState) error {
	n, err := tx.putStates(map[tailcfg.NodeID]NodeState{id: s})
	if err == nil && n == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("put state of node %d: %w", id, err)
	}
	return nil
}

// PutNodeStates writes the states of many nodes. Nodes that do not exist are
// passed over: reports of a node may arrive after its deletion.
func (tx *Tx) PutNodeStates(states map[tailcfg.NodeID]NodeState) error {
	if _, err := tx.putStates(states); err != nil {
		return fmt.Errorf("put states of %d nodes: %w", len(states), err)
	}
	return nil
}

// stateBatch is how many states one look-up of existing nodes has.
const stateBatch = 500

func (tx *Tx) putStates(states map[tailcfg.NodeID]NodeState) (int, error) {
	written := 0
	for ids := range slices.Chunk(slices.Sorted(maps.Keys(states)), stateBatch) {
		var existing []tailcfg.NodeID
		q := tx.mine().Table("node_states").Where("node_id IN ?", ids).Order("node_id")
		if err := tx.err(q.Pluck("node_id", &existing).Error); err != nil {
			return written, err
		}
		if len(existing) == 0 {
			continue
		}
		rows := make([]stateRow, len(existing))
		for i, id := range existing {
			s := states[id]
			rows[i] = stateToRow(id, tx.tailnet, &s)
		}
		upsert := clause.OnConflict{Columns: []clause.Column{{Name: "node_id"}}, UpdateAll: true}
		if err := tx.err(tx.g.Clauses(upsert).CreateInBatches(&rows, tx.conn.store.rowBatch()).Error); err != nil {
			return written, err
		}
		for _, id := range existing {
			tx.note(KindNodeState, int64(id))
		}
		written += len(existing)
	}
	return written, nil
}
