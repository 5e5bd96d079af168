package db

import (
	"database/sql"
	"fmt"
	"net/netip"
	"reflect"
	"slices"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

type nodeRow struct {
	ID             int64 `gorm:"primaryKey"`
	StableID       string
	TailnetID      int64
	MachineKey     string
	NodeKey        string
	NLKey          string `gorm:"column:nl_key"`
	UserID         *int64
	Tags           string
	Hostname       string
	GivenName      string
	IPv4           *string `gorm:"column:ipv4"`
	IPv6           *string `gorm:"column:ipv6"`
	ApprovedRoutes string
	Expiry         int64
	Expired        bool
	LoggedOut      bool
	Ephemeral      bool
	AuthKeyID      int64
	RegisterMethod string
	Created        int64
}

func (nodeRow) TableName() string { return "nodes" }

func (r *nodeRow) owner() string {
	n := Node{}
	if r.UserID != nil {
		n.User = tailcfg.UserID(*r.UserID)
	}
	n.Tags, _ = parseList[string](r.Tags)
	return n.Owner()
}

func optional[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}

func addrText(a netip.Addr) *string {
	if !a.IsValid() {
		return nil
	}
	return optional(a.String())
}

// nodeToRow checks what the schema cannot, and normalises.
func nodeToRow(n *Node) (*nodeRow, error) {
	tags := sortedTags(n.Tags)
	switch {
	case n.NodeKey.IsZero():
		return nil, &InvalidError{"NodeKey", "is missing"}
	case n.MachineKey.IsZero():
		return nil, &InvalidError{"MachineKey", "is missing"}
	case n.User == 0 && len(tags) == 0:
		return nil, &InvalidError{"User", "a node belongs to a user or has tags"}
	case n.User != 0 && len(tags) != 0:
		return nil, &InvalidError{"User", "a tagged node belongs to no user"}
	case !isLabel(n.GivenName):
		return nil, &InvalidError{"GivenName", "is not a DNS label"}
	case n.IPv4.IsValid() && !n.IPv4.Is4():
		return nil, &InvalidError{"IPv4", "is not an IPv4 address"}
	case n.IPv6.IsValid() && (!n.IPv6.Is6() || n.IPv6.Is4In6() || n.IPv6.Zone() != ""):
		return nil, &InvalidError{"IPv6", "is not an IPv6 address"}
	case !n.IPv4.IsValid() && !n.IPv6.IsValid():
		return nil, &InvalidError{"IPv4", "a node has an address"}
	}
	routes := slices.Clone(n.ApprovedRoutes)
	slices.SortFunc(routes, netip.Prefix.Compare)
	return &nodeRow{
		ID: int64(n.ID), StableID: string(n.StableID),
		MachineKey: keyText(n.MachineKey), NodeKey: keyText(n.NodeKey), NLKey: keyText(n.NLKey),
		UserID: optional(int64(n.User)), Tags: list(tags),
		Hostname: clean(n.Hostname), GivenName: n.GivenName,
		IPv4: addrText(n.IPv4), IPv6: addrText(n.IPv6),
		ApprovedRoutes: list(slices.Compact(routes)), Expiry: micros(n.Expiry), Expired: n.Expired,
		LoggedOut: n.LoggedOut, Ephemeral: n.Ephemeral, AuthKeyID: n.AuthKeyID,
		RegisterMethod: clean(n.RegisterMethod), Created: micros(n.Created),
	}, nil
}

// isLabel tells whether s is a DNS label of lower-case letters, digits and
// inner hyphens.
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		if c-'a' > 25 && c-'0' > 9 && c != '-' {
			return false
		}
	}
	return true
}

func rowToNode(row *nodeRow, state *stateRow) (*Node, error) {
	n := &Node{
		ID: tailcfg.NodeID(row.ID), StableID: tailcfg.StableNodeID(row.StableID), Tailnet: TailnetID(row.TailnetID),
		Hostname: row.Hostname, GivenName: row.GivenName, Expiry: fromMicros(row.Expiry), Expired: row.Expired,
		LoggedOut: row.LoggedOut, Ephemeral: row.Ephemeral, AuthKeyID: row.AuthKeyID,
		RegisterMethod: row.RegisterMethod, Created: fromMicros(row.Created),
	}
	if row.UserID != nil {
		n.User = tailcfg.UserID(*row.UserID)
	}
	var err error
	try := func(e error) {
		if err == nil {
			err = e
		}
	}
	try(parseKey(row.MachineKey, &n.MachineKey))
	try(parseKey(row.NodeKey, &n.NodeKey))
	try(parseKey(row.NLKey, &n.NLKey))
	var e error
	n.Tags, e = parseList[string](row.Tags)
	try(e)
	n.ApprovedRoutes, e = parseList[netip.Prefix](row.ApprovedRoutes)
	try(e)
	if row.IPv4 != nil {
		n.IPv4, e = netip.ParseAddr(*row.IPv4)
		try(e)
	}
	if row.IPv6 != nil {
		n.IPv6, e = netip.ParseAddr(*row.IPv6)
		try(e)
	}
	try(state.into(&n.State))
	return n, err
}

