package cli

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"tailscale.com/types/ipproto"

	"github.com/signalbox-net/signalbox/acl"
)

// policyExplain answers why A reaches B or does not. Names are those of
// acl.Access.Endpoints.
func (m *program) policyExplain() *cobra.Command {
	var from policySource
	var proto, to string
	cmd := m.verb("explain A [B[:PORT]]", "Say why A reaches B or does not", 0, func(cmd *cobra.Command, args []string) error {
		e, err := m.explainer(cmd.Context(), &from)
		if err != nil {
			return err
		}
		switch {
		case to != "":
			return e.whoReaches(to)
		case len(args) == 1:
			return e.reachableFrom(args[0])
		}
		return e.verdicts(args[0], args[1], proto)
	})
	cmd.Args = func(_ *cobra.Command, args []string) error {
		if to != "" && len(args) > 0 || to == "" && (len(args) < 1 || len(args) > 2) {
			return usagef("name A and B[:PORT], A alone, or --to B")
		}
		return nil
	}
	cmd.Long = `A and B are nodes (host name, full name, id or address), hosts, services or
addresses, one each.
With A alone it lists what A reaches, with --to B who reaches B. It is about the
server's nodes as they are now and the policy in effect; --as-of and -f try
another policy on the same nodes. Without a port ICMP is asked for.`
	cmd.Flags().StringVar(&from.tailnet, "tailnet", "", "ask no server: use the nodes, and without -f the policy, of this tailnet file")
	cmd.Flags().StringVarP(&from.path, "file", "f", "", "policy file in HuJSON; - for standard input")
	cmd.Flags().StringVar(&from.version, "as-of", "", "use this stored version of the policy")
	cmd.Flags().StringVar(&proto, "proto", "", "protocol: tcp, udp, icmp, a name or a number (default tcp with a port, else icmp)")
	cmd.Flags().StringVar(&to, "to", "", "list who reaches this")
	cmd.ValidArgsFunction = m.completeNodes(2)
	must(cmd.RegisterFlagCompletionFunc("to", m.completeNodes(100)))
	must(cmd.RegisterFlagCompletionFunc("as-of", m.completeVersions(false)))
	return cmd
}

// policySource is where a policy and the tailnet for it come from.
type policySource struct {
	tailnet string // file; empty: the server
	path    string // policy file; empty: that of the tailnet
	version string // of the server, instead of path
}

// An explainer has a compiled policy and the names for its answers.
type explainer struct {
	m      *program
	t      *acl.Tailnet
	access *acl.Access
}

func (m *program) explainer(ctx context.Context, from *policySource) (*explainer, error) {
	if from.version != "" && (from.path != "" || from.tailnet != "") {
		return nil, usagef("--as-of names a policy of the server: neither -f nor --tailnet go with it")
	}
	f, t, err := m.tailnet(ctx, from.tailnet)
	if err != nil {
		return nil, err
	}
	pt := policyText{livePolicy, []byte(f.Policy), true}
	switch {
	case from.version != "":
		if pt, err = m.versionText(ctx, from.version); err != nil {
			return nil, err
		}
	case from.path != "":
		pt = policyText{name: from.path}
		if pt.text, err = m.readPolicy(from.path); err != nil {
			return nil, usageError{err}
		}
	case from.tailnet != "":
		pt.name = from.tailnet + " (policy)"
		if f.Policy == "" {
			return nil, usagef("%s holds no policy: name one with -f", from.tailnet)
		}
	}
	a, err := m.compileText(pt, t)
	return &explainer{m, t, a}, err
}

func (e *explainer) name(slot int) string {
	if slot < 0 {
		return ""
	}
	if h := e.t.Nodes[slot].Hostname; h != "" {
		return h
	}
	return fmt.Sprint("node ", e.t.Nodes[slot].ID)
}

// endpoint names an end by its node, if it is one, and all given addresses.
func (e *explainer) endpoint(ends ...acl.Endpoint) string {
	var addrs []string
	for _, p := range ends {
		addrs = append(addrs, p.Addr.String())
	}
	text := strings.Join(addrs, ", ")
	if n := e.name(ends[0].Slot); n != "" {
		return n + " (" + text + ")"
	}
	return text
}

