package pages

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control/register"
	"github.com/signalbox-net/signalbox/db"
)

const (
	testID  = "0123456789ABCDEFGHJKMNPQKTRX482Q"
	otherID = "0123456789ABCDEFGHJKMNPQ00000000"
)

// A rig is a database and the pages.
type rig struct {
	t       *testing.T
	at      time.Time
	path    string
	store   *db.Store
	tailnet db.TailnetID
	handler http.Handler
}

// Do is the Ledger of the rig.
func (g *rig) Do(ctx context.Context, a db.Actor, fn func(*db.Tx) error) (db.Revision, error) {
	return g.store.Update(ctx, g.tailnet, a, fn)
}

func newRig(t *testing.T, with ...func(*Config)) *rig {
	t.Helper()
	g := &rig{t: t, at: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)}
	now := func() time.Time { return g.at }
	var err error
	g.path = filepath.Join(t.TempDir(), "signalbox.db")
	if g.store, err = db.Open(t.Context(), db.Config{Path: g.path, Now: now, BusyTimeout: 20 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.store.Close() })
	if g.tailnet, _, err = g.store.Bootstrap(t.Context(), "default", func(*db.Tx) error { return nil }); err != nil {
		t.Fatal(err)
	}
	c := Config{Store: g.store, Tailnet: g.tailnet, Ledger: g, ServerURL: "https://mesh.example.com:8443", Build: Build{Version: "1.2.3", Commit: "abc"}, Now: now}
	for _, f := range with {
		f(&c)
	}
	g.handler = New(c)
	return g
}

// ask makes a device wait under id.
func (g *rig) ask(id, kind string, edit func(*db.AuthRequest)) {
	g.t.Helper()
	_, err := g.Do(g.t.Context(), db.Actor{Kind: "unauthenticated"}, func(tx *db.Tx) error {
		a := &db.AuthRequest{
			Hash: register.HashID(id), Kind: kind, Tailnet: tx.Tailnet(), MachineKey: key.NewMachine().Public(), NodeKey: key.NewNode().Public(),
			Hostinfo: &tailcfg.Hostinfo{Hostname: "marcus-bell-nuc", OS: "linux", Distro: "debian", DistroVersion: "12.4", IPNVersion: "1.102.5-t123"},
			Source:   "10.8.4.20", Created: tx.Now(), Expires: tx.Now().Add(15 * time.Minute), State: db.AuthRequestPending,
		}
		if edit != nil {
			edit(a)
		}
		return tx.CreateAuthRequest(a)
	})
	if err != nil {
		g.t.Fatal(err)
	}
}

func (g *rig) row(id string) (a *db.AuthRequest, rev db.Revision) {
	g.t.Helper()
	err := g.store.View(g.t.Context(), func(r *db.Reader) (err error) {
		if a, err = r.In(g.tailnet).AuthRequestByHash(register.HashID(id)); err != nil {
			return err
		}
		rev, err = r.In(g.tailnet).Revision()
		return err
	})
	if err != nil {
		g.t.Fatal(err)
	}
	return a, rev
}

func (g *rig) send(method, path string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, nil)
	r.Host = "evil.example"
	rec := httptest.NewRecorder()
	g.handler.ServeHTTP(rec, r)
	return rec
}

func TestRegisterPageShowsTheDevice(t *testing.T) {
	g := newRig(t)
	g.ask(testID, db.AuthRequestRegister, nil)
	g.at = g.at.Add(2 * time.Minute)
	rec := g.send("GET", "/register/"+testID)
	body := rec.Body.String()
	for _, want := range []string{
		"Connect this device to mesh.example.com?", "marcus-bell-nuc", "Debian 12.4, Tailscale 1.102.5", "<span>KTRX</span> <span>482Q</span>", "10.8.4.20, 2 minutes ago",
		"<code>signalbox auth register --user NAME --auth-id " + testID + "</code>",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("the page lacks %q:\n%s", want, body)
		}
	}
	if rec.Code != 200 || strings.Contains(body, "evil.example") {
		t.Errorf("status %d:\n%s", rec.Code, body)
	}
}

// Looking marks the row as opened, once, and changes nothing else.
func TestOpeningThePageKeepsTheRequest(t *testing.T) {
	g := newRig(t)
	g.ask(testID, db.AuthRequestRegister, nil)
	before, rev := g.row(testID)
	g.send("HEAD", "/register/"+testID)
	if a, now := g.row(testID); a.Opened || now != rev {
		t.Errorf("HEAD: opened = %v, revision %d after %d", a.Opened, now, rev)
	}
	g.send("GET", "/register/"+testID)
	after, opened := g.row(testID)
	if !after.Opened || after.State != before.State || after.User != before.User || after.Node != before.Node || !after.Expires.Equal(before.Expires) {
		t.Errorf("before %+v\nafter %+v", before, after)
	}
	g.send("GET", "/register/"+testID)
	if _, now := g.row(testID); now != opened {
		t.Errorf("the second look made revision %d after %d", now, opened)
	}
}

