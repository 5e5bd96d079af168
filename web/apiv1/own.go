package apiv1

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"tailscale.com/tailcfg"
	"tailscale.com/types/ipproto"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/acl/tailnetfile"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// ownRoutes are what Headscale's interface lacks, below /api/signalbox/v1.
func (s *server) ownRoutes(m chi.Router) {
	m.Get("/tailnet", s.handle(s.exportTailnet))
	m.Get("/policy/versions", s.handle(s.policyVersions))
	m.Get("/policy/versions/{id}", s.handle(s.policyVersion))
	m.Post("/policy/versions/{id}/rollback", s.handle(s.rollbackPolicy))
	m.Post("/policy/diff", s.handleBody(s.diffPolicy))
	m.Get("/policy/explain", s.handle(s.explainPolicy))
	m.Post("/node/{id}/ping", s.handleBody(s.pingNode))
	m.Post("/node/{id}/c2n", s.handleBody(s.callNode))
	m.Post("/node/{id}/ip", s.handleBody(s.setIP))
	m.Get("/servers", s.handle(s.listServers))
	m.Get("/audit", s.handle(s.listAudit))
}

// exportTailnet is the tailnet as a file for the offline verbs of policy. It holds no secret: public keys and names only.
func (s *server) exportTailnet(*http.Request) (any, error) {
	snap := s.Replica.Current()
	f := &tailnetfile.File{Format: tailnetfile.Format, Version: tailnetfile.Version, Users: []tailnetfile.User{}, Nodes: []tailnetfile.Node{}}
	facts := snap.ACLTailnet()
	f.Settings = tailnetfile.Settings{
		Domains: facts.Domains, HTTPS: facts.HTTPS, ControlURL: facts.ControlURL, DisplayName: facts.DisplayName, MagicDNS: facts.MagicDNS,
		AutoUpdates: facts.AutoUpdates,
	}
	var err error
	if f.DNS, err = exportDNS(snap.Settings()); err != nil {
		return nil, err
	}
	for _, u := range snap.Users() {
		f.Users = append(f.Users, tailnetfile.User{ID: int64(u.ID), Name: u.Name, Email: u.Email, Role: u.Role})
	}
	for slot, n := range snap.Nodes() {
		if n != nil {
			f.Nodes = append(f.Nodes, exportNode(snap, n, &facts.Nodes[slot]))
		}
	}
	for p, id := range facts.Primaries {
		f.Primaries = append(f.Primaries, tailnetfile.Primary{Prefix: p, Node: int64(id)})
	}
	slices.SortFunc(f.Primaries, func(a, b tailnetfile.Primary) int { return strings.Compare(a.Prefix.String(), b.Prefix.String()) })
	if v := snap.Policy().Version; v != nil {
		f.Policy, f.PolicyVersion = string(v.Text), v.ID
	}
	return f, nil
}

// exportDNS is what devices are told about names. Passwords in the addresses of resolvers are left out.
func exportDNS(s *tailnet.Settings) (json.RawMessage, error) {
	open := func(list []string) []string {
		var out []string
		for _, r := range list {
			if u, err := url.Parse(r); err == nil && u.User != nil {
				r = u.Redacted()
			}
			out = append(out, r)
		}
		return out
	}
	dns := s.DNS
	dns.Global, dns.Split = open(dns.Global), make(map[string][]string, len(s.DNS.Split))
	for suffix, list := range s.DNS.Split {
		dns.Split[suffix] = open(list)
	}
	return json.Marshal(struct {
		tailnet.DNS
		Records []tailcfg.DNSRecord `json:"records,omitempty"`
	}{dns, s.Records})
}

func exportNode(snap *tailnet.Snapshot, n *tailnet.Node, facts *acl.Node) tailnetfile.Node {
	online := n.State.Online
	out := tailnetfile.Node{
		ID: int64(n.ID), Hostname: n.GivenName, Name: n.FQDN, StableID: string(n.StableID), Tags: n.Tags, Routable: facts.RoutableIPs,
		Approved: facts.ApprovedRoutes, MachineKey: n.MachineKey.String(), NodeKey: n.NodeKey.String(), Online: &online, Expired: n.Dead(),
		Created: n.Created.UTC().Format(time.RFC3339), OS: facts.OS, Cap: int(n.State.Cap), Attributes: facts.Posture,
	}
	if n.IPv4.IsValid() {
		out.IPv4 = n.IPv4.String()
	}
	if n.IPv6.IsValid() {
		out.IPv6 = n.IPv6.String()
	}
	if u := snap.User(n.User); u != nil && !n.Tagged() {
		out.User = u.Name
	}
	if !n.Expiry.IsZero() {
		out.Expiry = n.Expiry.UTC().Format(time.RFC3339)
	}
	return out
}