const selectNodes = `SELECT n.id, n.stable_id, n.tailnet_id, n.machine_key, n.node_key, n.nl_key, n.user_id, n.tags,
 n.hostname, n.given_name, n.ipv4, n.ipv6, n.approved_routes, n.expiry, n.expired, n.logged_out, n.ephemeral,
 n.auth_key_id, n.register_method, n.created,
 s.disco_key, s.endpoints, s.home_derp, s.hostinfo, s.cap, s.online, s.instance, s.last_seen,
 u.node_id IS NOT NULL
 FROM nodes n JOIN node_states s ON s.node_id = n.id LEFT JOIN unhealthy_nodes u ON u.node_id = n.id WHERE `

// nodes runs selectNodes with a condition.
func (r *Reader) nodes(condition string, args ...any) ([]*Node, error) {
	var out []*Node
	var row nodeRow
	var state stateRow
	var unhealthy bool
	err := r.rows(selectNodes+condition, args, func(rows *sql.Rows) error {
		row.UserID, row.IPv4, row.IPv6 = nil, nil, nil
		if err := rows.Scan(&row.ID, &row.StableID, &row.TailnetID, &row.MachineKey, &row.NodeKey, &row.NLKey,
			&row.UserID, &row.Tags, &row.Hostname, &row.GivenName, &row.IPv4, &row.IPv6, &row.ApprovedRoutes,
			&row.Expiry, &row.Expired, &row.LoggedOut, &row.Ephemeral, &row.AuthKeyID, &row.RegisterMethod, &row.Created,
			&state.DiscoKey, &state.Endpoints, &state.HomeDERP, &state.Hostinfo, &state.Cap, &state.Online,
			&state.Instance, &state.LastSeen, &unhealthy); err != nil {
			return err
		}
		n, err := rowToNode(&row, &state)
		if err != nil {
			return r.damaged("node", row.ID, err)
		}
		n.State.Unhealthy = unhealthy
		out = append(out, n)
		return nil
	})
	return out, err
}

func (r *Reader) node(condition string, args ...any) (*Node, error) {
	found, err := r.nodes(condition, args...)
	if err == nil && len(found) == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	return found[0], nil
}

// Node returns the node of that id.
func (r *Reader) Node(id tailcfg.NodeID) (*Node, error) {
	return r.node("n.id = ? AND n.tailnet_id = ?", id, r.tailnet)
}

// NodeByNodeKey returns the node that has k as its current node key.
func (r *Reader) NodeByNodeKey(k key.NodePublic) (*Node, error) {
	return r.node("n.node_key = ? AND n.tailnet_id = ?", keyText(k), r.tailnet)
}

// NodesByMachineKey returns the nodes of one machine, by id. There may be
// several: one for each profile of the client.
func (r *Reader) NodesByMachineKey(k key.MachinePublic) ([]*Node, error) {
	return r.nodes("n.tailnet_id = ? AND n.machine_key = ? ORDER BY n.id", r.tailnet, keyText(k))
}

// Stranger reports whether nothing is known of a machine key: it has no node,
// and no deleted one that is remembered.
func (r *Reader) Stranger(k key.MachinePublic) (bool, error) {
	var known int
	text := keyText(k)
	err := r.one(&known, "SELECT 1 FROM nodes WHERE tailnet_id = ? AND machine_key = ? "+
		"UNION ALL SELECT 1 FROM tombstones WHERE tailnet_id = ? AND machine_key = ? LIMIT 1", r.tailnet, text, r.tailnet, text)
	if err == ErrNotFound {
		return true, nil
	}
	return false, err
}

// Nodes returns all nodes, by id.
func (r *Reader) Nodes() ([]*Node, error) {
	return r.nodes("n.tailnet_id = ? ORDER BY n.id", r.tailnet)
}

const base58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"

