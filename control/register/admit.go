package register

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// A device is what asks to be a node, with whom it has been found to belong to.
type device struct {
	machine   key.MachinePublic
	node, old key.NodePublic // old is the key that it had before, zero for none
	nl        key.NLPublic
	hostinfo  *tailcfg.Hostinfo
	version   tailcfg.CapabilityVersion
	expiry    time.Time // asked for; zero for the tailnet's own
	ephemeral bool
	user      tailcfg.UserID // the person who logged in, or whose key it is; 0 with tags
	tags      []string       // sorted; with tags no person owns the node
	authKey   int64
	method    string // "authkey", "cli", "oidc"
	name      string // wanted label; empty takes it from the host name
}

// owner is who the node belongs to: nobody but its tags when it has some.
func (d *device) owner() tailcfg.UserID {
	if len(d.tags) > 0 {
		return 0
	}
	return d.user
}

// decide says which of the nodes of one machine the device is; nil when it is a new one. A machine has one node for each person who logged
// in there, so that of another person is never taken over. The node of the previous key comes first: that is how a device renews its key,
// and how it gains or loses tags.
func decide(d *device, machine []*db.Node) *db.Node {
	same := func(n *db.Node) bool { return len(n.Tags) == 0 && n.User == d.user }
	for _, n := range machine {
		if (n.NodeKey == d.node || n.NodeKey == d.old) && (same(n) || len(n.Tags) > 0 || len(d.tags) > 0) {
			return n
		}
	}
	for _, n := range machine {
		if len(d.tags) > 0 && slices.Equal(n.Tags, d.tags) || len(d.tags) == 0 && same(n) {
			return n
		}
	}
	return nil
}

// admit makes the device a node: a new one, or the one it was before with a new key. It returns the row as written.
func (r *Registrar) admit(tx *db.Tx, d *device) (*db.Node, error) {
	// Most that ask are new, and this is the least work that tells.
	if stranger, err := tx.Stranger(d.machine); err != nil {
		return nil, err
	} else if stranger {
		return r.create(tx, d)
	}
	machine, err := tx.NodesByMachineKey(d.machine)
	if err != nil {
		return nil, err
	}
	if err := tx.DeleteTombstones(d.machine, d.node); err != nil {
		return nil, err
	}
	if rec := decide(d, machine); rec != nil {
		return rec, r.renew(tx, d, rec)
	}
	return r.create(tx, d)
}

func (r *Registrar) renew(tx *db.Tx, d *device, rec *db.Node) error {
	before := auditView(rec)
	rec.NodeKey, rec.NLKey, rec.User, rec.Tags = d.node, d.nl, d.owner(), d.tags
	rec.Expired, rec.LoggedOut, rec.Ephemeral = false, false, d.ephemeral
	rec.Expiry = r.expiry(tx, d)
	rec.AuthKeyID, rec.RegisterMethod = d.authKey, d.method
	if h := d.hostinfo.Hostname; h != rec.Hostname && tailnet.AutoNamed(rec.GivenName, rec.Hostname) && tailnet.Label(h, rec.ID) != tailnet.Label(rec.Hostname, rec.ID) {
		name, err := tx.FreeName(tailnet.Label(h, rec.ID), rec.Owner(), r.cfg.Replica.ReservedLabels(r.cfg.Reserved)...)
		if err != nil {
			return err
		}
		rec.GivenName = name
	}
	rec.Hostname = d.hostinfo.Hostname
	if err := tx.PutNode(rec); err != nil {
		return err
	}
	return tx.Audit("node.reauthenticate", target(rec), before, auditView(rec))
}

