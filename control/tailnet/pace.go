package tailnet

import "time"

// crowd is how many revisions make a gap longer than the least. Fewer would be delayed for nothing.
const crowd = 3

// A pace spaces announcements. What comes alone is announced at once, and a burst within one least gap. While many changes come without an end,
// each gap is twice the one before, up to the most: an announcement costs as much for one change as for many.
type pace struct {
	last time.Time     // the last announcement
	gap  time.Duration // to the next one of a crowd; the least one applies as well
}

// wait is how long so many revisions, that are not announced yet, have to wait at now.
func (p *pace) wait(now time.Time, revisions int, least, most time.Duration) time.Duration {
	gap := least
	if revisions >= crowd {
		gap = max(p.gap, least)
	}
	return min(gap, most) - now.Sub(p.last)
}

// announced notes an announcement of so many revisions, and whether it had to wait for its turn.
func (p *pace) announced(now time.Time, waited bool, revisions int, least, most time.Duration) {
	p.last = now
	if waited && revisions >= crowd {
		p.gap = min(2*max(p.gap, least), most)
	} else {
		p.gap = 0
	}
}
