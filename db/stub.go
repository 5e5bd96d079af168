package db

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

var errNotImplemented = errors.New("db: not implemented")

func (s *Store) Close() error { return errNotImplemented }
func (s *Store) Bootstrap(ctx context.Context, name string, init func(*Tx) error) (id TailnetID, created bool, err error) {
	return 0, false, errNotImplemented
}
func (s *Store) View(ctx context.Context, fn func(*Reader) error) error { return errNotImplemented }
func (s *Store) Update(ctx context.Context, tailnet TailnetID, actor Actor, fn func(*Tx) error) (Revision, error) {
	return 0, errNotImplemented
}
func (s *Store) Load(ctx context.Context, tailnet TailnetID) (*Batch, error) {
	return nil, errNotImplemented
}
func (s *Store) Follow(ctx context.Context, tailnet TailnetID, after Revision) (*Batch, error) {
	return nil, errNotImplemented
}
func (s *Store) Wake() <-chan struct{}                          { return nil }
func (s *Store) Subscribe() (ch <-chan struct{}, cancel func()) { return nil, func() {} }
func (s *Store) Healthy(ctx context.Context) error              { return errNotImplemented }
func (s *Store) Prune(ctx context.Context) error                { return errNotImplemented }

func (r *Reader) In(tailnet TailnetID) *Reader { return r }
func (r *Reader) Tailnet() TailnetID           { return 0 }
func (r *Reader) Revision() (Revision, error)  { return 0, errNotImplemented }
func (r *Reader) Node(id tailcfg.NodeID) (*Node, error) {
	return nil, errNotImplemented
}
func (r *Reader) NodeByNodeKey(k key.NodePublic) (*Node, error) { return nil, errNotImplemented }
func (r *Reader) NodesByMachineKey(k key.MachinePublic) ([]*Node, error) {
	return nil, errNotImplemented
}
func (r *Reader) Nodes() ([]*Node, error)                       { return nil, errNotImplemented }
func (r *Reader) User(id tailcfg.UserID) (*User, error)         { return nil, errNotImplemented }
func (r *Reader) UserByName(name string) (*User, error)         { return nil, errNotImplemented }
func (r *Reader) UserByEmail(email string) (*User, error)       { return nil, errNotImplemented }
func (r *Reader) Users() ([]*User, error)                       { return nil, errNotImplemented }
func (r *Reader) AuthKeys() ([]*AuthKey, error)                 { return nil, errNotImplemented }
func (r *Reader) AuthKey(id int64) (*AuthKey, error)            { return nil, errNotImplemented }
func (r *Reader) AuthKeyByKeyID(keyID string) (*AuthKey, error) { return nil, errNotImplemented }
func (r *Reader) APIKeys() ([]*APIKey, error)                   { return nil, errNotImplemented }
func (r *Reader) APIKey(id int64) (*APIKey, error)              { return nil, errNotImplemented }
func (r *Reader) APIKeyByKeyID(keyID string) (*APIKey, error)   { return nil, errNotImplemented }
func (r *Reader) Policy() (*PolicyVersion, error)               { return nil, errNotImplemented }
func (r *Reader) PolicyVersions(limit int) ([]*PolicyVersion, error) {
	return nil, errNotImplemented
}
func (r *Reader) PolicyVersion(id int64) (*PolicyVersion, error) { return nil, errNotImplemented }
func (r *Reader) AuthRequestByHash(h [32]byte) (*AuthRequest, error) {
	return nil, errNotImplemented
}
func (r *Reader) AuthRequest(id int64) (*AuthRequest, error) { return nil, errNotImplemented }
func (r *Reader) AuthRequests() ([]*AuthRequest, error)      { return nil, errNotImplemented }
func (r *Reader) Tombstone(m key.MachinePublic, n key.NodePublic) (*Tombstone, error) {
	return nil, errNotImplemented
}
func (r *Reader) Setting(name string) (*Setting, error)  { return nil, errNotImplemented }
func (r *Reader) Settings() (map[string]*Setting, error) { return nil, errNotImplemented }
func (r *Reader) Primaries() (map[netip.Prefix]tailcfg.NodeID, error) {
	return nil, errNotImplemented
}
func (r *Reader) AuditEvents(after int64, limit int) ([]*AuditEvent, error) {
	return nil, errNotImplemented
}
func (r *Reader) AuditHead() (number int64, hash [32]byte, err error) {
	return 0, hash, errNotImplemented
}
func (r *Reader) VerifyAudit() (number int64, err error) { return 0, errNotImplemented }
func (r *Reader) Instances() ([]*Instance, error)        { return nil, errNotImplemented }
func (r *Reader) Secret(name string) ([]byte, error)     { return nil, errNotImplemented }

