package serve

import (
	"cmp"
	"encoding/json"
	"fmt"
	"html"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/netmap"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/web/listener"
)

// maxScrapes is how many scrapes are answered at one time; they need no credentials.
const maxScrapes = 3

// debugHandler is the metrics and debug listener's. It is on an address of its own and on the unix socket, never inside Noise or on the main
// listener.
func (s *server) debugHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics(), promhttp.HandlerOpts{MaxRequestsInFlight: maxScrapes}))
	inside := http.NewServeMux()
	for _, p := range s.debugPages() {
		inside.HandleFunc("GET "+p.path, p.serve)
	}
	inside.HandleFunc("GET /debug/{$}", s.debugIndex)
	inside.HandleFunc("POST /debug/trim", trim)
	inside.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	inside.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	inside.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	inside.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	mux.Handle("/debug/", s.guardDebug(inside))
	return mux
}

type debugPage struct {
	path, shows string
	serve       http.HandlerFunc
}

func (s *server) debugPages() []debugPage {
	return []debugPage{
		{"/debug/snapshot", "the devices as the server sees them; ?node=ID for one, with its peers and its packet filter", s.debugSnapshot},
		{"/debug/sessions", "the open streams and what each has been sent; ?node=ID for one", s.debugSessions},
		{"/debug/tiles", "groups of up to 64 devices, and the encoded parts of maps that are kept of each", s.debugTiles},
		{"/debug/frames", "all kept parts of maps by kind, and the ways from older snapshots", s.debugFrames},
		{"/debug/pprof/", "Go profiles", pprof.Index},
	}
}

// guardDebug keeps the pages about the inside, which tell who may reach whom and can take a processor for a minute, for those who may see
// everything anyway: users of this machine, and holders of an API key. "This machine" is a loopback address, less what only looks like it: a
// request that a proxy passed on, and one that a web page made a browser send.
func (s *server) guardDebug(next http.Handler) http.Handler {
	keyed := s.checker.Middleware(func(w http.ResponseWriter, _ *http.Request, err error) {
		status := http.StatusServiceUnavailable
		switch {
		case w.Header().Get("WWW-Authenticate") != "":
			status = http.StatusUnauthorized
		case w.Header().Get("Retry-After") != "":
			status = http.StatusTooManyRequests
		}
		http.Error(w, err.Error(), status)
	})(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		if s.fromHere(r) {
			next.ServeHTTP(w, r)
			return
		}
		keyed.ServeHTTP(w, r)
	})
}

// fromHere reports whether a user of this machine made the request himself.
func (s *server) fromHere(r *http.Request) bool {
	if !listener.ClientIP(r).IsLoopback() || !s.ownHost(r.Host) {
		return false
	}
	for _, h := range []string{"Forwarded", "X-Forwarded-For", "X-Real-Ip", "Via"} {
		if r.Header.Get(h) != "" {
			return false
		}
	}
	// Browsers say which page had them send a request (W3C Fetch Metadata).
	site := r.Header.Get("Sec-Fetch-Site")
	return site == "" || site == "same-origin" || site == "none"
}

// ownHost reports whether a Host header names this listener in a way that no foreign page can: a name that its owner lets point at 127.0.0.1
// is the way from a page in a browser here to this listener (DNS rebinding).
func (s *server) ownHost(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if _, err := netip.ParseAddr(host); err == nil || strings.EqualFold(host, "localhost") {
		return true
	}
	own, _, err := net.SplitHostPort(s.cfg.MetricsListenAddr)
	return err == nil && own != "" && strings.EqualFold(host, own)
}

func (s *server) debugIndex(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	fmt.Fprintf(w, "<!doctype html>\n<title>Signalbox debug pages</title>\n<ul>\n")
	for _, p := range s.debugPages() {
		fmt.Fprintf(w, "<li><a href=%q>%s</a>: %s\n", p.path, p.path, html.EscapeString(p.shows))
	}
	fmt.Fprintf(w, "<li><a href=\"/metrics\">/metrics</a>: for Prometheus\n</ul>\n")
}