// Every id that does not wait gets the same bytes.
func TestIdsThatDoNotWaitLookTheSame(t *testing.T) {
	g := newRig(t)
	g.ask(testID, db.AuthRequestRegister, nil)
	g.ask(otherID, db.AuthRequestSSH, nil)
	want := g.send("GET", "/register/ZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZ")
	if want.Code != 404 || strings.Contains(want.Body.String(), "ZZZZ") {
		t.Fatalf("unknown id = %d %s", want.Code, want.Body)
	}
	same := func(why, path string) {
		t.Helper()
		if rec := g.send("GET", path); rec.Code != 404 || rec.Body.String() != want.Body.String() {
			t.Errorf("%s: %d %s", why, rec.Code, rec.Body)
		}
	}
	same("lower case", "/register/"+strings.ToLower(testID))
	same("short", "/register/"+testID[:31])
	same("long", "/register/"+testID+"0")
	same("foreign characters", "/register/"+strings.Repeat("U", 32))
	same("escapes", "/register/%3Cscript%3Ealert(1)%3C/script%3E")
	same("an SSH check", "/register/"+otherID)
	same("a login", "/auth/"+testID)
	same("no such path", "/nothing")
	g.at = g.at.Add(15 * time.Minute)
	same("expired", "/register/"+testID)
}

func TestMissesAreLimited(t *testing.T) {
	g := newRig(t)
	g.ask(testID, db.AuthRequestRegister, nil)
	for range missBurst {
		if rec := g.send("GET", "/register/"+otherID); rec.Code != 404 {
			t.Fatalf("miss = %d", rec.Code)
		}
	}
	if rec := g.send("GET", "/register/"+otherID); rec.Code != 429 || rec.Header().Get("Retry-After") == "" {
		t.Errorf("one more = %d", rec.Code)
	}
	g.at = g.at.Add(time.Minute)
	if rec := g.send("GET", "/register/"+testID); rec.Code != 200 {
		t.Errorf("after a minute = %d", rec.Code)
	}
}

func TestHostileDeviceCannotHurtThePage(t *testing.T) {
	g := newRig(t)
	g.ask(testID, db.AuthRequestRegister, func(a *db.AuthRequest) {
		a.Hostinfo = &tailcfg.Hostinfo{
			Hostname: `<script>alert(1)</script>"'` + "\u202egnp.exe\x00\n" + strings.Repeat("w", 300), OS: "<img src=x onerror=alert(1)>",
			Distro: "é<b>", OSVersion: strings.Repeat("9", 1000), IPNVersion: "</dd><script>",
		}
		a.Source = "<i>"
	})
	rec := g.send("GET", "/register/"+testID)
	body := rec.Body.String()
	for _, no := range []string{"<script", "<img", "<b>alert", "<i>", "\u202e", "\x00", strings.Repeat("w", 100), strings.Repeat("9", 100)} {
		if strings.Contains(body, no) {
			t.Errorf("the page contains %q", no)
		}
	}
	if rec.Code != 200 || !strings.Contains(body, "&lt;script&gt;alert(1)") {
		t.Errorf("status %d:\n%s", rec.Code, body)
	}
}

func TestDeviceWithoutHostinfo(t *testing.T) {
	g := newRig(t)
	g.ask(testID, db.AuthRequestRegister, func(a *db.AuthRequest) { a.Hostinfo = nil })
	if rec := g.send("GET", "/register/"+testID); rec.Code != 200 || !strings.Contains(rec.Body.String(), "a device without a name") {
		t.Errorf("status %d:\n%s", rec.Code, rec.Body)
	}
}

func TestDecidedRequestOffersNothing(t *testing.T) {
	g := newRig(t)
	g.ask(testID, db.AuthRequestRegister, func(a *db.AuthRequest) { a.State = db.AuthRequestRejected })
	rec := g.send("GET", "/register/"+testID)
	if body := rec.Body.String(); rec.Code != 200 || !strings.Contains(body, "This request was rejected") || strings.Contains(body, "--auth-id") {
		t.Errorf("status %d:\n%s", rec.Code, rec.Body)
	}
}

func TestSSHCheckPage(t *testing.T) {
	g := newRig(t)
	g.ask(testID, db.AuthRequestSSH, func(a *db.AuthRequest) {
		a.Detail = []byte(`{"from":"laptop","to":"<b>db</b>","login as":"root","port":22}`)
	})
	body := g.send("GET", "/auth/"+testID).Body.String()
	for _, want := range []string{"Confirm this SSH session?", "laptop", "&lt;b&gt;db&lt;/b&gt;", "login as", "root", "signalbox auth approve --auth-id " + testID, "<span>482Q</span>"} {
		if !strings.Contains(body, want) {
			t.Errorf("the page lacks %q:\n%s", want, body)
		}
	}
}

