package tailnet

import (
	"strconv"
	"strings"

	"tailscale.com/tailcfg"
	"tailscale.com/util/dnsname"
)

// Label makes a MagicDNS label of what a device calls itself, as Tailscale does: lower case, runs of other characters become hyphens. A
// name of which nothing is left becomes "node" with the id, or plain "node" before there is one.
func Label(hostname string, id tailcfg.NodeID) string {
	ascii := strings.Map(func(r rune) rune {
		if r >= 0x80 {
			return '-'
		}
		return r
	}, hostname)
	label := dnsname.SanitizeHostname(dnsname.TrimCommonSuffixes(ascii))
	if i := strings.IndexByte(label, '.'); i >= 0 {
		label = label[:i]
	}
	label = strings.ToLower(strings.Trim(label, "-"))
	if label == "" {
		if id == 0 {
			return "node"
		}
		return "node-" + strconv.FormatInt(int64(id), 10)
	}
	return label
}

// AutoNamed reports whether given was derived from hostname, perhaps with a number against collisions, and not chosen by a person.
func AutoNamed(given, hostname string) bool {
	base := Label(hostname, 0)
	if given == base {
		return true
	}
	rest, ok := strings.CutPrefix(given, base+"-")
	if !ok {
		return false
	}
	_, err := strconv.ParseUint(rest, 10, 32)
	return err == nil
}
