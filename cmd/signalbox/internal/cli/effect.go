package cli

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/signalbox-net/signalbox/acl"
)

// effectText is the effect for a person. acl tells address families, protocols
// and directions apart; what is alike for all of them is one line here.
func effectText(e *acl.Effect) string {
	if e.Empty() {
		return "Nothing changes."
	}
	var lines []string
	section := func(title string, list []string) {
		if len(list) == 0 {
			return
		}
		lines = append(lines, title)
		for _, l := range list {
			lines = append(lines, "  "+l)
		}
	}
	section("Connections", flowLines(e.Flows))
	section("Peers", peerLines(e.Peers))
	section("SSH logins", loginLines(e.Logins))
	var caps []string
	for _, c := range e.Caps {
		caps = append(caps, strings.TrimSpace(fmt.Sprintf("%s %s: %s %s", sign(c.Gained), names(c.Nodes), c.Cap, strings.Join(c.Values, " "))))
	}
	section("Capabilities", caps)
	return printableLines(lines)
}

// A link is a change of connections between two lists of names.
type link struct {
	opened   bool
	from, to []string
	allow    []string // as in acl.FlowChange
}

func (l *link) key() string { return joined(sign(l.opened), l.from, l.to) }

// joined makes a key of texts and lists.
func joined(s string, lists ...[]string) string {
	for _, l := range lists {
		s += "\x01" + strings.Join(l, "\x00")
	}
	return s
}

func flowLines(flows []acl.FlowChange) []string {
	var links []*link
	index := map[string]*link{}
	for _, l := range bothFamilies(flows) {
		// Among the receivers a sender does not mean itself.
		if i := slices.Index(l.to, l.from[0]); len(l.from) == 1 && i >= 0 && len(l.to) > 1 {
			l.to = slices.Concat(l.to[:i], l.to[i+1:])
		}
		if have := index[l.key()]; have != nil {
			have.allow = append(have.allow, l.allow...)
			continue
		}
		index[l.key()] = l
		links = append(links, l)
	}
	var out []string
	for _, l := range links {
		ends := fmt.Sprintf("%s %s -> %s: ", sign(l.opened), names(l.from), names(l.to))
		ports, apps := portsText(l.allow)
		if ports != "" {
			out = append(out, ends+ports)
		}
		for _, a := range apps {
			out = append(out, ends+a)
		}
	}
	return out
}

// acl marks a node that has addresses of both families, and of which only one
// is meant.
var marks = map[int]string{4: " (IPv4)", 6: " (IPv6)"}

// oneFamily is a change for one family.
type oneFamily struct {
	family   int // 0: no name is marked
	from, to ends
}

// ends are names without marks. Those that had one are in dual as well.
type ends struct{ list, dual []string }

func unmark(names []string, family *int) (e ends) {
	for _, n := range names {
		plain := n
		for f, mark := range marks {
			if s, ok := strings.CutSuffix(n, mark); ok {
				plain, *family = s, f
			}
		}
		e.list = append(e.list, plain)
		if plain != n {
			e.dual = append(e.dual, plain)
		}
	}
	return e
}

// and appends what only the other ones have.
func (e ends) and(o ends) []string {
	list := slices.Clone(e.list)
	have := make(map[string]bool, len(list))
	for _, n := range list {
		have[n] = true
	}
	for _, n := range o.list {
		if !have[n] {
			list = append(list, n)
		}
	}
	return list
}

// bothFamilies joins a change for IPv4 with the same one for IPv6. Names that
// have one family only may stand on either side of that: they cannot mean more
// than their own.
func bothFamilies(flows []acl.FlowChange) []*link {
	parts := make([]oneFamily, len(flows))
	twins := map[string][]int{}
	for i, f := range flows {
		p := &parts[i]
		p.from, p.to = unmark(f.From, &p.family), unmark(f.To, &p.family)
		k := joined(sign(f.Opened)+f.Allow, p.from.dual, p.to.dual)
		twins[k] = append(twins[k], i)
	}
	var out []*link
	for i, f := range flows {
		p := parts[i]
		l := &link{opened: f.Opened, from: f.From, to: f.To, allow: []string{f.Allow}}
		list := twins[joined(sign(f.Opened)+f.Allow, p.from.dual, p.to.dual)]
		switch {
		case len(list) == 2 && parts[list[0]].family+parts[list[1]].family == 4+6:
			if i != list[0] {
				continue
			}
			o := parts[list[1]]
			l.from, l.to = p.from.and(o.from), p.to.and(o.to)
		case p.family != 0 && (len(p.from.dual) == 0 || len(p.to.dual) == 0):
			// One end has this family only, so there is nothing to tell apart.
			l.from, l.to = p.from.list, p.to.list
		}
		out = append(out, l)
	}
	return out
}