// PolicyVersionInfo is one stored version of the policy. Text is left out of lists.
type PolicyVersionInfo struct {
	Version int64  `json:"version"`
	Author  string `json:"author"`
	Note    string `json:"note"`
	Created string `json:"created"`
	Bytes   int    `json:"bytes"`
	Live    bool   `json:"live"`
	Text    string `json:"text,omitempty"`
}

func versionInfo(v *db.PolicyVersion, live bool, text bool) PolicyVersionInfo {
	i := PolicyVersionInfo{Version: v.ID, Author: v.Author, Note: v.Note, Created: v.Created.UTC().Format(time.RFC3339), Bytes: len(v.Text), Live: live}
	if text {
		i.Text = string(v.Text)
	}
	return i
}

// maxPage is the largest page of a list.
const maxPage = 1000

// number reads a query parameter between 0 and most; absent means fallback.
func number(r *http.Request, name string, fallback, most int64) (int64, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return fallback, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 || n > most {
		return 0, badField("query."+name, "must be a number from 0 to %d", most)
	}
	return n, nil
}

func (s *server) policyVersions(r *http.Request) (any, error) {
	limit, err := number(r, "limit", 100, maxPage)
	if err != nil {
		return nil, err
	}
	var list []*db.PolicyVersion
	if err := s.view(r, func(rd *db.Reader) (err error) {
		list, err = rd.PolicyVersions(int(limit))
		return err
	}); err != nil {
		return nil, err
	}
	out := struct {
		Versions []PolicyVersionInfo `json:"versions"`
	}{[]PolicyVersionInfo{}}
	for i, v := range list {
		out.Versions = append(out.Versions, versionInfo(v, i == 0, false))
	}
	return out, nil
}

// storedVersion reads the version that the path names.
func (s *server) storedVersion(r *http.Request) (*db.PolicyVersion, error) {
	id, err := strconv.ParseInt(chi.URLParam(r, "id"), 10, 64)
	if err != nil {
		return nil, badField("path.id", "must be a version number")
	}
	return s.versionByID(r, id)
}

func (s *server) versionByID(r *http.Request, id int64) (v *db.PolicyVersion, err error) {
	err = s.view(r, func(rd *db.Reader) error {
		v, err = rd.PolicyVersion(id)
		return err
	})
	if errors.Is(err, db.ErrNotFound) {
		return nil, notFound("there is no policy version %d", id)
	}
	return v, err
}

func (s *server) policyVersion(r *http.Request) (any, error) {
	v, err := s.storedVersion(r)
	if err != nil {
		return nil, err
	}
	live := s.Replica.Current().Policy().Version
	return versionInfo(v, live != nil && live.ID == v.ID, true), nil
}

// rollbackPolicy makes the text of an earlier version live again, as a new version. It has to hold against the tailnet as it is now.
func (s *server) rollbackPolicy(r *http.Request) (any, error) {
	old, err := s.storedVersion(r)
	if err != nil {
		return nil, err
	}
	v, err := s.storePolicy(r, edit{"policy.rollback", string(old.Text), fmt.Sprintf("rollback to version %d", old.ID)})
	if err != nil {
		return nil, err
	}
	return tagged{versionInfo(v, true, false), policyTag(v)}, nil
}

// policyEffect is what a text would do.
type policyEffect struct {
	*acl.Effect
	Warnings []tailnetfile.Fault `json:"warnings"`
}

// diffPolicy tells what a text would change for the fleet as it is, without storing it.
func (s *server) diffPolicy(w http.ResponseWriter, r *http.Request) (any, error) {
	var req PolicyRequest
	if err := decode(w, r, &req, maxPolicyBody, false); err != nil {
		return nil, err
	}
	c, err := s.compile(r, req.Policy)
	if err != nil {
		return nil, err
	}
	free, err := s.slot(r)
	if err != nil {
		return nil, err
	}
	defer free()
	out := policyEffect{acl.Diff(c.snap.Access(), c.access), []tailnetfile.Fault{}}
	for _, warning := range acl.Warnings(c.policy, c.snap.ACLTailnet()) {
		out.Warnings = append(out.Warnings, tailnetfile.Fault(warning))
	}
	if v := c.snap.Policy().Version; v != nil {
		return tagged{out, policyTag(v)}, nil
	}
	return out, nil
}