// askedNode is the node that a request names, nil when it names none. ok is false when the request was answered already.
func askedNode(w http.ResponseWriter, r *http.Request, snap *tailnet.Snapshot) (n *tailnet.Node, ok bool) {
	text := r.URL.Query().Get("node")
	if text == "" {
		return nil, true
	}
	id, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		http.Error(w, "node: want the number of a node", http.StatusBadRequest)
		return nil, false
	}
	if n = snap.Node(tailcfg.NodeID(id)); n == nil {
		http.Error(w, fmt.Sprintf("node %d does not exist", id), http.StatusNotFound)
	}
	return n, n != nil
}

func (s *server) debugSnapshot(w http.ResponseWriter, r *http.Request) {
	snap := s.replica.Current()
	n, ok := askedNode(w, r, snap)
	if !ok {
		return
	}
	if n != nil {
		writeJSON(w, nodeDetail(snap, n))
		return
	}
	type node struct {
		ID     int64  `json:"id"`
		Slot   int    `json:"slot"`
		Name   string `json:"name"`
		Online bool   `json:"online"`
		Peers  int    `json:"peers"`
	}
	out := struct {
		Revision int64       `json:"revision"`
		Database *int64      `json:"databaseRevisionsAhead"` // null: it cannot be asked
		Layout   uint64      `json:"layout"`
		Policy   string      `json:"policyError,omitempty"`
		Stale    string      `json:"policyStale,omitempty"`
		Frames   netmap.Held `json:"frames"`
		Nodes    []node      `json:"nodes"`
	}{Revision: int64(snap.Revision()), Layout: snap.Layout(), Frames: netmap.SnapshotFrames(snap), Nodes: []node{}}
	if b := s.behind(); b >= 0 {
		out.Database = new(int64(b))
	}
	if err := snap.Policy().Err; err != nil {
		out.Policy = err.Error()
	}
	if err := snap.Policy().Stale; err != nil {
		out.Stale = err.Error()
	}
	for slot, n := range snap.Nodes() {
		if n != nil {
			out.Nodes = append(out.Nodes, node{int64(n.ID), slot, n.FQDN, n.State.Online, snap.Access().Row(slot).Count()})
		}
	}
	writeJSON(w, out)
}

// nodeDetail is one device with what it is told of others. Keys are shown by their beginning only.
func nodeDetail(snap *tailnet.Snapshot, n *tailnet.Node) any {
	type peer struct {
		ID     int64  `json:"id"`
		Name   string `json:"name"`
		Online bool   `json:"online"`
	}
	out := struct {
		Revision   int64                          `json:"revision"`
		ID         int64                          `json:"id"`
		Slot       int                            `json:"slot"`
		Name       string                         `json:"name"`
		User       int64                          `json:"user"`
		Tags       []string                       `json:"tags"`
		NodeKey    string                         `json:"nodeKey"`
		MachineKey string                         `json:"machineKey"`
		Addresses  []netip.Addr                   `json:"addresses"`
		Endpoints  []tailcfg.Endpoint             `json:"endpoints"`
		HomeDERP   int                            `json:"homeDERP"`
		Cap        tailcfg.CapabilityVersion      `json:"capabilityVersion"`
		Routes     []netip.Prefix                 `json:"routes"`
		Online     bool                           `json:"online"`
		Unhealthy  bool                           `json:"unhealthy"` // it does not answer probes
		Server     int64                          `json:"server"`    // that holds its stream
		Expired    bool                           `json:"expired"`
		Peers      []peer                         `json:"peers"`
		Filter     []tailcfg.FilterRule           `json:"filter"`
		Caps       map[tailcfg.NodeCapability]int `json:"capabilities"` // and how many values each has
	}{
		Revision: int64(snap.Revision()), ID: int64(n.ID), Slot: n.Slot, Name: n.FQDN, User: int64(n.User), Tags: n.Tags, NodeKey: n.NodeKey.ShortString(),
		MachineKey: n.MachineKey.ShortString(), Addresses: []netip.Addr{}, Endpoints: n.State.Endpoints, HomeDERP: n.State.HomeDERP, Cap: n.State.Cap,
		Routes: n.Routes(), Online: n.State.Online, Unhealthy: n.State.Unhealthy, Server: n.State.Instance, Expired: n.Dead(), Peers: []peer{}, Caps: map[tailcfg.NodeCapability]int{},
	}
	for _, a := range []netip.Addr{n.IPv4, n.IPv6} {
		if a.IsValid() {
			out.Addresses = append(out.Addresses, a)
		}
	}
	seen := snap.Visible(n.Slot, nil)
	for slot, p := range snap.Nodes() {
		if p != nil && seen.Has(slot) {
			out.Peers = append(out.Peers, peer{int64(p.ID), p.FQDN, p.State.Online})
		}
	}
	if !n.Dead() {
		out.Filter = snap.Access().Filter(n.Slot).Rules
		for c, values := range snap.Access().Caps(n.Slot).Map {
			out.Caps[c] = len(values)
		}
	}
	return out
}

