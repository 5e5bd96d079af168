package register

import (
	"errors"
	"fmt"
	"math"
	"net/netip"

	"github.com/signalbox-net/signalbox/db"
)

// ErrFull refuses a device that the tailnet has no room for: it has as many as it may have.
var ErrFull = errors.New("the tailnet has as many devices as it may have")

// maxNodes is Config.MaxNodes when that is 0.
const maxNodes = 100_000

// refuseAt is the part of a pool in percent after which new devices get no address: the rest is for what is there already.
const refuseAt = 95

// room is nil while a further node may come. It counts by the snapshot, which may be a few nodes behind: these are limits of order, not of
// bytes, and a count in the transaction would cost each registration a walk over all nodes.
func (r *Registrar) room() error {
	nodes, most := r.cfg.Replica.Current().Len(), r.cfg.MaxNodes
	if most == 0 {
		most = maxNodes
	}
	if nodes >= most {
		return ErrFull
	}
	for _, pool := range []netip.Prefix{r.cfg.Pools.IPv4, r.cfg.Pools.IPv6} {
		if PoolUse(pool, nodes) >= refuseAt {
			return fmt.Errorf("%w: %d of %v are taken", db.ErrPoolExhausted, nodes, pool)
		}
	}
	return nil
}

// PoolUse is how much of a pool so many nodes take, in percent; 0 without a pool.
func PoolUse(pool netip.Prefix, nodes int) float64 {
	if !pool.IsValid() {
		return 0
	}
	// The first and the last address are not given out.
	usable := math.Exp2(float64(pool.Addr().BitLen()-pool.Bits())) - 2
	return 100 * float64(nodes) / max(usable, 1)
}
