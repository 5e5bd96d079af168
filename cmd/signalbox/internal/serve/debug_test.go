package serve

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/db"
)

// built is a server with all its parts, whose sockets nobody serves, that follows its database.
func built(t *testing.T, yaml string) *server {
	t.Helper()
	s := newServer(load(t, yaml), io.Discard)
	ctx, cancel := context.WithCancel(context.Background())
	if err := s.open(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.build(ctx); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.replica.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		s.close()
	})
	return s
}

// ask sends a request that comes from an address.
func ask(h http.Handler, from, host, path string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest("GET", "http://"+host+path, nil)
	r.RemoteAddr = from
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func TestDebugPagesAreForThisMachineAndKeyHolders(t *testing.T) {
	s := built(t, "")
	s.cfg.MetricsListenAddr = "Metrics.example.com:9090"
	secret, id, hash := db.NewKey(db.KeyAPI)
	_, err := s.ledger.Do(t.Context(), system, func(tx *db.Tx) error { return tx.CreateAPIKey(&db.APIKey{KeyID: id, Hash: hash}) })
	if err != nil {
		t.Fatal(err)
	}
	h := s.debugHandler()
	const here, away = "127.0.0.1:40000", "192.0.2.7:40000"
	for name, c := range map[string]struct {
		from, host string
		header     []string
		want       int
	}{
		"loopback":                     {here, "127.0.0.1:9090", nil, 200},
		"IPv6 loopback":                {"[::1]:40000", "[::1]:9090", nil, 200},
		"mapped loopback":              {"[::ffff:127.0.0.1]:40000", "localhost:9090", nil, 200},
		"localhost without port":       {here, "LOCALHOST", nil, 200},
		"the configured name":          {here, "metrics.example.com:9090", nil, 200},
		"own page":                     {here, "127.0.0.1:9090", []string{"Sec-Fetch-Site", "same-origin"}, 200},
		"another machine":              {away, "127.0.0.1:9090", nil, 401},
		"another machine in the mesh":  {"100.64.0.9:1", "100.64.0.1:9090", nil, 401},
		"a rebound name":               {here, "evil.example.net:9090", nil, 401},
		"a foreign page":               {here, "127.0.0.1:9090", []string{"Sec-Fetch-Site", "cross-site"}, 401},
		"through a proxy here":         {here, "127.0.0.1:9090", []string{"X-Forwarded-For", "127.0.0.1"}, 401},
		"through a proxy, forwarded":   {here, "127.0.0.1:9090", []string{"Forwarded", "for=127.0.0.1"}, 401},
		"claims to be from here":       {away, "localhost", []string{"X-Real-IP", "127.0.0.1"}, 401},
		"with a key":                   {away, "metrics.example.org", []string{"Authorization", "Bearer " + secret}, 200},
		"with a wrong key":             {"192.0.2.8:1", "127.0.0.1", []string{"Authorization", "Bearer " + secret[:len(secret)-1]}, 401},
		"a rebound name with that key": {here, "evil.example.net", []string{"Authorization", "Bearer " + secret}, 200},
	} {
		for _, path := range []string{"/debug/", "/debug/snapshot", "/debug/pprof/cmdline", "/debug/pprof/"} {
			w := ask(h, c.from, c.host, path, c.header...)
			if w.Code != c.want || w.Code == 401 && w.Header().Get("WWW-Authenticate") == "" || w.Header().Get("Cache-Control") != "no-store" {
				t.Errorf("%s: %s: %d %v, want %d", name, path, w.Code, w.Header(), c.want)
			}
		}
		if w := ask(h, c.from, c.host, "/metrics"); w.Code != 200 {
			t.Errorf("%s: /metrics: %d", name, w.Code)
		}
	}
	if w := ask(s.local(http.NotFoundHandler(), h), "@", "signalbox", "/debug/frames"); w.Code != 200 {
		t.Errorf("through the unix socket: %d", w.Code)
	}
}

func TestGuessingKeysAtTheDebugPagesIsSlowedDown(t *testing.T) {
	s := built(t, "")
	h := s.debugHandler()
	var last *httptest.ResponseRecorder
	for range 30 {
		wrong, _, _ := db.NewKey(db.KeyAPI)
		last = ask(h, "192.0.2.7:1", "x", "/debug/snapshot", "Authorization", "Bearer "+wrong)
	}
	if last.Code != http.StatusTooManyRequests || last.Header().Get("Retry-After") == "" {
		t.Errorf("after thirty wrong keys: %d %v", last.Code, last.Header())
	}
}

func TestDebugPagesShowWhatIsThereAndNoKeys(t *testing.T) {
	s := built(t, "")
	names := []string{"desk", "box"}
	var ids []tailcfg.NodeID
	rev, err := s.ledger.Do(t.Context(), system, func(tx *db.Tx) error {
		for _, name := range names {
			n := debugNode(t, tx, s.pools(), name)
			if err := tx.CreateNode(n); err != nil {
				return err
			}
			ids = append(ids, n.ID)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	snap, err := s.replica.WaitFor(t.Context(), rev)
	if err != nil {
		t.Fatal(err)
	}
	h := s.debugHandler()
	get := func(path string, want int) string {
		t.Helper()
		w := ask(h, "127.0.0.1:1", "localhost", path)
		if w.Code != want {
			t.Errorf("%s: %d %s, want %d", path, w.Code, w.Body, want)
		}
		return w.Body.String()
	}
	index := get("/debug/", 200)
	for _, p := range s.debugPages() {
		if !strings.Contains(index, `href="`+p.path+`"`) {
			t.Errorf("the index lacks %s: %s", p.path, index)
		}
		text := get(p.path, 200)
		for _, n := range snap.Nodes() {
			if strings.Contains(text, n.NodeKey.UntypedHexString()) || strings.Contains(text, n.MachineKey.UntypedHexString()) {
				t.Errorf("%s shows a whole key", p.path)
			}
		}
	}
	one := get("/debug/snapshot?node=2", 200)
	for _, want := range []string{`"desk.`, `"nodeKey": "` + snap.Node(ids[1]).NodeKey.ShortString(), `"filter": [`, `"name": "box.`} {
		if !strings.Contains(one, want) {
			t.Errorf("the page of one node lacks %s: %s", want, one)
		}
	}
	if strings.Contains(one, snap.Node(ids[1]).NodeKey.UntypedHexString()) {
		t.Error("the page of one node shows its key")
	}
	for _, page := range []string{"snapshot", "sessions"} {
		get("/debug/"+page+"?node=x", 400)
		get("/debug/"+page+"?node=77", 404)
	}
	get("/debug/sessions?node=1", 200)
	if tiles := get("/debug/tiles", 200); !strings.Contains(tiles, `"nodes": 2`) || !strings.Contains(tiles, `"bytes": `) {
		t.Errorf("tiles: %s", tiles)
	}
	if frames := get("/debug/frames", 200); !strings.Contains(frames, `"hitRate"`) || !strings.Contains(frames, `"limitBytes"`) {
		t.Errorf("frames: %s", frames)
	}
	get("/debug/nothing", 404)
}

func TestMetricsSayHowTheServerIs(t *testing.T) {
	s := built(t, "")
	scrape := func() string { return ask(s.debugHandler(), "192.0.2.7:1", "x", "/metrics").Body.String() }
	rev, err := s.ledger.Do(t.Context(), system, func(tx *db.Tx) error { return tx.CreateUser(&db.User{Name: "dora", Role: "member"}) })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.replica.WaitFor(t.Context(), rev); err != nil {
		t.Fatal(err)
	}
	text := scrape()
	for _, want := range []string{
		"signalbox_healthy 1\n", "signalbox_database_healthy 1\n", "signalbox_database_refuses_writes 0\n", "signalbox_revision_lag 0\n", "signalbox_servers_alive 1\n",
		"signalbox_sessions 0\n", "signalbox_sessions_waiting 0\n", "signalbox_full_map_in_flight_bytes 0\n", "signalbox_noise_handshakes_waiting 0\n",
		`signalbox_check{check="replica"} 1` + "\n", `signalbox_frame_cache_hits_total{kind="tile"} `, `signalbox_frame_cache_entries{kind="delta"} `,
		"signalbox_frame_cache_limit_bytes ", "signalbox_fan_out_seconds_count ", "signalbox_oldest_session_revision_lag 0\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the metrics lack %q", want)
		}
	}
	if strings.Contains(text, "signalbox_commit_seconds_count 0\n") || !strings.Contains(text, "signalbox_commit_seconds_count ") {
		t.Error("commits were not timed")
	}
	s.store.Close()
	if _, err := s.ledger.Do(t.Context(), system, func(*db.Tx) error { return nil }); err == nil {
		t.Fatal("a closed database takes writes")
	}
	if text = scrape(); !strings.Contains(text, "signalbox_revision_lag NaN\n") {
		t.Error("the lag behind a database that cannot be asked is a number")
	}
}

func TestDialPlanIsStoredAndItsEndToo(t *testing.T) {
	s := opened(t, load(t, "control_dial_plan: [{ip: 203.0.113.7}, {ip: 203.0.113.8, start_delay: 300ms, timeout: 5s, priority: 2}]\n"))
	plan := func() *tailcfg.ControlDialPlan {
		t.Helper()
		rev, err := s.ledger.Do(t.Context(), system, s.putDialPlan)
		if err != nil {
			t.Fatal(err)
		}
		snap, err := s.replica.WaitFor(t.Context(), rev)
		if err != nil {
			t.Fatal(err)
		}
		return snap.Settings().DialPlan
	}
	with := s.cfg.ControlDialPlan
	s.cfg.ControlDialPlan = nil
	if p := plan(); p != nil {
		t.Errorf("without a plan, ever: %+v", p)
	}
	s.cfg.ControlDialPlan = with
	p := plan()
	if p == nil || len(p.Candidates) != 2 || p.Candidates[0].DialTimeoutSec != 10 || p.Candidates[1].DialStartDelaySec != 0.3 || p.Candidates[1].DialTimeoutSec != 5 || p.Candidates[1].Priority != 2 {
		t.Errorf("plan = %+v", p)
	}
	s.cfg.ControlDialPlan = nil
	if p := plan(); p == nil || len(p.Candidates) != 0 {
		t.Errorf("after its end: %+v, want one without candidates", p)
	}
}

// debugNode is a device of the first user that others may be told of.
func debugNode(t *testing.T, tx *db.Tx, pools db.Pools, name string) *db.Node {
	t.Helper()
	u, err := tx.UserByName("admin")
	if err != nil {
		t.Fatal(err)
	}
	v4, v6, err := tx.AllocateAddrs(pools)
	if err != nil {
		t.Fatal(err)
	}
	return &db.Node{
		MachineKey: key.NewMachine().Public(), NodeKey: key.NewNode().Public(), User: u.ID, GivenName: name, Hostname: name, IPv4: v4, IPv6: v6,
		State: db.NodeState{DiscoKey: key.NewDisco().Public()},
	}
}