// portsText joins the protocols of the same ports, "tcp+udp:80,443 icmp".
// Capabilities are listed apart.
func portsText(allow []string) (text string, apps []string) {
	protos := map[string][]string{} // by port
	var ports, plain []string
	for _, a := range allow {
		proto, port, ok := strings.Cut(a, ":")
		switch {
		case !ok:
			plain = append(plain, a)
		case proto == "app":
			apps = append(apps, a)
		default:
			if protos[port] == nil {
				ports = append(ports, port)
			}
			protos[port] = append(protos[port], proto)
		}
	}
	slices.SortStableFunc(ports, func(a, b string) int { return cmp.Compare(firstPort(a), firstPort(b)) })
	var words []string
	index := map[string]int{}
	for _, port := range ports {
		slices.Sort(protos[port])
		set := strings.Join(protos[port], "+")
		if i, ok := index[set]; ok {
			words[i] += "," + port
			continue
		}
		index[set] = len(words)
		words = append(words, set+":"+port)
	}
	return strings.Join(append(words, plain...), " "), apps
}

// firstPort orders "80" before "443" and "*" before both.
func firstPort(s string) int {
	s, _, _ = strings.Cut(s, "-")
	n, _ := strconv.Atoi(s)
	return n
}

// peerLines says the two directions of one change at once.
func peerLines(peers []acl.PeerChange) []string {
	var out []string
	said := map[string]bool{}
	for _, p := range peers {
		k := joined(sign(p.Appear), p.Peers, p.Viewers)
		if said[k] {
			continue
		}
		said[joined(sign(p.Appear), p.Viewers, p.Peers)] = true
		back := slices.ContainsFunc(peers, func(o acl.PeerChange) bool { return joined(sign(o.Appear), o.Viewers, o.Peers) == k })
		switch {
		case back && slices.Equal(p.Viewers, p.Peers):
			out = append(out, fmt.Sprintf("%s %s see each other", sign(p.Appear), names(p.Viewers)))
		case back:
			out = append(out, fmt.Sprintf("%s %s <-> %s", sign(p.Appear), names(p.Viewers), names(p.Peers)))
		default:
			out = append(out, fmt.Sprintf("%s %s -> %s", sign(p.Appear), names(p.Viewers), names(p.Peers)))
		}
	}
	return out
}

func loginLines(logins []acl.LoginChange) []string {
	type entry struct {
		l     acl.LoginChange
		users []string
	}
	var list []*entry
	index := map[string]*entry{}
	for _, l := range logins {
		k := joined(l.Was+" "+l.Now, l.From, l.To)
		if index[k] == nil {
			index[k] = &entry{l: l}
			list = append(list, index[k])
		}
		index[k].users = append(index[k].users, l.User)
	}
	var out []string
	for _, e := range list {
		if i := slices.Index(e.users, "*"); i >= 0 {
			e.users = append(slices.Delete(e.users, i, i+1), "other users")
		}
		out = append(out, fmt.Sprintf("%s %s -> %s as %s: %s, was %s",
			sign(loginRank[e.l.Now] > loginRank[e.l.Was]), names(e.l.From), names(e.l.To), strings.Join(e.users, ", "), e.l.Now, e.l.Was))
	}
	return out
}

// loginRank orders what SSH answers by how much it lets in.
var loginRank = map[string]int{"deny": 0, "check": 1, "accept": 2}

func sign(gained bool) string {
	if gained {
		return "+"
	}
	return "-"
}

// names shortens a long list: the whole one is in -o json.
func names(list []string) string {
	const most = 8
	if len(list) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(list[:most], ", "), len(list)-most)
	}
	return strings.Join(list, ", ")
}
