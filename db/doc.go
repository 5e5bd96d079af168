// Package db is the durable truth of a Signalbox server: rows in SQLite or
// PostgreSQL, and a log that says in which order they moved.
//
// It owns the schema, the transactions, the credentials' shape and hashes, the
// allocation of addresses and names, and the audit chain. It never speaks a
// network protocol to clients, compiles a policy or keeps a picture of a
// tailnet in memory: that is the work of its callers.
//
// # Writing
//
// Every write goes through [Store.Update]. The function given to it works on a
// [Tx]; each write method changes its rows and notes what moved. When the
// function returns nil, the notes become rows of the change log under one new
// [Revision], gap-free for each tailnet and equal to commit order. Update
// returns after the commit is on stable storage:
//
//	rev, err := store.Update(ctx, tailnet, actor, func(tx *db.Tx) error {
//		key, err := tx.RedeemAuthKey(keyID, hash, machine)
//		if err != nil {
//			return err
//		}
//		node := &db.Node{MachineKey: machine, NodeKey: nodeKey, User: key.User}
//		if node.IPv4, node.IPv6, err = tx.AllocateAddrs(pools); err != nil {
//			return err
//		}
//		if node.GivenName, err = tx.FreeName("laptop", node.Owner()); err != nil {
//			return err
//		}
//		if err := tx.CreateNode(node); err != nil {
//			return err
//		}
//		return tx.Audit("node.create", node.GivenName, nil, node)
//	})
//
// Concurrent Updates share one database transaction and one fsync, with a
// savepoint each, so one that fails does not sink the others.
//
// # Reading
//
// [Store.View] gives a [Reader] on one consistent state. A replica starts with
// [Store.Load], then calls [Store.Follow] with its revision whenever
// [Store.Wake] signals; each batch holds the rows that moved as they are at
// one later revision.
//
// # Faults
//
// A fault of the storage below (disk full, lock held, server away) is
// [ErrUnavailable]: nothing was changed, and the same call works again once
// the cause is gone. Damage is [ErrCorrupt]: Open refuses such a database, and
// damage found later stops writes until a check finds the file whole again.
package db
