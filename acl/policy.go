package acl

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tailscale/hujson"
	"go4.org/netipx"
	"tailscale.com/tailcfg"
)

// Policy is a parsed policy: plain data, read only. Names are resolved against
// the document, not yet against a tailnet.
type Policy struct {
	src   []byte        // the text as given
	lines []int         // offset of each line's first byte
	root  *hujson.Value // parsed copy; only for finding places

	groups    map[string]*group
	hosts     map[string]*host
	ipsets    map[string]*ipset
	tagOwners map[string]*tagOwner
	postures  map[string]*posture

	defaultPosture []*posture

	rules []*rule // grants in document order, then acls

	// declared says that the document has a grants or acls member; without
	// one everything is allowed.
	declared bool

	ssh           []*sshRule
	attrs         []*nodeAttr
	approveRoutes []approver
	approveExit   []selector
	approveSvc    []approver
	tests         []*test
	sshTests      []*sshTest

	used map[string]bool // names of definitions that something refers to

	disableIPv4   bool
	randomizePort bool
	oneCGNAT      string
	derpMap       *tailcfg.DERPMap
}

// text is a string of the document, trimmed, with its offset.
type text struct {
	s  string
	at int
}

type group struct {
	name    text
	members []selector // users only
}

type host struct {
	name   text
	prefix netip.Prefix
	single bool // written without a mask
}

type ipset struct {
	name text
	ops  []ipsetOp
	set  *netipx.IPSet // resolved
	busy bool          // on the resolution stack; for finding cycles
	bad  bool
}

type ipsetOp struct {
	remove bool
	member text
}

type tagOwner struct {
	name   text
	owners []selector
}

type approver struct {
	name   text
	prefix netip.Prefix // of a routes entry
	by     []selector
}

type ruleKind uint8

const (
	kindGrant ruleKind = iota
	kindACL
	kindImplied // the allow-all rule of a document without acls and grants
)

type rule struct {
	kind ruleKind
	at   int
	end  int

	src   []selector
	dst   []destination
	ports []protoPorts // of a grant; an acl has its ports on dst
	proto int          // of an acl, 0 for the default set
	apps  []appCap
	via   []text
	where []*posture
}

type destination struct {
	selector
	ports []tailcfg.PortRange // of an acl
}

// protoPorts is what one "ip" protocol of a grant allows.
type protoPorts struct {
	proto int
	ports []tailcfg.PortRange
}

type appCap struct {
	name   tailcfg.PeerCapability
	values []tailcfg.RawMessage
}

type sshRule struct {
	at, end    int
	check      bool
	period     time.Duration
	always     bool
	src, dst   []selector
	users      []text
	acceptEnv  []string
	recorders  []text
	enforce    bool
	localparts []text // domains of localpart:*@domain users
	where      []*posture
}

type nodeAttr struct {
	at     int
	target []selector
	attrs  []string
	app    map[string][]tailcfg.RawMessage
	apps   []string // keys of app, sorted
	pool   []netip.Prefix
	conns  []appConnector
}

type test struct {
	at           int
	src          text
	proto        text
	accept, deny []text
	posture      map[string]any
}

type sshTest struct {
	at                  int
	src                 text
	dst                 []text
	accept, deny, check []text
	posture             map[string]any
}

// DERPMap is the derpMap member, nil when the document has none. Its regions
// extend or replace the server's own; a nil region removes one, and
// OmitDefaultRegions removes all others.
func (p *Policy) DERPMap() *tailcfg.DERPMap { return p.derpMap }

// AllowsAll reports whether the document has neither acls nor grants, not even
// empty ones, which allows everything to everybody.
func (p *Policy) AllowsAll() bool { return !p.declared }

// OneCGNATRoute is the member of that name: "", "mac-always" or "mac-never".
func (p *Policy) OneCGNATRoute() string { return p.oneCGNAT }

// DisableIPv4 reports whether no node is to use an IPv4 address.
func (p *Policy) DisableIPv4() bool { return p.disableIPv4 }

// Tags lists the tags that the policy defines, sorted.
func (p *Policy) Tags() []string { return sortedKeys(p.tagOwners) }

// Groups lists the groups that the policy defines, sorted.
func (p *Policy) Groups() []string { return sortedKeys(p.groups) }

// Source is the text that was parsed.
func (p *Policy) Source() []byte { return p.src }

func sortedKeys[K ~string, V any](m map[K]V) []K {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// fold is the ASCII lower case of s, as e-mail addresses compare.
func fold(s string) string {
	for i := range len(s) {
		if c := s[i]; 'A' <= c && c <= 'Z' {
			return strings.Map(func(r rune) rune {
				if 'A' <= r && r <= 'Z' {
					return r + 'a' - 'A'
				}
				return r
			}, s)
		}
	}
	return s
}