// destination splits B[:PORT].
func destination(s string) (host string, port uint16, given bool, err error) {
	if _, err := netip.ParseAddr(s); err == nil {
		return s, 0, false, nil // an IPv6 address has colons of its own
	}
	if !strings.Contains(s, ":") {
		return s, 0, false, nil
	}
	h, p, err := net.SplitHostPort(s)
	if err != nil {
		i := strings.LastIndexByte(s, ':') // a service: svc:web:443
		h, p = s[:i], s[i+1:]
	}
	n, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		if strings.HasPrefix(s, "svc:") {
			return s, 0, false, nil
		}
		return "", 0, false, usagef("%q: want B or B:PORT, with a port from 0 to 65535", s)
	}
	return h, uint16(n), true, nil
}

// protocol reads --proto; hasPort says whether a port was given.
func protocol(s string, hasPort bool) (int, error) {
	if s == "" {
		s = map[bool]string{true: "tcp", false: "icmp"}[hasPort]
	}
	var p ipproto.Proto
	if err := p.UnmarshalText([]byte(s)); err != nil || p == 0 {
		return 0, usagef("--proto: unknown protocol %q", s)
	}
	if !hasPort && (p == ipproto.TCP || p == ipproto.UDP || p == ipproto.SCTP) {
		return 0, usagef("--proto %s needs a port: B:PORT", s)
	}
	return int(p), nil
}

func (e *explainer) endpoints(name string) ([]acl.Endpoint, error) {
	list, err := e.access.Endpoints(name)
	if err == nil && len(list) == 0 {
		err = fmt.Errorf("%s has no address", name)
	}
	return list, err
}

// verdicts explains each address family that both ends have.
func (e *explainer) verdicts(a, b, proto string) error {
	host, port, hasPort, err := destination(b)
	if err != nil {
		return err
	}
	num, err := protocol(proto, hasPort)
	if err != nil {
		return err
	}
	from, err := e.endpoints(a)
	if err != nil {
		return err
	}
	to, err := e.endpoints(host)
	if err != nil {
		return err
	}
	var all []*acl.Verdict
	for _, f := range from {
		for _, t := range to {
			if f.Addr.Is4() == t.Addr.Is4() {
				all = append(all, e.access.Explain(acl.Query{From: f, To: t, Proto: num, Port: port}))
			}
		}
	}
	if len(all) == 0 {
		all = append(all, e.access.Explain(acl.Query{From: from[0], To: to[0], Proto: num, Port: port}))
	}
	out := []verdictJSON{}
	for _, v := range all {
		out = append(out, e.json(v))
	}
	return e.m.print(out, strings.Join(e.texts(all), "\n"))
}

// texts are the verdicts for a person. Two that differ in nothing but the
// addresses of the same nodes, IPv4 and IPv6, are one.
func (e *explainer) texts(all []*acl.Verdict) []string {
	if len(all) == 2 && all[0].From.Slot >= 0 && all[0].From.Slot == all[1].From.Slot && all[0].To.Slot >= 0 && all[0].To.Slot == all[1].To.Slot {
		_, why := e.text(all[0])
		if _, other := e.text(all[1]); why == other && all[0].Allowed == all[1].Allowed {
			head, _ := e.text(all[0], all[1])
			return []string{head + "\n" + why}
		}
	}
	var out []string
	for _, v := range all {
		head, why := e.text(v)
		out = append(out, head+"\n"+why)
	}
	return out
}

func protoName(n int) string {
	if text, err := ipproto.Proto(n).MarshalText(); err == nil {
		return string(text)
	}
	return strconv.Itoa(n)
}

