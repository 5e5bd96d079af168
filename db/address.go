package db

import (
	"crypto/rand"
	"fmt"
	"math/big"
	"net/netip"
	"slices"
	"strings"

	"gorm.io/gorm/clause"
)

// Addresses that no node gets by itself: Tailscale's service addresses, the
// ranges that its clients use for themselves (tsaddr), and ChromeOS's network
// for its virtual machines inside 100.64.0.0/10. Each prefix stands for all
// its addresses.
var reservedRanges = []netip.Prefix{
	netip.MustParsePrefix("100.100.0.0/24"),
	netip.MustParsePrefix("100.100.100.0/24"),
	netip.MustParsePrefix("100.115.92.0/23"),
	netip.MustParsePrefix("fd7a:115c:a1e0::53/128"),
	netip.MustParsePrefix("fd7a:115c:a1e0:b1a::/64"), // 4via6
}

// AllocateAddrs draws free addresses for a new node from the pools, each
// family on its own. It goes upward from the newest node's address, or draws at
// random; what was found free beside an address is given out next. The first
// and, for IPv4, the last address of a pool are not given out, nor are reserved
// ranges. One that was released in the last 24 h comes up only when nothing
// else is left. ErrPoolExhausted when all are used.
//
// The addresses are not taken until a CreateNode or PutNode in this
// transaction uses them.
func (tx *Tx) AllocateAddrs(p Pools) (v4, v6 netip.Addr, err error) {
	searches := []*search{newSearch(p.IPv4, "ipv4", p.Random), newSearch(p.IPv6, "ipv6", p.Random)}
	for i, s := range searches {
		s.found = tx.state.spares.first(p, i)
	}
	if searches[0].over() && searches[1].over() {
		return searches[0].found, searches[1].found, nil
	}
	newest, err := tx.newestAddrs()
	for i, s := range searches {
		s.walk = newWalk(s.pool, newest[i])
	}
	for err == nil && !(searches[0].over() && searches[1].over()) {
		err = tx.step(searches)
	}
	if err != nil {
		return netip.Addr{}, netip.Addr{}, fmt.Errorf("allocate addresses: %w", err)
	}
	for i, s := range searches {
		if s.spare != nil {
			tx.state.spares.keep(p, i, s.spare)
		}
	}
	return searches[0].found, searches[1].found, nil
}

// Assignable tells whether a node may have the address: it is in the pool of
// its family, neither the pool's first nor, for IPv4, its last, and in no
// range that clients use for themselves.
func (p Pools) Assignable(a netip.Addr) bool {
	pool := p.IPv6
	if a.Is4() {
		pool = p.IPv4
	}
	return pool.IsValid() && usable(pool.Masked(), a)
}

// AddrFree tells whether no node has the address. That it is held does not
// matter here: an administrator may choose it.
func (tx *Tx) AddrFree(a netip.Addr) (bool, error) {
	var n int
	text := a.Unmap().String()
	err := tx.one(&n, "SELECT count(*) FROM nodes WHERE tailnet_id = ? AND (ipv4 = ? OR ipv6 = ?)", tx.tailnet, text, text)
	return n == 0, err
}

// newestAddrs are the IPv4 and IPv6 addresses of the node that was created
// last. Going on from there finds a free address at once, however many nodes
// there are.
func (tx *Tx) newestAddrs() (newest [2]netip.Addr, err error) {
	var texts [2]*string
	err = tx.scan("SELECT ipv4, ipv6 FROM nodes WHERE tailnet_id = ? ORDER BY id DESC LIMIT 1", []any{tx.tailnet}, &texts[0], &texts[1])
	if err == ErrNotFound {
		return newest, nil
	}
	for i, t := range texts {
		if t != nil {
			newest[i], _ = netip.ParseAddr(*t)
		}
	}
	return newest, err
}

// A search looks for one free address of a family.
type search struct {
	pool    netip.Prefix
	column  string
	walk    *walk
	draws   int  // batches still to be drawn at random, before the walk
	size    int  // of the next batch
	heldToo bool // second time around: released addresses count as free
	found   netip.Addr
	spare   []netip.Addr // found, and what is free of the same batch
}

// randomDraws is how many batches are drawn at random before a walk looks for
// what is left of a nearly full pool.
const randomDraws = 4

func newSearch(pool netip.Prefix, column string, random bool) *search {
	s := &search{column: column, size: 16}
	if pool.IsValid() {
		s.pool = pool.Masked()
	}
	if random {
		s.draws = randomDraws
	}
	return s
}

func (s *search) over() bool { return !s.pool.IsValid() || s.found.IsValid() }

