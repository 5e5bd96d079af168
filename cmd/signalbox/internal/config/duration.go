package config

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

var units = []struct {
	name string
	size time.Duration
}{ // longest names first where one is a prefix of another
	{"ns", time.Nanosecond}, {"us", time.Microsecond}, {"µs", time.Microsecond}, {"ms", time.Millisecond},
	{"s", time.Second}, {"m", time.Minute}, {"h", time.Hour},
	{"d", 24 * time.Hour}, {"w", 7 * 24 * time.Hour}, {"y", 365 * 24 * time.Hour},
}

var errDuration = errors.New("want a duration such as 90s, 30m, 1h30m, 180d, 1w, 1y or 0")

// ParseDuration reads a duration as Headscale does: numbers with units up to
// years (of 365 days), or a plain 0. Negative ones and ones that do not fit
// are refused.
func ParseDuration(s string) (time.Duration, error) {
	if s == "0" {
		return 0, nil
	}
	if s == "" {
		return 0, errDuration
	}
	var total float64
	for rest := s; rest != ""; {
		n := strings.IndexFunc(rest, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
		if n <= 0 {
			return 0, errDuration
		}
		x, err := strconv.ParseFloat(rest[:n], 64)
		if err != nil {
			return 0, errDuration
		}
		rest = rest[n:]
		size := time.Duration(0)
		for _, u := range units {
			after, ok := strings.CutPrefix(rest, u.name)
			if ok && (after == "" || after[0] >= '0' && after[0] <= '9') {
				size, rest = u.size, after
				break
			}
		}
		if size == 0 {
			return 0, errDuration
		}
		total += x * float64(size)
	}
	if total >= math.MaxInt64 {
		return 0, fmt.Errorf("%s is too long: at most 292 years", s)
	}
	return time.Duration(math.Round(total)), nil
}

// FormatDuration gives the shortest text that ParseDuration reads back:
// "180d", "30m", "1h30m".
func FormatDuration(d time.Duration) string {
	if d == 0 {
		return "0"
	}
	day := 24 * time.Hour
	if d%day == 0 {
		return strconv.FormatInt(int64(d/day), 10) + "d"
	}
	s := d.String()
	for _, zero := range []string{"0s", "0m"} {
		if t, ok := strings.CutSuffix(s, zero); ok && t != "" && (t[len(t)-1] == 'm' || t[len(t)-1] == 'h') {
			s = t
		}
	}
	return s
}
