package tailnet

import "time"

// A pace spaces announcements. What comes alone is announced at once, and a burst within one least gap. While the changes do not end, each gap is
// twice the one before, up to the most: an announcement costs as much for one change as for many.
type pace struct {
	last time.Time     // the last announcement
	gap  time.Duration // to the next one; the least one applies as well
}

// wait is how long something new has to wait at now.
func (p *pace) wait(now time.Time, least, most time.Duration) time.Duration {
	return min(max(p.gap, least), most) - now.Sub(p.last)
}

// announced notes an announcement, and whether it had to wait for its turn.
func (p *pace) announced(now time.Time, waited bool, least, most time.Duration) {
	p.last = now
	if waited {
		p.gap = min(2*max(p.gap, least), most)
	} else {
		p.gap = 0
	}
}
