// Package dbtest holds what tests of databases share: the conformance suite
// that each dialect of package db must pass, and a PostgreSQL server of their
// own.
package dbtest

import (
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/db"
	"tailscale.com/types/key"
)

// Open opens an empty database with a configuration whose Now and bounds are
// set; it fills in the rest. The store is closed by the suite.
type Open func(t *testing.T, c db.Config) *db.Store

// RunConformance runs every test of the contract that Store, Reader and Tx
// state, each on a database of its own.
func RunConformance(t *testing.T, open Open) {
	for _, c := range []struct {
		name string
		test func(*testing.T, *fixture)
	}{
		{"BootstrapOnce", testBootstrapOnce},
		{"UpdateFailureKeepsNothing", testUpdateFailureKeepsNothing},
		{"UpdateWithoutWriteMakesNoRevision", testUpdateWithoutWrite},
		{"CancelledUpdateKeepsNothing", testCancelledUpdate},
		{"GroupCommitIsolation", testGroupCommitIsolation},
		{"RevisionsGapFree", testRevisionsGapFree},
		{"ViewIsOneState", testViewIsOneState},
		{"TailnetsAreApart", testTailnetsAreApart},
		{"TxEndsWithItsFunction", testTxEnds},

		{"NodeRoundTrip", testNodeRoundTrip},
		{"NodeUniqueFields", testNodeUniqueFields},
		{"NodeInvalid", testNodeInvalid},
		{"NodePut", testNodePut},
		{"NodeStates", testNodeStates},
		{"NodeIDsNeverReused", testNodeIDsNeverReused},
		{"HostileText", testHostileText},

		{"AddressesUpward", testAddressesUpward},
		{"AddressesReserved", testAddressesReserved},
		{"AddressesKnownFree", testAddressesKnownFree},
		{"AddressHeldAfterRelease", testAddressHeld},
		{"AddressPoolExhausted", testAddressPoolExhausted},
		{"AddressesRandom", testAddressesRandom},
		{"NameSuffixes", testNameSuffixes},
		{"NameHeldForFormerOwner", testNameHeld},
		{"NameReserved", testNameReserved},

		{"Users", testUsers},
		{"UserInUse", testUserInUse},
		{"SingleUseKeyRace", testSingleUseKeyRace},
		{"AuthKeyVerdicts", testAuthKeyVerdicts},
		{"AuthKeyLimit", testAuthKeyLimit},
		{"SpentKeyDoesNotBringDeletedNodeBack", testSpentKeyAfterDeletion},
		{"APIKeys", testAPIKeys},
		{"PolicyStale", testPolicyStale},
		{"Settings", testSettings},
		{"Primaries", testPrimaries},
		{"Mail", testMail},
		{"MailBounds", testMailBounds},
		{"MailIsApart", testMailIsApart},
		{"Unhealthy", testUnhealthy},
		{"Secrets", testSecrets},
		{"Instances", testInstances},
		{"Tombstones", testTombstones},
		{"Stranger", testStranger},
		{"AuthRequests", testAuthRequests},
		{"AuthRequestEviction", testAuthRequestEviction},
		{"AuditChain", testAuditChain},

		{"MovedSinceLooksAtKinds", testMovedSince},
		{"FollowLoadsWhatMoved", testFollow},
		{"FollowAfterPruning", testFollowAfterPruning},
		{"WakeAfterCommit", testWake},
		{"CommitsAreTimed", testCommitsAreTimed},
		{"Healthy", testHealthy},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.test(t, newFixture(t, open))
		})
	}
}

// A fixture is a store with a tailnet and a user, and the clock that it reads.
type fixture struct {
	*db.Store
	t       *testing.T
	clock   *Clock
	tailnet db.TailnetID
	user    *db.User
	commits atomic.Int64 // that the store has timed
}

// A Clock is a settable clock for db.Config.
type Clock struct {
	mu  sync.Mutex
	now time.Time
}

// NewClock starts at some whole second.
func NewClock() *Clock { return &Clock{now: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)} }

// Now is the clock's time.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// Advance moves the clock.
func (c *Clock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

var admin = db.Actor{Kind: "cli", Name: "root", Source: "local"}

func newFixture(t *testing.T, open Open) *fixture {
	t.Helper()
	clock := NewClock()
	f := &fixture{t: t, clock: clock, user: &db.User{Name: "anna", Role: "admin"}}
	f.Store = open(t, db.Config{
		Now: clock.Now, RetainRevisions: 50, MaxAuthRequests: 100, MaxAuthRequestsPerSource: 20,
		OnCommit: func(d time.Duration) {
			if d > 0 {
				f.commits.Add(1)
			}
		},
	})
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error("close:", err)
		}
	})
	var err error
	f.tailnet, _, err = f.Bootstrap(t.Context(), "default", func(tx *db.Tx) error { return tx.CreateUser(f.user) })
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// update runs fn and fails the test on an error.
func (f *fixture) update(fn func(*db.Tx) error) db.Revision {
	f.t.Helper()
	rev, err := f.Update(f.t.Context(), f.tailnet, admin, fn)
	if err != nil {
		f.t.Fatal(err)
	}
	return rev
}

func (f *fixture) try(fn func(*db.Tx) error) error {
	_, err := f.Update(f.t.Context(), f.tailnet, admin, fn)
	return err
}

func (f *fixture) view(fn func(*db.Reader) error) {
	f.t.Helper()
	if err := f.View(f.t.Context(), fn); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) revision() (rev db.Revision) {
	f.t.Helper()
	f.view(func(r *db.Reader) (err error) { rev, err = r.Revision(); return err })
	return rev
}

var pools = db.Pools{
	IPv4: netip.MustParsePrefix("100.64.0.0/10"),
	IPv6: netip.MustParsePrefix("fd7a:115c:a1e0::/48"),
}

// NewNode is a node with fresh keys that User can own.
func NewNode(u *db.User) *db.Node {
	return &db.Node{MachineKey: key.NewMachine().Public(), NodeKey: key.NewNode().Public(), User: u.ID, RegisterMethod: "cli"}
}

// Register gives n addresses from the pools and a free name, and creates it.
func Register(tx *db.Tx, n *db.Node, p db.Pools, base string) error {
	var err error
	if n.IPv4, n.IPv6, err = tx.AllocateAddrs(p); err != nil {
		return err
	}
	if n.GivenName, err = tx.FreeName(base, n.Owner()); err != nil {
		return err
	}
	return tx.CreateNode(n)
}

// node registers a new node of the fixture's user.
func (f *fixture) node(base string) *db.Node {
	f.t.Helper()
	n := NewNode(f.user)
	f.update(func(tx *db.Tx) error { return Register(tx, n, pools, base) })
	return n
}

// follow is Follow, failing the test on an error.
func (f *fixture) follow(after db.Revision) *db.Batch {
	f.t.Helper()
	b, err := f.Follow(f.t.Context(), f.tailnet, after)
	if err != nil {
		f.t.Fatal(err)
	}
	return b
}

// moved lists a batch's changes as "kind:entity".
func moved(b *db.Batch) (out []string) {
	for _, c := range b.Changes {
		out = append(out, fmt.Sprintf("%d:%d", c.Kind, c.Entity))
	}
	return out
}