// next returns the texts of addresses that may be given out if no node has
// them; ErrPoolExhausted when there is no further one.
func (s *search) next() (texts []string, err error) {
	for len(texts) == 0 {
		var batch []netip.Addr
		switch {
		case s.draws > 0:
			for range 8 {
				batch = append(batch, randomAddr(s.pool))
			}
			if s.draws--; s.draws == 0 {
				s.walk = newWalk(s.pool, batch[0])
			}
		default:
			batch = s.walk.next(s.size)
			s.size = min(4*s.size, 1024)
			if len(batch) == 0 {
				if s.heldToo {
					return nil, ErrPoolExhausted
				}
				s.heldToo = true
				s.walk.restart()
			}
		}
		for _, a := range batch {
			if usable(s.pool, a) {
				texts = append(texts, a.String())
			}
		}
	}
	return texts, nil
}

// step looks at one batch of each family that is still searched.
func (tx *Tx) step(searches []*search) error {
	var query []string
	var args []any
	var unheld []string
	batches := make([][]string, len(searches))
	for i, s := range searches {
		if s.over() {
			continue
		}
		var err error
		if batches[i], err = s.next(); err != nil {
			return err
		}
		query = append(query, "SELECT "+s.column+" FROM nodes WHERE tailnet_id = ? AND "+s.column+" IN ?")
		args = append(args, tx.tailnet, batches[i])
		if !s.heldToo {
			unheld = append(unheld, batches[i]...)
		}
	}
	if len(unheld) > 0 {
		query = append(query, "SELECT address FROM released_addresses WHERE tailnet_id = ? AND address IN ? AND released > ?")
		args = append(args, tx.tailnet, unheld, micros(tx.now.Add(-holdFor)))
	}
	taken, err := tx.strings(strings.Join(query, " UNION ALL "), args...)
	if err != nil {
		return err
	}
	for i, batch := range batches {
		s := searches[i]
		for _, t := range batch {
			if taken[t] {
				continue
			}
			a, err := netip.ParseAddr(t)
			if err != nil {
				return err
			}
			if !s.found.IsValid() {
				s.found = a
			}
			if s.heldToo {
				break // a held address is given out only while nothing else is left, so each is looked for anew
			}
			if !slices.Contains(s.spare, a) { // drawn twice
				s.spare = append(s.spare, a)
			}
		}
	}
	return nil
}

func usable(pool netip.Prefix, a netip.Addr) bool {
	if !pool.Contains(a) || a == pool.Addr() && pool.Bits() < a.BitLen()-1 {
		return false
	}
	// The last address is IPv4's broadcast; point-to-point pools have none.
	if a.Is4() && pool.Bits() < 31 && !pool.Contains(a.Next()) {
		return false
	}
	return reservedBy(a) == netip.Prefix{}
}

func reservedBy(a netip.Addr) netip.Prefix {
	for _, r := range reservedRanges {
		if r.Contains(a) {
			return r
		}
	}
	return netip.Prefix{}
}

// A walk goes once around a pool, beginning after a given address.
type walk struct {
	pool    netip.Prefix
	start   netip.Addr
	at      netip.Addr
	wrapped bool
	over    bool
}

func newWalk(pool netip.Prefix, after netip.Addr) *walk {
	w := &walk{pool: pool, start: pool.Addr()}
	if after.IsValid() && pool.Contains(after) {
		w.start = after
	}
	w.restart()
	return w
}

func (w *walk) restart() { w.at, w.wrapped, w.over = w.start, false, false }

// next returns up to n addresses, none when the walk is over. It steps over
// reserved ranges as a whole, one of which has 2^64 addresses.
func (w *walk) next(n int) []netip.Addr {
	var out []netip.Addr
	for len(out) < n && !w.over {
		w.at = w.at.Next()
		if r := reservedBy(w.at); r.IsValid() {
			w.at = lastOf(r)
			continue
		}
		if !w.at.IsValid() || !w.pool.Contains(w.at) {
			if w.wrapped {
				w.over = true
				break
			}
			w.wrapped = true
			w.at = w.pool.Addr()
		}
		if w.wrapped && w.start.Less(w.at) {
			w.over = true
			break
		}
		out = append(out, w.at)
	}
	return out
}

// lastOf is the highest address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func randomAddr(pool netip.Prefix) netip.Addr {
	b := pool.Addr().AsSlice()
	host := len(b)*8 - pool.Bits()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), uint(host)))
	if err != nil {
		panic(err) // crypto/rand does not fail
	}
	for i, v := 0, n.FillBytes(make([]byte, len(b))); i < len(b); i++ {
		b[i] |= v[i]
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

type releasedAddress struct {
	TailnetID int64  `gorm:"primaryKey;autoIncrement:false"`
	Address   string `gorm:"primaryKey"`
	Released  int64
}

func (releasedAddress) TableName() string { return "released_addresses" }

func (tx *Tx) releaseAddrs(addrs []string) error {
	if len(addrs) == 0 {
		return nil
	}
	rows := make([]releasedAddress, len(addrs))
	for i, a := range addrs {
		rows[i] = releasedAddress{int64(tx.tailnet), a, micros(tx.now)}
	}
	return tx.err(tx.g.Clauses(clause.OnConflict{
		Columns: []clause.Column{{Name: "tailnet_id"}, {Name: "address"}}, UpdateAll: true,
	}).Create(&rows).Error)
}
