package db

import (
	"crypto/rand"
	"fmt"
	"math/big"
	"net/netip"

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
// family on its own. It goes upward from the newest node's address, or draws
// at random. The first and, for IPv4, the last address of a pool are not given
// out, nor are reserved ranges. One that was released in the last 24 h comes
// up only when nothing else is left. ErrPoolExhausted when all are used.
//
// The addresses are not taken until a CreateNode or PutNode in this
// transaction uses them.
func (tx *Tx) AllocateAddrs(p Pools) (v4, v6 netip.Addr, err error) {
	newest4, newest6, err := tx.newestAddrs()
	if err == nil && p.IPv4.IsValid() {
		v4, err = tx.allocate(p.IPv4.Masked(), newest4, p.Random)
	}
	if err == nil && p.IPv6.IsValid() {
		v6, err = tx.allocate(p.IPv6.Masked(), newest6, p.Random)
	}
	if err != nil {
		return netip.Addr{}, netip.Addr{}, fmt.Errorf("allocate addresses: %w", err)
	}
	return v4, v6, nil
}

// AddrFree tells whether no node has the address. That it is held or reserved
// does not matter here: an administrator may choose it.
func (tx *Tx) AddrFree(a netip.Addr) (bool, error) {
	var n int
	text := a.Unmap().String()
	err := tx.one(&n, "SELECT count(*) FROM nodes WHERE tailnet_id = ? AND (ipv4 = ? OR ipv6 = ?)", tx.tailnet, text, text)
	return n == 0, err
}

// newestAddrs are the addresses of the node that was created last. Going on
// from there finds a free address at once, however many nodes there are.
func (tx *Tx) newestAddrs() (v4, v6 netip.Addr, err error) {
	var t4, t6 *string
	err = tx.scan("SELECT ipv4, ipv6 FROM nodes WHERE tailnet_id = ? ORDER BY id DESC LIMIT 1", []any{tx.tailnet}, &t4, &t6)
	if err == ErrNotFound {
		return v4, v6, nil
	}
	if err != nil {
		return v4, v6, err
	}
	if t4 != nil {
		v4, _ = netip.ParseAddr(*t4)
	}
	if t6 != nil {
		v6, _ = netip.ParseAddr(*t6)
	}
	return v4, v6, nil
}

// randomDraws is how many batches are drawn at random before a walk looks for
// what is left of a nearly full pool.
const randomDraws = 4

func (tx *Tx) allocate(pool netip.Prefix, newest netip.Addr, random bool) (netip.Addr, error) {
	w := newWalk(pool, newest)
	if random {
		for range randomDraws {
			batch := make([]netip.Addr, 8)
			for i := range batch {
				batch[i] = randomAddr(pool)
			}
			if a, err := tx.firstFree(pool, batch, false); err != nil || a.IsValid() {
				return a, err
			}
		}
		w = newWalk(pool, randomAddr(pool))
	}
	for _, heldToo := range []bool{false, true} {
		w.restart()
		for size := 4; ; size = min(4*size, 1024) {
			batch := w.next(size)
			if len(batch) == 0 {
				break
			}
			if a, err := tx.firstFree(pool, batch, heldToo); err != nil || a.IsValid() {
				return a, err
			}
		}
	}
	return netip.Addr{}, ErrPoolExhausted
}

// firstFree returns the first address of batch that may be given out, or the
// zero Addr.
func (tx *Tx) firstFree(pool netip.Prefix, batch []netip.Addr, heldToo bool) (netip.Addr, error) {
	texts := make([]string, 0, len(batch))
	for _, a := range batch {
		if usable(pool, a) {
			texts = append(texts, a.String())
		}
	}
	if len(texts) == 0 {
		return netip.Addr{}, nil
	}
	column := "ipv4"
	if pool.Addr().Is6() {
		column = "ipv6"
	}
	query := "SELECT " + column + " FROM nodes WHERE tailnet_id = ? AND " + column + " IN ?"
	args := []any{tx.tailnet, texts}
	if !heldToo {
		query += " UNION ALL SELECT address FROM released_addresses WHERE tailnet_id = ? AND address IN ? AND released > ?"
		args = append(args, tx.tailnet, texts, micros(tx.now.Add(-holdFor)))
	}
	var found []string
	if err := tx.err(tx.g.Raw(query, args...).Scan(&found).Error); err != nil {
		return netip.Addr{}, err
	}
	taken := make(map[string]bool, len(found))
	for _, t := range found {
		taken[t] = true
	}
	for _, t := range texts {
		if !taken[t] {
			return netip.ParseAddr(t)
		}
	}
	return netip.Addr{}, nil
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
