package db

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"gorm.io/gorm/clause"
)

// holdFor is how long a released name waits for its former owner, and a
// released address for nobody.
const holdFor = 24 * time.Hour

// reservedNames are labels that resolvers and operating systems give a meaning:
// a node of that name would answer for it (RFC 6761, RFC 7050, web proxy
// discovery, ISATAP).
var reservedNames = map[string]bool{
	"localhost": true, "wpad": true, "isatap": true, "ipv4only": true, "local": true, "invalid": true,
	"test": true, "example": true, "onion": true, "arpa": true, "broadcasthost": true,
}

// FreeName finds a given name for a node: base itself, or base with the first
// of the suffixes -1, -2, ... that nobody has. base is a sanitised label; it is
// shortened to leave room for the suffix. Reserved names and those in reserved
// get a suffix. A released name is held for its former owner for 24 h;
// forOwner is who asks, by Node.Owner.
//
// When names were freed among the suffixes, the one found may not be the
// lowest: the search doubles and then halves, so that ten thousand nodes of
// one name cost few look-ups.
func (tx *Tx) FreeName(base, forOwner string, reserved ...string) (string, error) {
	if !isLabel(base) {
		return "", &InvalidError{"GivenName", "is not a DNS label"}
	}
	refused := map[string]bool{}
	for _, name := range reserved {
		refused[name] = true
	}
	name, err := tx.freeName(base, forOwner, refused)
	if err != nil {
		return "", fmt.Errorf("find a free name: %w", err)
	}
	return name, nil
}

// NameFree tells whether a node may have the name: it is reserved neither here
// nor in reserved, and no node has it. That it is held for its former owner
// does not matter here: an administrator may choose it.
func (tx *Tx) NameFree(name string, reserved ...string) (bool, error) {
	if reservedNames[name] || slices.Contains(reserved, name) {
		return false, nil
	}
	var n int
	err := tx.one(&n, "SELECT count(*) FROM nodes WHERE tailnet_id = ? AND given_name = ?", tx.tailnet, name)
	return n == 0, err
}

func (tx *Tx) freeName(base, forOwner string, refused map[string]bool) (string, error) {
	// base is nearly always free; and where many nodes have one name, the next
	// of its suffixes is.
	hint := tx.conn.store.suffixes.get(tx.tailnet, base)
	look := []string{base, suffixed(base, hint+1)}
	candidates := []string{}
	for n := 1; n <= 1<<17; n *= 2 {
		candidates = append(candidates, suffixed(base, n))
	}
	taken, err := tx.takenNames(look, forOwner)
	if err != nil {
		return "", err
	}
	for i, name := range look {
		if !taken[name] && !refused[name] && !reservedNames[name] {
			tx.suffix = suffix{tx.tailnet, base, i * (hint + 1)}
			return name, nil
		}
	}
	if taken, err = tx.takenNames(candidates, forOwner); err != nil {
		return "", err
	}
	for i, name := range candidates {
		if taken[name] || refused[name] {
			continue
		}
		n := 1 << i
		if i > 1 {
			if n, err = tx.lowestSuffix(base, forOwner, n/2, n, refused); err != nil {
				return "", err
			}
		}
		tx.suffix = suffix{tx.tailnet, base, n}
		return suffixed(base, n), nil
	}
	return "", fmt.Errorf("%w: too many nodes named %s", ErrLimit, base)
}

// A suffix is the last one that was given out for a base.
type suffix struct {
	tailnet TailnetID
	base    string
	n       int
}

// suffixHints remembers the last suffix of some bases. It is only where to
// look first: the rows decide. It belongs to whoever runs the transaction, and
// learns what was kept.
type suffixHints map[suffix]int

func (h suffixHints) get(tailnet TailnetID, base string) int { return h[suffix{tailnet, base, 0}] }

func (h suffixHints) learn(s suffix) {
	if s.n == 0 {
		return
	}
	if len(h) >= 1024 {
		clear(h)
	}
	h[suffix{s.tailnet, s.base, 0}] = s.n
}

// lowestSuffix narrows down to a free suffix above low, which is taken, and not
// above high, which is free.
func (tx *Tx) lowestSuffix(base, forOwner string, low, high int, refused map[string]bool) (int, error) {
	const width = 16
	for high-low > 1 {
		step := max(1, (high-low)/(width+1))
		var numbers []int
		var names []string
		for n := low + step; n < high && len(numbers) < width; n += step {
			numbers = append(numbers, n)
			names = append(names, suffixed(base, n))
		}
		taken, err := tx.takenNames(names, forOwner)
		if err != nil {
			return 0, err
		}
		for i, n := range numbers {
			if taken[names[i]] || refused[names[i]] {
				low = n
				continue
			}
			high = n
			break
		}
	}
	return high, nil
}

// suffixed is base-n, within a label's 63 characters.
func suffixed(base string, n int) string {
	suffix := "-" + strconv.Itoa(n)
	if len(base)+len(suffix) > 63 {
		base = strings.TrimRight(base[:63-len(suffix)], "-")
	}
	return base + suffix
}

// takenNames tells which names a node has or a former owner other than
// forOwner may still claim.
func (tx *Tx) takenNames(names []string, forOwner string) (map[string]bool, error) {
	return tx.strings("SELECT given_name FROM nodes WHERE tailnet_id = ? AND given_name IN ? UNION ALL "+
		"SELECT name FROM released_names WHERE tailnet_id = ? AND name IN ? AND released > ? AND owner <> ?",
		tx.tailnet, names, tx.tailnet, names, micros(tx.now.Add(-holdFor)), forOwner)
}

type releasedName struct {
	TailnetID int64  `gorm:"primaryKey;autoIncrement:false"`
	Name      string `gorm:"primaryKey"`
	Owner     string
	Released  int64
}

func (releasedName) TableName() string { return "released_names" }

func (tx *Tx) releaseName(name, owner string) error {
	row := releasedName{int64(tx.tailnet), name, owner, micros(tx.now)}
	return tx.err(tx.g.Clauses(clause.OnConflict{
		Columns: []clause.Column{{Name: "tailnet_id"}, {Name: "name"}}, UpdateAll: true,
	}).Create(&row).Error)
}
