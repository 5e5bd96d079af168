package apiv1

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/control/c2n"
	"github.com/signalbox-net/signalbox/control/poll"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/web/auth"
)

var testPools = db.Pools{IPv4: netip.MustParsePrefix("100.64.0.0/10"), IPv6: netip.MustParsePrefix("fd7a:115c:a1e0::/48")}

// A world is a server's database, its replica and this interface, with one
// user (alice) and one API key.
type world struct {
	t       *testing.T
	path    string
	clock   atomic.Int64 // nanoseconds
	store   *db.Store
	tailnet db.TailnetID
	ledger  *tailnet.Ledger
	replica *tailnet.Replica
	config  Config
	handler http.Handler
	alice   tailcfg.UserID
	apiKey  string
}

// firstPolicy is the default one with some tags.
var firstPolicy = bytes.Replace(acl.Default(), []byte(`"tagOwners": {`), []byte(`"tagOwners": {"tag:a": [], "tag:db": [], "tag:web": [],`), 1)

func newWorld(t *testing.T, with ...func(*Config)) *world {
	t.Helper()
	w := &world{t: t}
	w.clock.Store(time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC).UnixNano())
	ctx, cancel := context.WithCancel(context.Background())
	var err error
	w.path = filepath.Join(t.TempDir(), "signalbox.db")
	if w.store, err = db.Open(ctx, db.Config{Path: w.path, Now: w.now, BusyTimeout: 50 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	w.tailnet, _, err = w.store.Bootstrap(ctx, "default", func(tx *db.Tx) error {
		u := &db.User{Tailnet: tx.Tailnet(), Name: "alice", Email: "alice@example.com", Role: "owner", Created: tx.Now()}
		if err := tx.CreateUser(u); err != nil {
			return err
		}
		w.alice = u.ID
		_, err := tx.SetPolicy(firstPolicy, "", nil)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if w.replica, err = tailnet.NewReplica(ctx, tailnet.ReplicaConfig{Store: w.store, Tailnet: w.tailnet}); err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() { w.replica.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait(); w.store.Close() })
	w.ledger = tailnet.NewLedger(tailnet.LedgerConfig{Store: w.store, Tailnet: w.tailnet, Replica: w.replica})
	w.config = Config{
		Store: w.store, Tailnet: w.tailnet, Ledger: w.ledger, Replica: w.replica, Pools: testPools, Now: w.now,
		Auth: auth.New(auth.Config{Store: w.store, Now: w.now}),
	}
	streams := poll.New(poll.Config{Store: w.store, Replica: w.replica, Ledger: w.ledger})
	w.config.Calls = c2n.New(c2n.Config{Store: w.store, Replica: w.replica, Ledger: w.ledger, Streams: streams})
	for _, f := range with {
		f(&w.config)
	}
	w.handler = New(w.config)

	secret, keyID, hash := db.NewKey(db.KeyAPI)
	w.apiKey = secret
	w.do(func(tx *db.Tx) error {
		return tx.CreateAPIKey(&db.APIKey{KeyID: keyID, Hash: hash, Tailnet: tx.Tailnet(), Created: tx.Now()})
	})
	return w
}

func (w *world) now() time.Time { return time.Unix(0, w.clock.Load()).UTC() }

// do writes and waits until the replica shows it.
func (w *world) do(fn func(*db.Tx) error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := w.ledger.DoWait(ctx, db.Actor{Kind: "system"}, fn); err != nil {
		w.t.Fatal(err)
	}
}

// addNode makes a node that advertises routes.
func (w *world) addNode(name string, user tailcfg.UserID, tags []string, routes ...string) tailcfg.NodeID {
	w.t.Helper()
	n := &db.Node{
		MachineKey: key.NewMachine().Public(), NodeKey: key.NewNode().Public(), User: user, Tags: tags, Hostname: name,
		Expiry: w.now().Add(24 * time.Hour), RegisterMethod: "cli",
	}
	w.do(func(tx *db.Tx) error {
		var err error
		n.ID, n.StableID, n.Tailnet, n.Created = 0, "", tx.Tailnet(), tx.Now()
		if n.IPv4, n.IPv6, err = tx.AllocateAddrs(testPools); err != nil {
			return err
		}
		if n.GivenName, err = tx.FreeName(tailnet.Label(name, 0), n.Owner()); err != nil {
			return err
		}
		if err := tx.CreateNode(n); err != nil {
			return err
		}
		h := &tailcfg.Hostinfo{Hostname: name, OS: "linux"}
		for _, r := range routes {
			h.RoutableIPs = append(h.RoutableIPs, netip.MustParsePrefix(r))
		}
		return tx.PutNodeState(n.ID, db.NodeState{DiscoKey: key.NewDisco().Public(), Hostinfo: h})
	})
	return n.ID
}

// send makes a request. body is a string, nil, or a value to be encoded.
func (w *world) send(method, path string, body any, header ...string) *httptest.ResponseRecorder {
	w.t.Helper()
	var text string
	switch b := body.(type) {
	case nil:
	case string:
		text = b
	default:
		enc, err := json.Marshal(b)
		if err != nil {
			w.t.Fatal(err)
		}
		text = string(enc)
	}
	r := httptest.NewRequest(method, path, strings.NewReader(text))
	r.Header.Set("Authorization", "Bearer "+w.apiKey)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	rec := httptest.NewRecorder()
	w.handler.ServeHTTP(rec, r)
	return rec
}

// get makes a request that must succeed and decodes its answer.
func get[T any](w *world, method, path string, body any) T {
	w.t.Helper()
	var out T
	rec := w.send(method, path, body)
	if rec.Code != http.StatusOK {
		w.t.Fatalf("%s %s = %d %s", method, path, rec.Code, rec.Body)
	}
	if err := json.Unmarshal(rec.Body.Bytes(), &out); err != nil {
		w.t.Fatalf("%s %s: %v in %s", method, path, err, rec.Body)
	}
	return out
}

// refused makes a request that must fail with a status and a problem that
// mentions want.
func (w *world) refused(status int, want, method, path string, body any) *Problem {
	w.t.Helper()
	rec := w.send(method, path, body)
	var p Problem
	if err := json.Unmarshal(rec.Body.Bytes(), &p); err != nil {
		w.t.Fatalf("%s %s: %v in %q", method, path, err, rec.Body)
	}
	if rec.Code != status || p.Status != status || !strings.Contains(p.Detail, want) || rec.Header().Get("Content-Type") != "application/problem+json" {
		w.t.Errorf("%s %s = %d %s %q, want %d and %q", method, path, rec.Code, rec.Header().Get("Content-Type"), rec.Body, status, want)
	}
	return &p
}

// lastAudit is the newest audit row.
func (w *world) lastAudit() *db.AuditEvent {
	w.t.Helper()
	var out *db.AuditEvent
	err := w.store.View(context.Background(), func(r *db.Reader) error {
		events, err := r.In(w.tailnet).AuditEvents(0, 1000)
		if len(events) > 0 {
			out = events[len(events)-1]
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

// eachRoute walks the route table, with parameters filled in.
func eachRoute(t *testing.T, w *world, f func(method, path string)) {
	t.Helper()
	fill := strings.NewReplacer("{id}", "1", "{name}", "name", "{prefix}", "k123")
	n := 0
	err := chi.Walk(newServer(w.config).routes(), func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		n++
		f(method, fill.Replace(route))
		return nil
	})
	if err != nil || n < 30 {
		t.Fatalf("walked %d routes, err %v", n, err)
	}
}

// publicRoutes need no key.
var publicRoutes []string

func TestEveryRouteNeedsAKey(t *testing.T) {
	w := newWorld(t)
	for _, header := range []string{"", "Bearer ", "Bearer nonsense", "Basic Og==", "Bearer " + strings.Replace(w.apiKey, "tskey-api-", "tskey-auth-", 1)} {
		w.clock.Add(int64(time.Minute))
		i := 0
		eachRoute(t, w, func(method, path string) {
			if i++; i%5 == 0 {
				w.clock.Add(int64(time.Minute)) // failures are limited; that has its own test
			}
			if slices.Contains(publicRoutes, method+" "+path) {
				return
			}
			rec := w.send(method, path, nil, "Authorization", header)
			if rec.Code != http.StatusUnauthorized {
				t.Errorf("%s %s with %q = %d, want 401", method, path, header, rec.Code)
			}
		})
	}
}

func TestUnknownPathsAndMethods(t *testing.T) {
	w := newWorld(t)
	w.refused(404, "no such path", "GET", "/api/v1/routes", nil)
	w.refused(404, "no such path", "POST", "/api/v1/node/1/user", "{}")
	w.refused(404, "no such path", "GET", "/api/v1/../v1/user", nil)
	w.refused(405, "PATCH", "PATCH", "/api/v1/user", nil)
	w.refused(405, "HEAD", "HEAD", "/api/v1/user", nil)
	w.refused(405, "of the request", "BREW", "/api/v1/user", nil)
	rec := w.send("PUT", "/api/v1/user", nil)
	if got := rec.Header().Values("Allow"); !slices.Equal(got, []string{"GET", "POST"}) {
		t.Errorf("Allow = %q", got)
	}
}

// A mounted handler sees whole paths, whatever router is around it.
func TestHandlerWorksUnderAnotherRouter(t *testing.T) {
	w := newWorld(t)
	outer := chi.NewRouter()
	outer.Mount("/api/v1", w.handler)
	r := httptest.NewRequest("GET", "/api/v1/health", nil)
	r.Header.Set("Authorization", "Bearer "+w.apiKey)
	rec := httptest.NewRecorder()
	outer.ServeHTTP(rec, r)
	if rec.Code != 200 || strings.TrimSpace(rec.Body.String()) != `{"databaseConnectivity":true}` {
		t.Errorf("health = %d %s", rec.Code, rec.Body)
	}
}

// No input of a caller is an error of the server.
func TestBadInputIsNeverAServerError(t *testing.T) {
	w := newWorld(t)
	id := w.addNode("host", w.alice, nil)
	bodies := []string{
		"", " ", "null", "[]", "1", `"x"`, "{", "{}x", `{"a":}`, "\x00", "{\"user\":\"\xff\"}", strings.Repeat("[", 100_000), strings.Repeat(`{"a":`, 50_000),
		`{"user":1.5}`, `{"user":-1}`, `{"user":"99999999999999999999"}`, `{"user":true}`, `{"user":{}}`, `{"user":"1","aclTags":["tag:a\u0000"]}`,
		`{"user":"alice","aclTags":"tag:a"}`, `{"id":"x"}`, `{"id":"-5"}`, `{"id":[]}`, `{"prefix":{}}`, `{"prefix":"\u0000"}`, `{"expiration":"never"}`,
		`{"expiration":"0001-01-01T00:00:00Z","user":"1"}`, `{"expiration":"9999-12-31T23:59:59-12:00","user":"1"}`, `{"expiry":"9999-12-31T23:59:59-12:00"}`,
		`{"expiry":5}`, `{"disableExpiry":"yes"}`, `{"tags":[1]}`, `{"tags":[null]}`, `{"tags":null}`, `{"tags":["tag:"]}`, `{"routes":["x"]}`, `{"routes":[""]}`,
		`{"routes":["10.0.0.1/8"]}`, `{"routes":["::ffff:10.0.0.0/104"]}`, `{"routes":["fe80::%eth0/10"]}`, `{"policy":7}`, `{"policy":"\u0000"}`,
		`{"policy":"` + strings.Repeat("[", 1000) + `"}`, `{"policy":"{\"acls\":[{}]}"}`, `{"policy":""}`, `{"authId":"x","user":"alice"}`, `{"authId":7}`,
		`{"name":"\u0000a"}`, `{"name":"` + strings.Repeat("a", 10_000) + `"}`, `{"name":"a\u202eb"}`, `{"name":"ok","email":"@"}`, `{"name":"ok","pictureUrl":"javascript:alert(1)"}`,
	}
	fill := strings.NewReplacer("/1", fmt.Sprintf("/%d", int64(id)))
	eachRoute(t, w, func(method, path string) {
		if method == "DELETE" || strings.HasPrefix(path, "/api/v1/auth/") || path == "/api/v1/node/register" {
			return
		}
		for _, b := range bodies {
			w.clock.Add(int64(time.Second))
			if rec := w.send(method, fill.Replace(path), b); rec.Code >= 500 {
				t.Errorf("%s %s with %.80q = %d %s", method, path, b, rec.Code, rec.Body)
			}
		}
	})
	for _, path := range []string{"/node/x", "/node/0", "/node/-1", "/node/1.5", "/node/99999999999999999999", "/node/%00", "/node/%zz", "/node/1%2Fexpire"} {
		if rec := serveRaw(w, "GET", "/api/v1"+path); rec.Code < 400 || rec.Code >= 500 {
			t.Errorf("GET %s = %d %s", path, rec.Code, rec.Body)
		}
	}
	for _, query := range []string{"/node?user=nobody", "/node/backfillips?confirmed=maybe", "/user?id=x", "/preauthkey?user=%00"} {
		method := "GET"
		if strings.Contains(query, "backfill") {
			method = "POST"
		}
		if rec := w.send(method, "/api/v1"+query, nil); rec.Code < 400 || rec.Code >= 500 {
			t.Errorf("%s %s = %d %s", method, query, rec.Code, rec.Body)
		}
	}
}

// serveRaw sends a path that net/http's parser may refuse.
func serveRaw(w *world, method, path string) *httptest.ResponseRecorder {
	rec := httptest.NewRecorder()
	r := httptest.NewRequest(method, "/", nil)
	u, err := r.URL.Parse(path)
	if err != nil {
		rec.Code = http.StatusBadRequest // the server's parser answers so
		return rec
	}
	r.URL = u
	r.Header.Set("Authorization", "Bearer "+w.apiKey)
	w.handler.ServeHTTP(rec, r)
	return rec
}

func TestBodyLimits(t *testing.T) {
	w := newWorld(t)
	w.refused(413, "262144", "POST", "/api/v1/user", `{"name":"`+strings.Repeat("a", 300<<10)+`"}`)
	w.refused(413, "2097152", "POST", "/api/v1/policy/check", `{"policy":"`+strings.Repeat(" ", 3<<20)+`"}`)
	if rec := w.send("POST", "/api/v1/user", `{"name":"bob"}`, "Content-Encoding", "gzip"); rec.Code != 415 {
		t.Errorf("compressed body = %d, want 415", rec.Code)
	}
}

func TestWrongTypesNameTheirField(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct{ method, path, body, location string }{
		{"POST", "/api/v1/user", `{"name":5}`, "body.name"},
		{"POST", "/api/v1/user", `{"name":"x!"}`, "body.name"},
		{"POST", "/api/v1/user", `{"name":"bob","email":"nobody"}`, "body.email"},
		{"POST", "/api/v1/preauthkey", `{"user":"1","reusable":"yes"}`, "body.reusable"},
		{"POST", "/api/v1/preauthkey", `{"user":{}}`, "body.user"},
		{"POST", "/api/v1/preauthkey", `{"user":"1","expiration":"tomorrow"}`, "body.expiration"},
		{"POST", "/api/v1/preauthkey", `{"user":"1","expiration":"2001-01-01T00:00:00Z"}`, "body.expiration"},
		{"POST", "/api/v1/preauthkey", `{"aclTags":["tag:a","b"]}`, "body.aclTags[1]"},
		{"POST", "/api/v1/preauthkey", `{}`, "body.user"},
		{"POST", "/api/v1/node/1/tags", `{"tags":[]}`, "body.tags"},
		{"POST", "/api/v1/node/1/approve_routes", `{"routes":["10.0.0.0/8","nonsense"]}`, "body.routes[1]"},
		{"GET", "/api/v1/node/abc", ``, "path.id"},
		{"GET", "/api/v1/user?id=abc", ``, "query.id"},
		{"POST", "/api/v1/auth/register", `{"user":"alice","authId":"short"}`, "body.authId"},
	} {
		p := w.refused(400, c.location, c.method, c.path, c.body)
		if len(p.Errors) == 0 || p.Errors[0].Location != c.location {
			t.Errorf("%s %s %s: errors = %+v, want location %s", c.method, c.path, c.body, p.Errors, c.location)
		}
		if p.Code != 3 || p.Message != p.Detail {
			t.Errorf("gateway fields = %d %q", p.Code, p.Message)
		}
	}
}

// A write that the storage refuses is a 503 and changes nothing; reads go on;
// the same write works when the storage does.
func TestStorageFaultIsUnavailable(t *testing.T) {
	w := newWorld(t)
	id := w.addNode("host", w.alice, nil)
	before := w.replica.Current()

	other, err := sql.Open("sqlite", w.path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	other.SetMaxOpenConns(1)
	if _, err := other.Exec("BEGIN IMMEDIATE"); err != nil {
		t.Fatal(err)
	}
	writes := []struct{ method, path, body string }{
		{"POST", "/api/v1/user", `{"name":"bob"}`},
		{"POST", "/api/v1/preauthkey", `{"user":"1"}`},
		{"POST", nodePath(id) + "/rename/other", ""},
		{"PUT", "/api/v1/policy", `{"policy":"{}"}`},
	}
	for _, c := range writes {
		rec := w.send(c.method, c.path, c.body)
		var p Problem
		if err := json.Unmarshal(rec.Body.Bytes(), &p); err != nil || rec.Code != 503 || rec.Header().Get("Retry-After") != "5" || p.Code != 14 || strings.Contains(p.Detail, "lock") {
			t.Errorf("%s %s = %d %v %s", c.method, c.path, rec.Code, rec.Header(), rec.Body)
		}
	}
	if n := get[NodesResponse](w, "GET", "/api/v1/node", nil).Nodes; len(n) != 1 || n[0].GivenName != "host" || w.replica.Current() != before {
		t.Errorf("nodes = %+v, revision %d after %d", n, w.replica.Current().Revision(), before.Revision())
	}
	if _, err := other.Exec("ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	for _, c := range writes {
		get[map[string]any](w, c.method, c.path, c.body)
	}
}