// CreateNode adds a node with its state, sets n.ID, n.Tailnet and, when they
// are empty, n.StableID and n.Created. A value that another node has is an
// ExistsError that names the field.
func (tx *Tx) CreateNode(n *Node) error {
	row, err := nodeToRow(n)
	if err != nil {
		return err
	}
	row.ID, row.TailnetID = 0, int64(tx.tailnet)
	if row.StableID == "" {
		row.StableID = "n" + randomText(base58, 12) + "CNTRL"
	}
	if row.Created == 0 {
		row.Created = micros(tx.now)
	}
	if err = tx.guard(func() error { return tx.err(tx.g.Create(row).Error) }); err != nil {
		return fmt.Errorf("create node %s: %w", n.GivenName, err)
	}
	state := stateToRow(tailcfg.NodeID(row.ID), tx.tailnet, &n.State)
	if err := tx.err(tx.g.Create(&state).Error); err != nil {
		return fmt.Errorf("create node %s: %w", n.GivenName, err)
	}
	n.ID, n.StableID, n.Tailnet = tailcfg.NodeID(row.ID), tailcfg.StableNodeID(row.StableID), tx.tailnet
	n.Created = fromMicros(row.Created)
	tx.state.spares.created(n.IPv4, n.IPv6)
	tx.noteNode(n.ID)
	return nil
}

// PutNode writes the whole row of a node, but not its State. Identity stays:
// ID, StableID and Created are not changed. A given name or an address that
// the node gives up is held for 24 h. A row that is as n says is no write.
func (tx *Tx) PutNode(n *Node) error {
	row, err := nodeToRow(n)
	if err != nil {
		return err
	}
	old, err := tx.nodeRow(n.ID)
	if err != nil {
		return fmt.Errorf("put node %d: %w", n.ID, err)
	}
	row.TailnetID, row.StableID, row.Created = old.TailnetID, old.StableID, old.Created
	if reflect.DeepEqual(row, old) {
		return nil
	}
	err = tx.guard(func() error {
		return tx.err(tx.g.Model(&nodeRow{}).Where("id = ?", row.ID).Select("*").Omit("id").Updates(row).Error)
	})
	if err != nil {
		return fmt.Errorf("put node %d: %w", n.ID, err)
	}
	tx.state.spares.taken(n.IPv4, n.IPv6)
	if err := tx.releaseWhatMoved(old, row); err != nil {
		return fmt.Errorf("put node %d: %w", n.ID, err)
	}
	tx.noteNode(n.ID)
	return nil
}

func (tx *Tx) nodeRow(id tailcfg.NodeID) (*nodeRow, error) {
	return findOne(tx.Reader, tx.mine().Where("id = ?", id), func(r *nodeRow) (*nodeRow, error) { return r, nil })
}

func (tx *Tx) releaseWhatMoved(old, row *nodeRow) error {
	if old.GivenName != row.GivenName {
		if err := tx.releaseName(old.GivenName, old.owner()); err != nil {
			return err
		}
	}
	var freed []string
	for _, p := range [][2]*string{{old.IPv4, row.IPv4}, {old.IPv6, row.IPv6}} {
		if p[0] != nil && (p[1] == nil || *p[0] != *p[1]) {
			freed = append(freed, *p[0])
		}
	}
	return tx.releaseAddrs(freed)
}

// DeleteNode removes a node, leaves a tombstone of its keys, takes it from the
// routes that it is primary of, and holds its name and addresses for 24 h. The
// machine can no longer use the auth key again that had admitted this node.
func (tx *Tx) DeleteNode(id tailcfg.NodeID) error {
	row, err := tx.nodeRow(id)
	if err == nil {
		err = tx.deleteNode(row)
	}
	if err != nil {
		return fmt.Errorf("delete node %d: %w", id, err)
	}
	return nil
}

func (tx *Tx) deleteNode(row *nodeRow) error {
	n, err := tx.exec("DELETE FROM primaries WHERE node_id = ?", row.ID)
	if err != nil {
		return err
	}
	if n > 0 {
		tx.note(KindPrimary, row.ID)
	}
	if row.AuthKeyID != 0 {
		if _, err := tx.exec("UPDATE auth_key_uses SET closed = ? WHERE auth_key_id = ? AND machine_key = ?",
			micros(tx.now), row.AuthKeyID, row.MachineKey); err != nil {
			return err
		}
	}
	// Its state goes with it by the foreign key.
	if _, err := tx.exec("DELETE FROM nodes WHERE id = ?", row.ID); err != nil {
		return err
	}
	t := tombstoneRow{TailnetID: row.TailnetID, MachineKey: row.MachineKey, NodeKey: row.NodeKey,
		NodeID: row.ID, StableID: row.StableID, Name: row.GivenName, Deleted: micros(tx.now)}
	if err := tx.err(tx.g.Create(&t).Error); err != nil {
		return err
	}
	if err := tx.releaseWhatMoved(row, &nodeRow{}); err != nil {
		return err
	}
	tx.noteNode(tailcfg.NodeID(row.ID))
	tx.note(KindTombstone, t.ID)
	return nil
}