func (tx *Tx) Now() time.Time              { return time.Time{} }
func (tx *Tx) Actor() Actor                { return Actor{} }
func (tx *Tx) Revision() (Revision, error) { return 0, errNotImplemented }
func (tx *Tx) NextRevision() Revision      { return 0 }
func (tx *Tx) CreateNode(n *Node) error    { return errNotImplemented }
func (tx *Tx) PutNode(n *Node) error       { return errNotImplemented }
func (tx *Tx) PutNodeState(id tailcfg.NodeID, s NodeState) error {
	return errNotImplemented
}
func (tx *Tx) PutNodeStates(states map[tailcfg.NodeID]NodeState) error { return errNotImplemented }
func (tx *Tx) DeleteNode(id tailcfg.NodeID) error                      { return errNotImplemented }
func (tx *Tx) AllocateAddrs(p Pools) (v4, v6 netip.Addr, err error) {
	return v4, v6, errNotImplemented
}
func (tx *Tx) AddrFree(a netip.Addr) (bool, error) { return false, errNotImplemented }
func (tx *Tx) FreeName(base, forOwner string, reserved ...string) (string, error) {
	return "", errNotImplemented
}
func (tx *Tx) CreateUser(u *User) error           { return errNotImplemented }
func (tx *Tx) PutUser(u *User) error              { return errNotImplemented }
func (tx *Tx) DeleteUser(id tailcfg.UserID) error { return errNotImplemented }
func (tx *Tx) CreateAuthKey(k *AuthKey) error     { return errNotImplemented }
func (tx *Tx) PutAuthKey(k *AuthKey) error        { return errNotImplemented }
func (tx *Tx) DeleteAuthKey(id int64) error       { return errNotImplemented }
func (tx *Tx) RedeemAuthKey(keyID string, hash [32]byte, m key.MachinePublic) (*AuthKey, error) {
	return nil, errNotImplemented
}
func (tx *Tx) CreateAPIKey(k *APIKey) error { return errNotImplemented }
func (tx *Tx) PutAPIKey(k *APIKey) error    { return errNotImplemented }
func (tx *Tx) DeleteAPIKey(id int64) error  { return errNotImplemented }
func (tx *Tx) SetPolicy(text []byte, note string, ifRevision *Revision) (*PolicyVersion, error) {
	return nil, errNotImplemented
}
func (tx *Tx) CreateAuthRequest(a *AuthRequest) error { return errNotImplemented }
func (tx *Tx) PutAuthRequest(a *AuthRequest) error    { return errNotImplemented }
func (tx *Tx) DeleteAuthRequest(id int64) error       { return errNotImplemented }
func (tx *Tx) SweepAuthRequests() (int, error)        { return 0, errNotImplemented }
func (tx *Tx) PutSetting(name string, value []byte) (*Setting, error) {
	return nil, errNotImplemented
}
func (tx *Tx) SetPrimary(p netip.Prefix, n tailcfg.NodeID) error { return errNotImplemented }
func (tx *Tx) DeletePrimary(p netip.Prefix) error                { return errNotImplemented }
func (tx *Tx) PutSecretIfAbsent(name string, value []byte) (stored []byte, err error) {
	return nil, errNotImplemented
}
func (tx *Tx) Heartbeat(i *Instance) error { return errNotImplemented }
func (tx *Tx) DeleteTombstones(m key.MachinePublic, n key.NodePublic) error {
	return errNotImplemented
}
func (tx *Tx) SweepTombstones() (int, error) { return 0, errNotImplemented }
func (tx *Tx) Audit(action, target string, before, after any) error {
	return errNotImplemented
}
