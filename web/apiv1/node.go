package apiv1

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// listNodes lists all nodes, or those of ?user=.
func (s *server) listNodes(r *http.Request) (any, error) {
	snap := s.Replica.Current()
	var of tailcfg.UserID
	if ref := r.URL.Query().Get("user"); ref != "" {
		u, err := findUser(snap, "query.user", ref)
		if err != nil {
			return nil, err
		}
		of = u.ID
	}
	keys, err := s.authKeys(r)
	if err != nil {
		return nil, err
	}
	byID := make(map[int64]*PreAuthKey, len(keys))
	for _, k := range keys {
		byID[k.ID] = authKeyOf(k, ownerOf(snap, k.User))
	}
	out := NodesResponse{Nodes: []*Node{}}
	for _, n := range snap.Nodes() {
		if n != nil && (of == 0 || n.User == of) {
			out.Nodes = append(out.Nodes, nodeOf(n.Node, ownerOf(snap, n.User), byID[n.AuthKeyID]))
		}
	}
	return out, nil
}

func (s *server) getNode(r *http.Request) (any, error) {
	id, err := pathID(r, "id")
	if err != nil {
		return nil, err
	}
	snap := s.Replica.Current()
	n := snap.Node(tailcfg.NodeID(id))
	if n == nil {
		return nil, noNode(id)
	}
	var key *PreAuthKey
	if n.AuthKeyID != 0 {
		err = s.view(r, func(rd *db.Reader) error {
			k, err := rd.AuthKey(n.AuthKeyID)
			if errors.Is(err, db.ErrNotFound) {
				return nil
			}
			if err == nil {
				key = authKeyOf(k, ownerOf(snap, k.User))
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return NodeResponse{nodeOf(n.Node, ownerOf(snap, n.User), key)}, nil
}

func (s *server) deleteNode(r *http.Request) (any, error) {
	id, err := pathID(r, "id")
	if err != nil {
		return nil, err
	}
	err = s.write(r, func(tx *db.Tx) error {
		n, err := nodeByID(tx, id)
		if err != nil {
			return err
		}
		before, err := nodeIn(tx, n)
		if err != nil {
			return err
		}
		if err := tx.DeleteNode(n.ID); err != nil {
			return err
		}
		return tx.Audit("node.delete", nodeTarget(n.ID), before, nil)
	})
	if err != nil {
		return nil, err
	}
	return EmptyResponse{}, nil
}

// expireNode takes its fields from the body or, as the gateway of 0.29 did,
// from the query.
func (s *server) expireNode(w http.ResponseWriter, r *http.Request) (any, error) {
	var req ExpireNodeRequest
	if err := decode(w, r, &req, maxBody, true); err != nil {
		return nil, err
	}
	if q := r.URL.Query().Get("expiry"); q != "" && req.Expiry == nil {
		t, err := time.Parse(time.RFC3339, q)
		if err != nil {
			return nil, badField("query.expiry", "must be a time such as 2030-01-02T15:04:05Z")
		}
		req.Expiry = &Timestamp{t}
	}
	disable, err := queryBool(r, "disableExpiry")
	if err != nil {
		return nil, err
	}
	disable = disable || req.DisableExpiry
	at := req.Expiry != nil && !req.Expiry.IsZero()
	switch {
	case disable && at:
		return nil, badField("body.disableExpiry", "cannot be combined with expiry")
	case at && req.Expiry.After(lastTime):
		return nil, badField("body.expiry", "must not be after the year 2199")
	}
	return s.changeNode(r, "node.expire", func(tx *db.Tx, n *db.Node) error {
		switch {
		case disable:
			n.Expiry, n.Expired = time.Time{}, false
		case at && req.Expiry.After(tx.Now()):
			n.Expiry, n.Expired = req.Expiry.UTC(), false
		default:
			// A moment that has passed is now: the row says since when the key
			// does not count, and it counted until this transaction.
			n.Expiry, n.Expired = tx.Now(), true
		}
		return nil
	})
}

// renameNode takes ?force=true for a name that is still held for its former owner.
func (s *server) renameNode(r *http.Request) (any, error) {
	name, err := pathText(r, "name")
	if err != nil {
		return nil, err
	}
	force, err := queryBool(r, "force")
	if err != nil {
		return nil, err
	}
	name = strings.ToLower(name)
	if tailnet.Label(name, 0) != name {
		return nil, badField("path.name", "must be a DNS label: 1 to 63 letters, digits and inner hyphens")
	}
	return s.changeNode(r, "node.rename", func(tx *db.Tx, n *db.Node) error {
		if n.GivenName == name {
			return nil
		}
		reserved := slices.Concat(s.Reserved, s.Replica.Current().Settings().RecordLabels())
		free, err := tx.FreeName(name, n.Owner(), reserved...)
		if err != nil {
			return err
		}
		if free != name {
			held, err := tx.NameFree(name, reserved...)
			switch {
			case err != nil:
				return err
			case !held:
				return conflict("the name %q is taken or reserved; %q is free", name, free)
			case !force:
				return conflict("the name %q is held for its former owner (force=true takes it nevertheless); %q is free", name, free)
			}
		}
		n.GivenName = name
		return nil
	})
}

// setIP gives a node the address of the body in place of its address of that family.
func (s *server) setIP(w http.ResponseWriter, r *http.Request) (any, error) {
	var req SetIPRequest
	if err := decode(w, r, &req, maxBody, false); err != nil {
		return nil, err
	}
	a, err := netip.ParseAddr(req.IPAddress)
	switch {
	case err != nil || a.Zone() != "":
		return nil, badField("body.ipAddress", "must be an address such as 100.64.0.7")
	case !s.Pools.Assignable(a.Unmap()):
		return nil, badField("body.ipAddress", "%v cannot be a node's: it is outside of %s, or has a meaning of its own", a, s.prefixes())
	}
	a = a.Unmap()
	return s.changeNode(r, "node.addresses", func(tx *db.Tx, n *db.Node) error {
		if n.IPv4 == a || n.IPv6 == a {
			return nil
		}
		free, err := tx.AddrFree(a)
		if err != nil {
			return err
		}
		if !free {
			return conflict("another node has the address %v", a)
		}
		if a.Is4() {
			n.IPv4 = a
		} else {
			n.IPv6 = a
		}
		return nil
	})
}

// prefixes names the configured pools.
func (s *server) prefixes() string {
	var list []string
	for _, p := range []netip.Prefix{s.Pools.IPv4, s.Pools.IPv6} {
		if p.IsValid() {
			list = append(list, p.String())
		}
	}
	return strings.Join(list, " and ")
}

// setTags gives a node to its tags. It loses its person, and with the person
// the expiry: tagged nodes are servers that nobody logs in to again.
func (s *server) setTags(w http.ResponseWriter, r *http.Request) (any, error) {
	var req SetTagsRequest
	if err := decode(w, r, &req, maxBody, false); err != nil {
		return nil, err
	}
	tags, err := tagList("body.tags", req.Tags)
	if err != nil {
		return nil, err
	}
	if len(tags) == 0 {
		return nil, badField("body.tags", "must not be empty: a tagged node cannot go back to a person")
	}
	if p := s.Replica.Current().Policy().Parsed; p != nil {
		for _, t := range tags {
			if !slices.Contains(p.Tags(), t) {
				return nil, badField("body.tags", "%s has no owner in the policy's tagOwners", t)
			}
		}
	}
	return s.changeNode(r, "node.tags", func(tx *db.Tx, n *db.Node) error {
		if len(n.Tags) == 0 {
			n.User, n.Expiry = 0, time.Time{}
			n.Expired = n.LoggedOut
		}
		n.Tags = tags
		return nil
	})
}

// changeNode lets edit change a node's row, with an audit row named action, and
// answers with the node as it is then. An edit that changes nothing writes
// nothing.
func (s *server) changeNode(r *http.Request, action string, edit func(*db.Tx, *db.Node) error) (any, error) {
	id, err := pathID(r, "id")
	if err != nil {
		return nil, err
	}
	var out *Node
	err = s.write(r, func(tx *db.Tx) error {
		n, err := nodeByID(tx, id)
		if err != nil {
			return err
		}
		before, err := nodeIn(tx, n)
		if err != nil {
			return err
		}
		was := *n
		if err := edit(tx, n); err != nil {
			return err
		}
		out = before
		if sameRow(&was, n) {
			return nil
		}
		if err := tx.PutNode(n); err != nil {
			return taken(err, "another node has that name, address or key")
		}
		if out, err = nodeIn(tx, n); err != nil {
			return err
		}
		return tx.Audit(action, nodeTarget(n.ID), before, out)
	})
	if err != nil {
		return nil, err
	}
	return NodeResponse{out}, nil
}

// sameRow compares what this interface can change.
func sameRow(a, b *db.Node) bool {
	return a.User == b.User && slices.Equal(a.Tags, b.Tags) && a.GivenName == b.GivenName && slices.Equal(a.ApprovedRoutes, b.ApprovedRoutes) &&
		a.Expiry.Equal(b.Expiry) && a.Expired == b.Expired && a.IPv4 == b.IPv4 && a.IPv6 == b.IPv6
}

// nodeIn renders a node from within a transaction.
func nodeIn(tx *db.Tx, n *db.Node) (*Node, error) {
	owner, err := find(n.User, tx.User)
	if err != nil {
		return nil, err
	}
	key, err := find(n.AuthKeyID, tx.AuthKey)
	if err != nil || key == nil {
		return nodeOf(n, owner, nil), err
	}
	keyOwner, err := find(key.User, tx.User)
	return nodeOf(n, owner, authKeyOf(key, keyOwner)), err
}

// find reads a row that need not exist; nil when it does not.
func find[K ~int64, V any](id K, read func(K) (*V, error)) (*V, error) {
	if id == 0 {
		return nil, nil
	}
	v, err := read(id)
	if errors.Is(err, db.ErrNotFound) {
		return nil, nil
	}
	return v, err
}

// backfillIPs gives nodes an address of each family that they lack, and takes
// away those of a family that is turned off.
func (s *server) backfillIPs(r *http.Request) (any, error) {
	confirmed, err := queryBool(r, "confirmed")
	if err != nil {
		return nil, err
	}
	if !confirmed {
		return nil, badField("query.confirmed", "must be true: nodes get other addresses")
	}
	var out BackfillIPsResponse
	err = s.write(r, func(tx *db.Tx) error {
		out.Changes = []string{}
		nodes, err := tx.Nodes()
		if err != nil {
			return err
		}
		for _, n := range nodes {
			before := *n
			changes, err := s.backfill(tx, n)
			if err != nil {
				return err
			}
			if len(changes) == 0 {
				continue
			}
			if err := tx.PutNode(n); err != nil {
				return err
			}
			if err := tx.Audit("node.addresses", nodeTarget(n.ID), addresses(&before), addresses(n)); err != nil {
				return err
			}
			out.Changes = append(out.Changes, changes...)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// backfill changes the addresses in n and says what it did.
func (s *server) backfill(tx *db.Tx, n *db.Node) (changes []string, err error) {
	note := func(verb string, family int, a netip.Addr) {
		changes = append(changes, fmt.Sprintf("%s node %d (%s): IPv%d address %v", verb, n.ID, n.GivenName, family, a))
	}
	lacks := db.Pools{Random: s.Pools.Random}
	switch {
	case !s.Pools.IPv4.IsValid() && n.IPv4.IsValid():
		note("removed from", 4, n.IPv4)
		n.IPv4 = netip.Addr{}
	case !n.IPv4.IsValid():
		lacks.IPv4 = s.Pools.IPv4
	}
	switch {
	case !s.Pools.IPv6.IsValid() && n.IPv6.IsValid():
		note("removed from", 6, n.IPv6)
		n.IPv6 = netip.Addr{}
	case !n.IPv6.IsValid():
		lacks.IPv6 = s.Pools.IPv6
	}
	if !lacks.IPv4.IsValid() && !lacks.IPv6.IsValid() {
		return changes, nil
	}
	v4, v6, err := tx.AllocateAddrs(lacks)
	if err != nil {
		return nil, err
	}
	if v4.IsValid() {
		note("assigned to", 4, v4)
		n.IPv4 = v4
	}
	if v6.IsValid() {
		note("assigned to", 6, v6)
		n.IPv6 = v6
	}
	return changes, nil
}

// addresses is what the audit row of a backfill shows.
func addresses(n *db.Node) []string { return nodeOf(n, nil, nil).IPAddresses }

func nodeTarget(id tailcfg.NodeID) string { return "node:" + strconv.FormatInt(int64(id), 10) }

func noNode(id int64) error { return notFound("no node has the id %d", id) }

// nodeByID finds a node for a write.
func nodeByID(tx *db.Tx, id int64) (*db.Node, error) {
	n, err := tx.Node(tailcfg.NodeID(id))
	if errors.Is(err, db.ErrNotFound) {
		return nil, noNode(id)
	}
	return n, err
}