func (s *server) debugSessions(w http.ResponseWriter, r *http.Request) {
	snap := s.replica.Current()
	n, ok := askedNode(w, r, snap)
	if !ok {
		return
	}
	type session struct {
		Node     int64     `json:"node"`
		Name     string    `json:"name,omitempty"`
		Revision int64     `json:"revision"` // 0: the first map is not sent yet
		Lag      int64     `json:"lag"`      // revisions behind the server
		Written  int64     `json:"written"`
		Started  time.Time `json:"started"`
	}
	out := []session{}
	for _, x := range s.control.Poll.List() {
		if n != nil && x.Node() != n.ID {
			continue
		}
		row := session{Node: int64(x.Node()), Revision: x.Revision(), Written: x.Written(), Started: x.Started}
		if row.Revision > 0 {
			row.Lag = max(0, int64(snap.Revision())-row.Revision)
		}
		if of := snap.Node(x.Node()); of != nil {
			row.Name = of.FQDN
		}
		out = append(out, row)
	}
	slices.SortFunc(out, func(a, b session) int { return cmp.Compare(a.Node, b.Node) })
	writeJSON(w, out)
}

func (s *server) debugTiles(w http.ResponseWriter, _ *http.Request) {
	type tile struct {
		Index int `json:"index"`
		Nodes int `json:"nodes"`
		netmap.Held
	}
	snap := s.replica.Current()
	out := struct {
		Revision int64  `json:"revision"`
		Tiles    []tile `json:"tiles"`
	}{int64(snap.Revision()), []tile{}}
	for i, t := range snap.Tiles() {
		out.Tiles = append(out.Tiles, tile{Index: i, Nodes: len(t.Slots), Held: netmap.TileFrames(t)})
	}
	writeJSON(w, out)
}

func (s *server) debugFrames(w http.ResponseWriter, _ *http.Request) {
	type kind struct {
		Caches  int64   `json:"caches"`
		Frames  int64   `json:"frames"`
		Bytes   int64   `json:"bytes"`
		Hits    int64   `json:"hits"`
		Misses  int64   `json:"misses"`
		HitRate float64 `json:"hitRate"` // since the start
	}
	type delta struct {
		From int64 `json:"from"`
		To   int64 `json:"to"`
		netmap.Held
	}
	out := struct {
		Limit  int64           `json:"limitBytes"`
		Bytes  int64           `json:"bytes"`
		Kinds  map[string]kind `json:"kinds"`
		Deltas []delta         `json:"deltas"`
	}{netmap.Frames.Limit(), netmap.Frames.Bytes(), map[string]kind{}, []delta{}}
	for k := range netmap.Kinds {
		c := netmap.Frames.Count(k)
		out.Kinds[k.String()] = kind{c.Caches, c.Entries, c.Bytes, c.Hits, c.Misses, float64(c.Hits) / float64(max(1, c.Hits+c.Misses))}
	}
	told, _ := s.replica.News()
	for _, d := range told.Deltas() {
		out.Deltas = append(out.Deltas, delta{int64(d.From.Revision()), int64(d.To.Revision()), netmap.DeltaFrames(d)})
	}
	slices.SortFunc(out.Deltas, func(a, b delta) int { return cmp.Compare(a.From, b.From) })
	writeJSON(w, out)
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(v)
}