func (r *Registrar) create(tx *db.Tx, d *device) (*db.Node, error) {
	rec := &db.Node{
		MachineKey: d.machine, NodeKey: d.node, NLKey: d.nl, User: d.owner(), Tags: d.tags, Hostname: d.hostinfo.Hostname, Ephemeral: d.ephemeral,
		AuthKeyID: d.authKey, RegisterMethod: d.method, Expiry: r.expiry(tx, d), Created: tx.Now(),
		State: db.NodeState{Hostinfo: d.hostinfo, Cap: d.version, LastSeen: tx.Now()},
	}
	err := r.room()
	if err != nil {
		return nil, err
	}
	if rec.GivenName, err = tx.FreeName(cmp.Or(d.name, tailnet.Label(d.hostinfo.Hostname, 0)), rec.Owner(), r.cfg.Replica.ReservedLabels(r.cfg.Reserved)...); err != nil {
		return nil, fmt.Errorf("choose a name: %w", err)
	}
	if rec.IPv4, rec.IPv6, err = r.addresses(tx, d); err != nil {
		return nil, fmt.Errorf("choose addresses: %w", err)
	}
	if err := tx.CreateNode(rec); err != nil {
		return nil, fmt.Errorf("create node: %w", err)
	}
	return rec, tx.Audit("node.register", target(rec), nil, auditView(rec))
}

// addresses chooses those of a new node. IPv4 comes from the pools that the policy names for such a node, if it does, the first that has one
// left; another pool would break what the policy says of the devices in it.
func (r *Registrar) addresses(tx *db.Tx, d *device) (v4, v6 netip.Addr, err error) {
	snap := r.cfg.Replica.Current()
	var own []netip.Prefix
	if p := snap.Policy().Parsed; p != nil && r.cfg.Pools.IPv4.IsValid() {
		own = p.IPPools(snap.ACLTailnet(), &acl.Node{User: d.owner(), Tags: d.tags})
	}
	if len(own) == 0 {
		return tx.AllocateAddrs(r.cfg.Pools)
	}
	pools := r.cfg.Pools
	for _, pools.IPv4 = range own {
		if v4, v6, err = tx.AllocateAddrs(pools); !errors.Is(err, db.ErrPoolExhausted) {
			break
		}
	}
	return v4, v6, err
}

// expiry is when the node's key ends: never for tagged nodes, else after the configured time, or sooner if the client asked for that.
func (r *Registrar) expiry(tx *db.Tx, d *device) time.Time {
	if len(d.tags) > 0 {
		return time.Time{}
	}
	var t time.Time
	if r.cfg.NodeExpiry > 0 {
		t = tx.Now().Add(r.cfg.NodeExpiry)
	}
	if !d.expiry.IsZero() && d.expiry.After(tx.Now()) && (t.IsZero() || d.expiry.Before(t)) {
		t = d.expiry
	}
	return t
}

// target names a node in the audit log.
func target(n *db.Node) string { return fmt.Sprintf("node:%d", n.ID) }

// auditView is what the audit log keeps of a node: who it is, never its keys' secrets or its metadata.
func auditView(n *db.Node) json.RawMessage {
	b, err := json.Marshal(struct {
		Name       string            `json:"name"`
		MachineKey key.MachinePublic `json:"machineKey"`
		NodeKey    key.NodePublic    `json:"nodeKey"`
		User       tailcfg.UserID    `json:"user,omitempty"`
		Tags       []string          `json:"tags,omitempty"`
		Addresses  []netip.Addr      `json:"addresses"`
		Expiry     time.Time         `json:"expiry,omitzero"`
		LoggedOut  bool              `json:"loggedOut,omitempty"`
	}{n.GivenName, n.MachineKey, n.NodeKey, n.User, n.Tags, []netip.Addr{n.IPv4, n.IPv6}, n.Expiry, n.LoggedOut})
	if err != nil {
		return nil
	}
	return b
}

func contains(list []string, s string) bool { return slices.Contains(list, s) }

func sortedTags(tags []string) []string {
	slices.Sort(tags)
	return slices.Compact(tags)
}

// NewNode describes a node made by hand.
type NewNode struct {
	MachineKey key.MachinePublic
	NodeKey    key.NodePublic
	User       tailcfg.UserID
	Name       string
	Routes     []netip.Prefix // advertised
}
