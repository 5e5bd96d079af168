package db

import (
	"encoding/json"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// TailnetID names one tailnet of this database.
type TailnetID int64

// Revision counts the committed writes of one tailnet: gap-free, in commit
// order, starting at 1. Zero is the empty tailnet before its first write.
type Revision int64

// Kind says what sort of thing a change row is about. The numbers are stored
// and shared by servers of different versions: they are only ever added to. A
// reader that meets a kind it does not know reloads the whole tailnet.
type Kind int16

// The kinds of change, each with the meaning of its Entity.
const (
	KindNode        Kind = 1  // a node was created, changed or deleted; node id
	KindNodeState   Kind = 2  // only a node's NodeState moved; node id
	KindUser        Kind = 3  // user id
	KindPolicy      Kind = 4  // policy version id
	KindSetting     Kind = 5  // setting id
	KindAuthRequest Kind = 6  // auth request id
	KindPrimary     Kind = 7  // a route's primary router moved; node id, 0 when it lost its primary
	KindAuthKey     Kind = 8  // auth key id
	KindAPIKey      Kind = 9  // API key id
	KindTombstone   Kind = 10 // tombstone id

	newestKind = KindTombstone // kinds beyond are a newer program's
)

// A Change says what moved at a revision, not how: the rows are the truth.
type Change struct {
	Tailnet  TailnetID
	Revision Revision
	Kind     Kind
	Entity   int64
}

// A User is a person, or an account that owns nodes. Its ID is unique over all
// tailnets, never reused and below 2147400000, so that it cannot be taken for
// one of the synthetic users that clients see for tagged nodes.
type User struct {
	ID            tailcfg.UserID
	Tailnet       TailnetID
	Name          string // login name, unique in the tailnet without regard to case
	DisplayName   string
	Email         string
	Role          string // "owner", "admin", "member", ...
	Provider      string // "" for local accounts, else the identity provider
	ProviderID    string // the provider's name for the person (issuer and subject)
	ProfilePicURL string
	Created       time.Time
}

// A Node is one row of nodes together with its NodeState. Values that Reader
// methods and batches return are the caller's own, but Hostinfo and the slices
// must be replaced, never modified, once a Node is shared.
type Node struct {
	ID             tailcfg.NodeID       // unique over all tailnets, never reused
	StableID       tailcfg.StableNodeID // unique over all tailnets, never reused
	Tailnet        TailnetID
	MachineKey     key.MachinePublic
	NodeKey        key.NodePublic
	NLKey          key.NLPublic   // zero when the client sent none
	User           tailcfg.UserID // 0 when tagged
	Tags           []string       // sorted
	Hostname       string         // as the client says it; not a DNS label
	GivenName      string         // DNS label, unique in the tailnet
	IPv4, IPv6     netip.Addr     // either may be the zero Addr
	ApprovedRoutes []netip.Prefix
	Expiry         time.Time // zero: never
	Expired        bool      // Expiry has passed and that became a revision, or logout
	LoggedOut      bool
	Ephemeral      bool
	AuthKeyID      int64  // the auth key that admitted the node, 0 for none
	RegisterMethod string // "authkey", "cli", "oidc"
	Created        time.Time

	State NodeState
}

// Owner names who owns the node, for the rule that a released name waits for
// its former owner: the same person, or the same set of tags.
func (n *Node) Owner() string {
	if n.User != 0 {
		return "user:" + strconv.FormatInt(int64(n.User), 10)
	}
	return "tags:" + strings.Join(n.Tags, ",")
}

// NodeState is the part of a node that its own reports move.
type NodeState struct {
	DiscoKey  key.DiscoPublic
	Endpoints []tailcfg.Endpoint
	HomeDERP  int
	Hostinfo  *tailcfg.Hostinfo // immutable once loaded: never modify, replace
	Cap       tailcfg.CapabilityVersion
	Online    bool
	Instance  int64     // the server that holds the node's stream, 0 for none
	LastSeen  time.Time // zero: never

	// Unhealthy says that the node does not answer the probes of its server.
	// Only SetUnhealthy writes it.
	Unhealthy bool
}

// An AuthKey admits nodes. The secret itself is never stored.
type AuthKey struct {
	ID            int64
	KeyID         string   // public part: "k" and 15 of [0-9A-Za-z]
	Hash          [32]byte `json:"-"` // SHA-256 of the whole key
	Tailnet       TailnetID
	User          tailcfg.UserID // 0: its nodes are tagged only
	Description   string
	Reusable      bool
	Ephemeral     bool
	Preauthorized bool
	Tags          []string  // sorted
	Uses          int       // machines admitted so far
	Expires       time.Time // zero: never
	Created       time.Time
	Revoked       time.Time // zero: not revoked
}

// An APIKey authenticates calls of the HTTP API.
type APIKey struct {
	ID          int64
	KeyID       string
	Hash        [32]byte `json:"-"`
	Tailnet     TailnetID
	User        tailcfg.UserID // 0: not bound to a person
	Description string
	Expires     time.Time // zero: never
	Created     time.Time
	Revoked     time.Time // zero: not revoked
	LastSeen    time.Time // zero: never used
}

// A PolicyVersion is one stored policy text. The newest version is the live one.
type PolicyVersion struct {
	ID       int64
	Tailnet  TailnetID
	Revision Revision // the revision that made it live
	Text     []byte
	Author   string
	Note     string
	Created  time.Time
}

// Kinds of auth request.
const (
	AuthRequestRegister = "register"
	AuthRequestSSH      = "ssh"
)

// States of an auth request.
const (
	AuthRequestPending  = "pending"
	AuthRequestApproved = "approved"
	AuthRequestRejected = "rejected"
)

// An AuthRequest is a login or an SSH check that waits for a person.
type AuthRequest struct {
	ID         int64
	Hash       [32]byte `json:"-"` // SHA-256 of the id in the address that the person opens
	Kind       string   // AuthRequestRegister or AuthRequestSSH
	Tailnet    TailnetID
	MachineKey key.MachinePublic
	NodeKey    key.NodePublic
	OldNodeKey key.NodePublic
	NLKey      key.NLPublic
	Hostinfo   *tailcfg.Hostinfo
	Expiry     time.Time // the key expiry that the client asked for
	Ephemeral  bool
	Cap        tailcfg.CapabilityVersion
	Source     string // the client's network address, the unit of the eviction rule
	Created    time.Time
	Expires    time.Time // set to Created + 15 minutes when zero
	Opened     bool      // its page was opened: not evictable
	Followed   bool      // a follow-up poll waits for it: not evictable
	State      string    // AuthRequestPending when empty
	Node       tailcfg.NodeID
	User       tailcfg.UserID
	Message    string // what the client is told when it is rejected
	Detail     []byte // JSON, for SSH checks
}

// A Tombstone remembers a deleted node's pair of keys for 180 days, so that a
// client that was offline at the time can be told to log in again.
type Tombstone struct {
	ID         int64
	Tailnet    TailnetID
	MachineKey key.MachinePublic
	NodeKey    key.NodePublic
	Node       tailcfg.NodeID
	StableID   tailcfg.StableNodeID
	Name       string
	Deleted    time.Time
}

// An AuditEvent is one act, written in the transaction of the act itself.
type AuditEvent struct {
	Number   int64 // per tailnet, gap-free, starting at 1
	Tailnet  TailnetID
	Time     time.Time
	Actor    Actor
	Action   string
	Target   string
	Before   json.RawMessage // nil: none
	After    json.RawMessage // nil: none
	PrevHash [32]byte        // SHA-256 of the previous event's canonical encoding, zero for the first
}

// An Instance is one running server.
type Instance struct {
	ID        int64
	Name      string // unique: one server keeps its row over restarts
	Version   string
	Started   time.Time
	Heartbeat time.Time
	Revision  Revision // of its picture of the tailnet at the heartbeat; 0: it does not say
	Streams   int64    // open map streams at the heartbeat
}

// A Setting is a document that came from configuration, a file or a URL
// ("dns", "extra_records", "derp_map") and became part of the tailnet.
type Setting struct {
	ID    int64
	Name  string
	Value json.RawMessage
	Hash  string // hex SHA-256 of Value
}

// An Actor is who does something.
type Actor struct {
	Kind   string // "cli", "apikey", "user", "node", "system", "unauthenticated"
	ID     int64  // id of the user or node, or the uid of a local caller; 0 for none
	Name   string
	KeyID  string // public part of the credential that was used
	Source string // network address
}

// Pools are the prefixes that new nodes get their addresses from. Either may
// be the zero Prefix: nodes then have no address of that family.
type Pools struct {
	IPv4, IPv6 netip.Prefix
	Random     bool // draw addresses at random, not upward from the network address
}

// A Batch is what moved in a tailnet after revision From, as it is at revision
// To, or everything when Full is set.
type Batch struct {
	Tailnet  TailnetID
	Full     bool
	From, To Revision

	Nodes    map[tailcfg.NodeID]*Node // nil value: deleted
	Users    map[tailcfg.UserID]*User // nil value: deleted
	Policy   *PolicyVersion           // nil: did not move, or (Full) none is stored
	Settings map[string]*Setting      // by name

	// Primaries is the complete table when PrimariesChanged or Full is set.
	Primaries        map[netip.Prefix]tailcfg.NodeID
	PrimariesChanged bool

	// AuthRequests are the ids of auth requests that moved. Those who wait for
	// one read it again. Empty in a Full batch: everybody reads again.
	AuthRequests []int64

	Changes []Change // in order; empty in a Full batch
}