func TestSecurityHeaders(t *testing.T) {
	g := newRig(t)
	g.ask(testID, db.AuthRequestRegister, nil)
	for _, path := range []string{"/", "/register/" + testID, "/register/x", "/health", "/version", "/robots.txt", cssPath, "/nothing"} {
		h := g.send("GET", path).Header()
		csp := h.Get("Content-Security-Policy")
		if !strings.HasPrefix(csp, "default-src 'none'; style-src 'self';") || !strings.Contains(csp, "frame-ancestors 'none'") || strings.Contains(csp, "unsafe") ||
			h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Referrer-Policy") != "no-referrer" || h.Get("Cache-Control") == "" || h.Get("Set-Cookie") != "" {
			t.Errorf("%s: %v", path, h)
		}
		if strings.HasPrefix(path, "/register") && h.Get("Cache-Control") != "no-store" {
			t.Errorf("%s may be cached: %v", path, h)
		}
	}
	if rec := g.send("POST", "/register/"+testID); rec.Code != 405 || rec.Header().Get("Allow") != "GET, HEAD" {
		t.Errorf("POST = %d %v", rec.Code, rec.Header())
	}
	if a, _ := g.row(testID); a.State != db.AuthRequestPending {
		t.Errorf("state = %s", a.State)
	}
}

// Pages carry no script, no inline style and nothing from elsewhere.
func TestPagesNeedOnlyTheirStyle(t *testing.T) {
	g := newRig(t)
	g.ask(testID, db.AuthRequestRegister, nil)
	for _, path := range []string{"/", "/register/" + testID, "/nothing"} {
		body := g.send("GET", path).Body.String()
		if !strings.Contains(body, `<link rel="stylesheet" href="`+cssPath+`">`) {
			t.Errorf("%s does not link its style", path)
		}
		for _, no := range []string{"<script", "<style", " style=", " onclick", "http://", "src="} {
			if strings.Contains(body, no) {
				t.Errorf("%s contains %q", path, no)
			}
		}
	}
	if rec := g.send("GET", cssPath); rec.Code != 200 || rec.Header().Get("Content-Type") != "text/css; charset=utf-8" || !strings.Contains(rec.Header().Get("Cache-Control"), "immutable") {
		t.Errorf("style = %d %v", rec.Code, rec.Header())
	}
}

func TestHealth(t *testing.T) {
	var fault error
	g := newRig(t, func(c *Config) {
		c.Checks = map[string]func(context.Context) error{"policy": func(context.Context) error { return fault }}
	})
	get := func() (int, string, string) {
		rec := g.send("GET", "/health")
		return rec.Code, rec.Header().Get("Content-Type"), strings.TrimSpace(rec.Body.String())
	}
	if code, kind, body := get(); code != 200 || kind != "application/health+json; charset=utf-8" || body != `{"status":"pass"}` {
		t.Errorf("healthy = %d %s %s", code, kind, body)
	}
	fault = errors.New("/etc/secret/policy.hujson: line 3")
	if code, _, body := get(); code != 503 || body != `{"status":"fail","failed":["policy"]}` {
		t.Errorf("bad policy = %d %s", code, body)
	}
	fault = nil

	// Somebody else holds the database's write lock.
	other, err := sql.Open("sqlite", g.path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	other.SetMaxOpenConns(1)
	if _, err := other.Exec("BEGIN IMMEDIATE"); err != nil {
		t.Fatal(err)
	}
	write := func(name string) error {
		_, err := g.Do(t.Context(), db.Actor{}, func(tx *db.Tx) error { return tx.CreateUser(&db.User{Name: name, Role: "member"}) })
		return err
	}
	if err := write("bob"); !errors.Is(err, db.ErrUnavailable) {
		t.Fatalf("write under a foreign lock: %v", err)
	}
	if code, _, body := get(); code != 503 || body != `{"status":"fail","failed":["database"]}` {
		t.Errorf("locked database = %d %s", code, body)
	}
	if _, err := other.Exec("ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	if err := write("carol"); err != nil {
		t.Fatal(err)
	}
	if code, _, body := get(); code != 200 || body != `{"status":"pass"}` {
		t.Errorf("healed database = %d %s", code, body)
	}
}

func TestPageWithoutDatabase(t *testing.T) {
	g := newRig(t)
	g.store.Close()
	if rec := g.send("GET", "/register/"+testID); rec.Code != 503 || rec.Header().Get("Retry-After") == "" {
		t.Errorf("page = %d %v", rec.Code, rec.Header())
	}
}

func TestVersion(t *testing.T) {
	g := newRig(t)
	var v struct {
		Version, Commit string
		Dirty           *bool
		Go              struct{ Version, OS, Arch string }
	}
	rec := g.send("GET", "/version")
	if err := json.Unmarshal(rec.Body.Bytes(), &v); err != nil || v.Version != "1.2.3" || v.Commit != "abc" || v.Dirty == nil || !strings.HasPrefix(v.Go.Version, "go1") || v.Go.OS == "" {
		t.Errorf("version = %s (%v)", rec.Body, err)
	}
}

func TestRobots(t *testing.T) {
	g := newRig(t)
	if body := g.send("GET", "/robots.txt").Body.String(); body != "User-agent: *\nDisallow: /\n" {
		t.Errorf("robots.txt = %q", body)
	}
}