// text is a verdict in two parts: what, with the addresses of others that are
// alike, and why.
func (e *explainer) text(v *acl.Verdict, others ...*acl.Verdict) (what, why string) {
	word := "DENIED"
	if v.Allowed {
		word = "ALLOWED"
	}
	proto := protoName(v.Proto)
	if v.Port != 0 {
		proto += fmt.Sprintf(" port %d", v.Port)
	}
	from, to := []acl.Endpoint{v.From}, []acl.Endpoint{v.To}
	for _, o := range others {
		from, to = append(from, o.From), append(to, o.To)
	}
	what = printable(fmt.Sprintf("%s  %s -> %s, %s", word, e.endpoint(from...), e.endpoint(to...), proto))
	lines := []string{"  " + v.Reason}
	rule := func(what string, r acl.RuleUse) {
		lines = append(lines, fmt.Sprintf("  %s line %d (%s): %s", what, r.Line, r.Path, oneLine(r.Text)))
		if len(r.Src) > 0 {
			var src []string
			for i, name := range r.Src {
				src = append(src, expanded(name, r.SrcMeans[i]))
			}
			detail := "    from " + strings.Join(src, ", ")
			if r.Dst != "" {
				detail += " to " + expanded(r.Dst, r.DstMeans)
			}
			lines = append(lines, detail)
		}
		for _, x := range []struct {
			what string
			list []string
		}{{"by way of", r.Via}, {"posture", r.Postures}, {"as", r.Users}} {
			if len(x.list) > 0 {
				lines = append(lines, "    "+x.what+" "+strings.Join(x.list, ", "))
			}
		}
	}
	for _, r := range v.Rules {
		rule("rule", r)
	}
	for _, n := range v.Near {
		rule("nearest rule", n.RuleUse)
		for _, f := range n.Fails {
			lines = append(lines, "    but "+f)
		}
	}
	for _, r := range v.SSH {
		rule("SSH rule", r)
	}
	return what, printableLines(lines)
}

// expanded is a selector with what in it is meant.
func expanded(selector, means string) string {
	if means == "" {
		return selector
	}
	return selector + " (" + means + ")"
}

// oneLine is the start of a rule's text without its layout.
func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if r := []rune(s); len(r) > 120 {
		s = string(r[:119]) + "…"
	}
	return s
}

func printableLines(lines []string) string {
	for i := range lines {
		lines[i] = printable(lines[i])
	}
	return strings.Join(lines, "\n")
}

// verdictJSON is a verdict for programs.
type verdictJSON struct {
	From     string         `json:"from"`
	To       string         `json:"to"`
	Proto    int            `json:"proto"`
	Port     uint16         `json:"port"`
	Allowed  bool           `json:"allowed"`
	Reason   string         `json:"reason"`
	Receiver string         `json:"receiver,omitempty"`
	Route    string         `json:"route,omitempty"`
	Rules    []acl.RuleUse  `json:"rules"`
	Near     []acl.NearMiss `json:"near"`
	SSH      []acl.RuleUse  `json:"ssh"`
}

func (e *explainer) json(v *acl.Verdict) verdictJSON {
	out := verdictJSON{
		From: v.From.Addr.String(), To: v.To.Addr.String(), Proto: v.Proto, Port: v.Port, Allowed: v.Allowed, Reason: v.Reason,
		Receiver: e.name(v.Receiver), Rules: append([]acl.RuleUse{}, v.Rules...),
		Near: append([]acl.NearMiss{}, v.Near...), SSH: append([]acl.RuleUse{}, v.SSH...),
	}
	if v.Route.IsValid() {
		out.Route = v.Route.String()
	}
	return out
}

func (e *explainer) reachableFrom(a string) error {
	from, err := e.endpoints(a)
	if err != nil {
		return err
	}
	return e.openings("To", from, e.access.ReachableFrom)
}

func (e *explainer) whoReaches(b string) error {
	to, err := e.endpoints(b)
	if err != nil {
		return err
	}
	return e.openings("From", to, e.access.WhoReaches)
}

type openingJSON struct {
	Address string   `json:"address"` // of the end that was asked about
	Other   string   `json:"other"`   // node or range
	Ports   []string `json:"ports"`
	Lines   []int    `json:"lines"`
}

func (e *explainer) openings(head string, ends []acl.Endpoint, list func(acl.Endpoint) []acl.Opening) error {
	out, rows := []openingJSON{}, [][]string(nil)
	for _, end := range ends {
		for _, o := range list(end) {
			j := openingJSON{end.Addr.String(), e.name(o.Slot), o.Ports, o.Lines}
			if o.Slot < 0 {
				j.Other = o.Range
			}
			out = append(out, j)
			var lines []string
			for _, l := range o.Lines {
				lines = append(lines, strconv.Itoa(l))
			}
			rows = append(rows, []string{j.Address, j.Other, strings.Join(j.Ports, ", "), strings.Join(lines, ", ")})
		}
	}
	return e.m.printTable(out, []string{"Address", head, "Ports", "Policy lines"}, rows)
}
