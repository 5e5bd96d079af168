package noise

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"tailscale.com/control/controlhttp"
	"tailscale.com/net/netmon"
)

// The dialer of the stock client, over plain HTTP and over TLS (where it
// wants HTTP/1.1 although the server offers both).
func TestStockDialerConnects(t *testing.T) {
	g := newRig(t, echo, nil)
	secure := httptest.NewUnstartedServer(g.Server)
	secure.EnableHTTP2 = true
	secure.StartTLS()
	t.Cleanup(secure.Close)
	for name, addrs := range map[string]struct{ http, https string }{
		"http":  {g.addr, controlhttp.NoPort},
		"https": {"127.0.0.1:1", secure.Listener.Addr().String()},
	} {
		t.Run(name, func(t *testing.T) {
			host, httpPort, err := net.SplitHostPort(addrs.http)
			if err != nil {
				t.Fatal(err)
			}
			httpsPort := addrs.https
			if httpsPort != controlhttp.NoPort {
				_, httpsPort, _ = net.SplitHostPort(addrs.https)
			}
			k := g.node()
			d := &controlhttp.Dialer{
				Hostname:        host,
				HTTPPort:        httpPort,
				HTTPSPort:       httpsPort,
				MachineKey:      k,
				ControlKey:      g.priv.Public(),
				ProtocolVersion: currentVersion,
				NetMon:          netmon.NewStatic(),
				Logf:            t.Logf,
			}
			c, err := d.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			status, body := do(t, newClientConn(t, c), "POST", "/machine/map", strings.NewReader("{}"))
			if want := fmt.Sprintf("%s %d 2", k.Public(), currentVersion); status != http.StatusOK || body != want {
				t.Errorf("got %d %q, want %q", status, body, want)
			}
		})
	}
}
