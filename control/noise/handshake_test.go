package noise

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"tailscale.com/control/controlbase"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

func TestKeyAnswerIsConstant(t *testing.T) {
	g := newRig(t, echo, nil)
	for _, q := range []string{"", "?v=137", "?v=%00"} {
		res, err := http.Get("http://" + g.addr + "/key" + q)
		if err != nil {
			t.Fatal(err)
		}
		var got tailcfg.OverTLSPublicKeyResponse
		if err := json.NewDecoder(res.Body).Decode(&got); err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if got.PublicKey != g.priv.Public() || !got.LegacyPublicKey.IsZero() {
			t.Errorf("%q: got %+v", q, got)
		}
		if cc := res.Header.Get("Cache-Control"); cc != "no-store" {
			t.Errorf("Cache-Control %q", cc)
		}
	}
	res, err := http.Post("http://"+g.addr+"/key", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", res.StatusCode)
	}
}

func TestBadHandshakesAreRefusedPlainly(t *testing.T) {
	g := newRig(t, echo, nil)
	other := key.NewMachine()
	init, _, err := controlbase.ClientDeferred(key.NewMachine(), g.priv.Public(), currentVersion)
	if err != nil {
		t.Fatal(err)
	}
	foreign, _, err := controlbase.ClientDeferred(key.NewMachine(), other.Public(), currentVersion)
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(init)
	flipped[60] ^= 1
	otherVersion := bytes.Clone(init)
	otherVersion[1]++
	wrongType := bytes.Clone(init)
	wrongType[2] = 4
	b64 := base64.StdEncoding.EncodeToString
	for name, h := range map[string]string{
		"missing":            "",
		"not base64":         strings.Repeat("!", 136),
		"garbage":            b64(bytes.Repeat([]byte{0xa5}, 101)),
		"truncated":          b64(init[:100]),
		"one byte more":      b64(append(bytes.Clone(init), 0)),
		"oversized":          strings.Repeat("A", 8000),
		"for another server": b64(foreign),
		"bit flipped":        b64(flipped),
		"version changed":    b64(otherVersion),
		"wrong type":         b64(wrongType),
	} {
		c, res, err := g.post(h)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if res.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: status %d, want 400", name, res.StatusCode)
		}
		c.Close()
	}
	if c := g.Counts(); c.Open != 0 || c.Handshakes != 0 {
		t.Errorf("counts after refusals: %+v", c)
	}
	// All zero public key: X25519 has no result for it.
	zero := bytes.Clone(init)
	clear(zero[5:37])
	if _, res, err := g.post(b64(zero)); err != nil || res.StatusCode != http.StatusBadRequest {
		t.Errorf("low order point: %v %v", res, err)
	}
}

func TestUpgradeRequestsOfOtherShapes(t *testing.T) {
	g := newRig(t, echo, nil)
	for _, tt := range []struct {
		head string
		want int
	}{
		{"GET /ts2021 HTTP/1.1\r\nHost: x\r\n\r\n", http.StatusUpgradeRequired},
		{"POST /ts2021 HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", http.StatusBadRequest},
		{"PUT /ts2021 HTTP/1.1\r\nHost: x\r\n\r\n", http.StatusMethodNotAllowed},
		{"POST /ts2021 HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: tailscale-control-protocol\r\nContent-Length: 3\r\n\r\nabc", http.StatusRequestEntityTooLarge},
		{"POST /ts2021 HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: tailscale-control-protocol\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", http.StatusRequestEntityTooLarge},
		{"GET /ts2021 HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", http.StatusBadRequest},
	} {
		c, err := net.Dial("tcp", g.addr)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, tt.head)
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatalf("%q: %v", tt.head, err)
		}
		if res.StatusCode != tt.want {
			t.Errorf("%q: status %d, want %d", tt.head, res.StatusCode, tt.want)
		}
		c.Close()
	}
}

func TestOldVersionsHearWhyAfterTheHandshake(t *testing.T) {
	g := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		t.Errorf("handler reached by %s", r.URL.Path)
	}, nil)
	for _, version := range []uint16{0, 1, 112} {
		nc, err := g.dial(g.node(), version)
		if err != nil {
			t.Fatal(err)
		}
		cc := newClientConn(t, nc)
		status, body := do(t, cc, "POST", "/machine/register", strings.NewReader("{}"))
		var res tailcfg.RegisterResponse
		if err := json.Unmarshal([]byte(body), &res); err != nil || status != 200 || !strings.Contains(res.Error, "too old") {
			t.Errorf("register: %d %q", status, body)
		}
		if status, _ := do(t, cc, "POST", "/machine/map", strings.NewReader("{}")); status != http.StatusBadRequest {
			t.Errorf("map: %d", status)
		}
		nc.Close()
	}
}

func TestSourceBucketChargesOnlyStrangers(t *testing.T) {
	g := newRig(t, echo, func(c *Config) {
		c.Limits.SourceBurst = 5
		c.Limits.SourceRate = 0.001
	})
	for i := range 7 {
		nc, err := g.dial(key.NewMachine(), currentVersion)
		if i < 5 && err != nil {
			t.Fatalf("stranger %d: %v", i, err)
		}
		if i >= 5 && err != statusError(http.StatusTooManyRequests) {
			t.Fatalf("stranger %d: %v, want 429", i, err)
		}
		if err == nil {
			nc.Close()
		}
	}
	nc, err := g.dial(g.node(), currentVersion)
	if err != nil {
		t.Fatalf("a node from the same address: %v", err)
	}
	nc.Close()
	// Garbage is not charged: its machine key is never learned.
	if got := g.Counts().Limited; got != 2 {
		t.Errorf("limited = %d, want 2", got)
	}
}

// A company that enrols from one address pays only for those who fail.
func TestSourceIsRefundedForNewNodes(t *testing.T) {
	var g *rig
	g = newRig(t, func(w http.ResponseWriter, r *http.Request) {
		c, _ := Peer(r.Context())
		g.known.Store(c.Machine, true) // the request made it a node
	}, func(c *Config) {
		c.Limits.SourceBurst = 3
		c.Limits.SourceRate = 0.001
	})
	for i := range 12 {
		nc, err := g.dial(key.NewMachine(), currentVersion)
		if err != nil {
			t.Fatalf("newcomer %d: %v", i, err)
		}
		if status, body := do(t, newClientConn(t, nc), "POST", "/machine/register", strings.NewReader("{}")); status != http.StatusOK {
			t.Fatalf("newcomer %d: %d %s", i, status, body)
		}
		nc.Close()
	}
}

func TestAdvertisedSettings(t *testing.T) {
	g := newRig(t, echo, nil)
	for _, k := range []key.MachinePrivate{key.NewMachine(), g.node()} {
		nc, err := g.dial(k, currentVersion)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := nc.Write(mapRequest(1 << 20)); err != nil {
			t.Fatal(err)
		}
		f, err := http2.NewFramer(nil, nc).ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		settings, ok := f.(*http2.SettingsFrame)
		if !ok {
			t.Fatalf("first frame is %v", f)
		}
		for id, want := range map[http2.SettingID]uint32{
			http2.SettingMaxConcurrentStreams: 250,
			http2.SettingMaxFrameSize:         16 << 10,
			http2.SettingMaxHeaderListSize:    16 << 10,
			http2.SettingInitialWindowSize:    65535,
		} {
			if got, ok := settings.Value(id); !ok || got != want {
				t.Errorf("%v = %d, want %d", id, got, want)
			}
		}
		nc.Close()
	}
}