// explainPolicy answers ?src=A&dst=B&port=N&proto=tcp, against the live policy or the one of ?version=. With src or dst alone it lists what
// src reaches, or who reaches dst.
func (s *server) explainPolicy(r *http.Request) (any, error) {
	q := r.URL.Query()
	snap := s.Replica.Current()
	access := snap.Access()
	if q.Get("version") != "" {
		id, err := number(r, "version", 0, 1<<62)
		if err != nil {
			return nil, err
		}
		v, err := s.versionByID(r, id)
		if err != nil {
			return nil, err
		}
		free, err := s.slot(r)
		if err != nil {
			return nil, err
		}
		defer free()
		if access, err = compileStored(v.Text, snap); err != nil {
			return nil, err
		}
	}
	ends := [2][]acl.Endpoint{}
	for i, name := range []string{"src", "dst"} {
		if q.Get(name) == "" && q.Get([]string{"dst", "src"}[i]) != "" {
			continue
		}
		var err error
		if ends[i], err = access.Endpoints(q.Get(name)); err != nil {
			return nil, badField("query."+name, "%v", err)
		}
	}
	switch {
	case q.Get("dst") == "":
		return openingsOf(ends[0], access.ReachableFrom, snap), nil
	case q.Get("src") == "":
		return openingsOf(ends[1], access.WhoReaches, snap), nil
	}
	port, err := number(r, "port", 0, 65535)
	if err != nil {
		return nil, err
	}
	proto, err := protocol(q.Get("proto"), port)
	if err != nil {
		return nil, err
	}
	out := struct {
		Verdicts []verdict `json:"verdicts"`
	}{[]verdict{}}
	for _, from := range ends[0] {
		for _, to := range ends[1] {
			if from.Addr.Is4() == to.Addr.Is4() {
				v := access.Explain(acl.Query{From: from, To: to, Proto: proto, Port: uint16(port)})
				out.Verdicts = append(out.Verdicts, verdictOf(v, snap))
			}
		}
	}
	return out, nil
}

// opening is something that one end reaches, or is reached by.
type opening struct {
	Address string   `json:"address"` // of the end that was asked about
	Other   string   `json:"other"`   // node or range
	Ports   []string `json:"ports"`
	Lines   []int    `json:"lines"` // of the policy
}

type openings struct {
	Openings []opening `json:"openings"`
}

func openingsOf(ends []acl.Endpoint, list func(acl.Endpoint) []acl.Opening, snap *tailnet.Snapshot) openings {
	out := openings{[]opening{}}
	for _, e := range ends {
		for _, o := range list(e) {
			other := o.Range
			if n := snap.NodeAt(o.Slot); n != nil {
				other = n.GivenName
			}
			out.Openings = append(out.Openings, opening{e.Addr.String(), other, o.Ports, o.Lines})
		}
	}
	return out
}

// protocol reads a name or a number. Without one it is TCP with a port and ICMP without.
func protocol(text string, port int64) (int, error) {
	switch {
	case text == "" && port == 0:
		return int(ipproto.ICMPv4), nil
	case text == "":
		return int(ipproto.TCP), nil
	}
	var p ipproto.Proto
	if err := p.UnmarshalText([]byte(strings.ToLower(text))); err != nil {
		return 0, badField("query.proto", "%q is no IP protocol", text)
	}
	return int(p), nil
}

// verdict is acl.Verdict with names for slots.
type verdict struct {
	Src      string         `json:"src"`
	Dst      string         `json:"dst"`
	Proto    int            `json:"proto"`
	Port     uint16         `json:"port"`
	Allowed  bool           `json:"allowed"`
	Reason   string         `json:"reason"`
	Receiver string         `json:"receiver,omitempty"`
	Route    string         `json:"route,omitempty"`
	Via      bool           `json:"via,omitempty"`
	Rules    []acl.RuleUse  `json:"rules"`
	Near     []acl.NearMiss `json:"near,omitempty"`
	SSH      []acl.RuleUse  `json:"ssh,omitempty"`
}

func verdictOf(v *acl.Verdict, snap *tailnet.Snapshot) verdict {
	out := verdict{
		Src: endName(v.From, snap), Dst: endName(v.To, snap), Proto: v.Proto, Port: v.Port, Allowed: v.Allowed, Reason: v.Reason, Via: v.Via,
		Rules: v.Rules, Near: v.Near, SSH: v.SSH,
	}
	if n := snap.NodeAt(v.Receiver); n != nil {
		out.Receiver = n.GivenName
	}
	if v.Route != (netip.Prefix{}) {
		out.Route = v.Route.String()
	}
	return out
}

func endName(e acl.Endpoint, snap *tailnet.Snapshot) string {
	if n := snap.NodeAt(e.Slot); n != nil {
		return n.GivenName + " (" + e.Addr.String() + ")"
	}
	return e.Addr.String()
}

