package noise

import (
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"tailscale.com/control/controlbase"
	"tailscale.com/control/controlhttp/controlhttpcommon"
	"tailscale.com/net/wsconn"
	"tailscale.com/types/key"
)

// dialWebSocket does what the js/wasm client does (control/controlhttp
// client_js.go). The raw connection lets a test misbehave underneath.
func (g *rig) dialWebSocket(k key.MachinePrivate) (ws *websocket.Conn, raw net.Conn, cont controlbase.HandshakeContinuation, err error) {
	init, cont, err := controlbase.ClientDeferred(k, g.priv.Public(), currentVersion)
	if err != nil {
		return nil, nil, nil, err
	}
	q := url.Values{controlhttpcommon.HandshakeHeaderName: {base64.StdEncoding.EncodeToString(init)}}
	ws, _, err = websocket.Dial(g.t.Context(), "ws://"+g.addr+"/ts2021?"+q.Encode(), &websocket.DialOptions{
		Subprotocols: []string{controlhttpcommon.UpgradeHeaderValue},
		HTTPHeader:   http.Header{"Origin": {"https://elsewhere.example"}},
		HTTPClient: &http.Client{Transport: &http.Transport{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				c, err := new(net.Dialer).DialContext(ctx, network, addr)
				raw = c
				return c, err
			},
		}},
	})
	return ws, raw, cont, err
}

func TestWebSocketClientsAreServed(t *testing.T) {
	g := newRig(t, echo, nil)
	k := g.node()
	ws, _, cont, err := g.dialWebSocket(k)
	if err != nil {
		t.Fatal(err)
	}
	nc, err := cont(t.Context(), wsconn.NetConn(t.Context(), ws, websocket.MessageBinary, ""))
	if err != nil {
		t.Fatal(err)
	}
	cc := newClientConn(t, nc)
	for _, size := range []int{0, 10, 20_000, 500_000} {
		status, body := do(t, cc, "POST", "/machine/map", strings.NewReader(strings.Repeat("x", size)))
		if want := fmt.Sprintf("%s %d %d", k.Public(), currentVersion, size); status != 200 || body != want {
			t.Errorf("%d bytes: got %d %q, want %q", size, status, body, want)
		}
	}
	g.CloseMachine(k.Public())
	waitClosed(t, nc)
}

func TestWebSocketBigAnswersArrive(t *testing.T) {
	big := strings.Repeat("answer ", 100_000)
	g := newRig(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, big) }, nil)
	ws, _, cont, err := g.dialWebSocket(g.node())
	if err != nil {
		t.Fatal(err)
	}
	nc, err := cont(t.Context(), wsconn.NetConn(t.Context(), ws, websocket.MessageBinary, ""))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, body := do(t, newClientConn(t, nc), "GET", "/machine/whoami", nil); body != big {
		t.Errorf("got %d bytes, want %d", len(body), len(big))
	}
}

// A frame that announces 2^63-1 bytes must neither be buffered nor waited for.
func TestWebSocketHugeFrameEndsTheConnection(t *testing.T) {
	g := newRig(t, echo, nil)
	_, raw, _, err := g.dialWebSocket(g.node())
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		raw.Write([]byte{0x82, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4})
		junk := make([]byte, 4096)
		for {
			if _, err := raw.Write(junk); err != nil {
				return
			}
		}
	}()
	waitClosed(t, raw)
}

func TestWebSocketPingFloodEndsTheConnection(t *testing.T) {
	g := newRig(t, echo, nil)
	_, raw, _, err := g.dialWebSocket(g.node())
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		ping := []byte{0x89, 0x80, 1, 2, 3, 4}
		for range 100_000 {
			if _, err := raw.Write(ping); err != nil {
				return
			}
		}
	}()
	waitClosed(t, raw)
	if n := g.Counts().Flooded; n != 1 {
		t.Errorf("flooded = %d", n)
	}
}

func TestWebSocketWithoutRecordsEnds(t *testing.T) {
	g := newRig(t, echo, func(c *Config) { c.Limits.Setup = 200 * time.Millisecond })
	_, raw, _, err := g.dialWebSocket(g.node())
	if err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	waitClosed(t, raw)
	if d := time.Since(begun); d > 5*time.Second {
		t.Errorf("closed after %v", d)
	}
}
