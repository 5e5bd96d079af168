package db

import (
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// NodesByID returns those of the nodes that exist.
func (r *Reader) NodesByID(ids []tailcfg.NodeID) (map[tailcfg.NodeID]*Node, error) {
	b := &Batch{Nodes: make(map[tailcfg.NodeID]*Node, len(ids))}
	list := make([]int64, len(ids))
	for i, id := range ids {
		list[i] = int64(id)
	}
	if err := r.loadNodes(b, list); err != nil {
		return nil, err
	}
	for id, n := range b.Nodes {
		if n == nil {
			delete(b.Nodes, id)
		}
	}
	return b.Nodes, nil
}

// PendingLogin returns the login of a machine that waits for a person; there is at most one. ErrNotFound when none does.
func (r *Reader) PendingLogin(m key.MachinePublic) (*AuthRequest, error) {
	return findOne(r, r.mine().Where("machine_key = ? AND kind = ? AND state = ? AND expires > ?",
		keyText(m), AuthRequestRegister, AuthRequestPending, micros(r.conn.store.now())), rowToAuthRequest)
}