// ServerInfo is one server on this database.
type ServerInfo struct {
	ID        int64  `json:"id,string"`
	Name      string `json:"name"`
	Version   string `json:"version"`
	Started   string `json:"started"`
	Heartbeat string `json:"heartbeat"`
	Alive     bool   `json:"alive"`
	Sessions  int    `json:"sessions"`                  // nodes that it holds now, as the database knows it
	Streams   int64  `json:"streams"`                   // open map streams, those of tools that look on included
	Revision  int64  `json:"revision,string,omitempty"` // of its picture of the tailnet; 0: it does not say
	Lag       int64  `json:"lag"`                       // revisions that the database is ahead of Revision
	Self      bool   `json:"self"`                      // the one that answers: the others' streams and revision are as old as their heartbeat
}

// aliveFor is how old a sign of life may be, as in package control.
const aliveFor = 90 * time.Second

func (s *server) listServers(r *http.Request) (any, error) {
	var list []*db.Instance
	var rev db.Revision
	if err := s.view(r, func(rd *db.Reader) (err error) {
		if rev, err = rd.Revision(); err != nil {
			return err
		}
		list, err = rd.Instances()
		return err
	}); err != nil {
		return nil, err
	}
	snap := s.Replica.Current()
	holds := map[int64]int{}
	for _, n := range snap.Nodes() {
		if n != nil && n.State.Online {
			holds[n.State.Instance]++
		}
	}
	out := struct {
		Servers []ServerInfo `json:"servers"`
	}{[]ServerInfo{}}
	for _, i := range list {
		info := ServerInfo{
			ID: i.ID, Name: i.Name, Version: i.Version, Started: i.Started.UTC().Format(time.RFC3339), Heartbeat: i.Heartbeat.UTC().Format(time.RFC3339),
			Alive: s.now().Sub(i.Heartbeat) < aliveFor, Sessions: holds[i.ID], Streams: i.Streams, Revision: int64(i.Revision),
		}
		switch info.Self = i.ID == s.Instance; {
		case info.Self:
			info.Alive, info.Revision = true, int64(snap.Revision())
			if s.Streams != nil {
				info.Streams = s.Streams()
			}
		case !info.Alive:
			info.Streams = 0
		}
		if info.Revision > 0 {
			info.Lag = max(0, int64(rev)-info.Revision)
		}
		out.Servers = append(out.Servers, info)
	}
	return out, nil
}

// AuditInfo is one row of the audit log.
type AuditInfo struct {
	Number int64     `json:"number,string"`
	Time   string    `json:"time"`
	Actor  ActorInfo `json:"actor"`
	Action string    `json:"action"`
	Target string    `json:"target"`
	Before any       `json:"before,omitempty"`
	After  any       `json:"after,omitempty"`
	Prev   string    `json:"prevHash"`
}

// ActorInfo is who did something: kind is "cli", "apikey", "user", "node", "system" or "unauthenticated".
type ActorInfo struct {
	Kind   string `json:"kind"`
	ID     int64  `json:"id,string,omitempty"`
	Name   string `json:"name,omitempty"`
	KeyID  string `json:"keyId,omitempty"`
	Source string `json:"source,omitempty"`
}

// listAudit answers ?after=N&limit=M, or ?last=N for the newest, oldest first.
func (s *server) listAudit(r *http.Request) (any, error) {
	after, err := number(r, "after", 0, 1<<62)
	if err != nil {
		return nil, err
	}
	limit, err := number(r, "limit", 100, maxPage)
	if err != nil {
		return nil, err
	}
	last, err := number(r, "last", 0, maxPage)
	if err != nil {
		return nil, err
	}
	var list []*db.AuditEvent
	if err := s.view(r, func(rd *db.Reader) (err error) {
		if last > 0 {
			head, _, err := rd.AuditHead()
			if err != nil {
				return err
			}
			after, limit = max(after, head-last), last
		}
		list, err = rd.AuditEvents(after, int(limit))
		return err
	}); err != nil {
		return nil, err
	}
	out := struct {
		Events []AuditInfo `json:"events"`
	}{[]AuditInfo{}}
	for _, e := range list {
		i := AuditInfo{
			Number: e.Number, Time: e.Time.UTC().Format(time.RFC3339Nano), Actor: ActorInfo(e.Actor), Action: e.Action, Target: e.Target, Prev: fmt.Sprintf("%x", e.PrevHash),
		}
		if len(e.Before) > 0 {
			i.Before = e.Before
		}
		if len(e.After) > 0 {
			i.After = e.After
		}
		out.Events = append(out.Events, i)
	}
	return out, nil
}
