package derp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"syscall"
	"time"

	"tailscale.com/tailcfg"
)

// Limits of one fetch.
const (
	fetchConnect   = 5 * time.Second
	fetchTotal     = 10 * time.Second
	maxMapBytes    = 4 << 20
	fetchRedirects = 3
)

// fetcher gets DERP maps from URLs of the configuration file. The addresses
// that a name resolves to are checked when they are dialled, so a name cannot
// lead to the machine itself or to a cloud's metadata service.
type fetcher struct {
	refuse func(netip.Addr) bool // nil refuses no more
}

// CheckMapURL accepts https anywhere and http only from this machine.
func CheckMapURL(s string) error {
	u, err := url.Parse(s)
	if err != nil {
		return err
	}
	switch {
	case u.Hostname() == "":
		return fmt.Errorf("%q has no host", s)
	case u.Scheme == "https":
	case u.Scheme == "http" && isLocalHost(u.Hostname()):
	default:
		return fmt.Errorf("%q: a DERP map is fetched by https (by http only from this machine)", s)
	}
	return nil
}

func isLocalHost(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

// metadataV6 is the instance metadata service of one large cloud; its IPv4
// sibling is link-local.
var metadataV6 = netip.MustParseAddr("fd00:ec2::254")

var errRefusedAddress = errors.New("the name leads to an address that is not allowed")

// get fetches and checks one map.
func (f *fetcher) get(ctx context.Context, rawURL string) (*tailcfg.DERPMap, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTotal)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, rawURL, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	res, err := f.client(u).Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the answer is %s", res.Status)
	}
	data, err := io.ReadAll(io.LimitReader(res.Body, maxMapBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxMapBytes {
		return nil, fmt.Errorf("the answer has more than %d bytes", maxMapBytes)
	}
	return parseRemoteMap(data)
}

// client is for one URL: whether loopback is meant depends on its host.
func (f *fetcher) client(u *url.URL) *http.Client {
	local := isLocalHost(u.Hostname())
	dialer := &net.Dialer{
		Timeout: fetchConnect,
		Control: func(_, address string, _ syscall.RawConn) error {
			ap, err := netip.ParseAddrPort(address)
			if err != nil {
				return err
			}
			if a := ap.Addr().Unmap(); !f.allowed(a, local) {
				return fmt.Errorf("%v: %w", a, errRefusedAddress)
			}
			return nil
		},
	}
	return &http.Client{
		Transport: &http.Transport{
			DialContext:            dialer.DialContext,
			TLSHandshakeTimeout:    fetchConnect,
			MaxResponseHeaderBytes: 32 << 10,
			DisableKeepAlives:      true,
			ForceAttemptHTTP2:      true,
		},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if len(via) > fetchRedirects {
				return fmt.Errorf("more than %d redirects", fetchRedirects)
			}
			if r.URL.Scheme != u.Scheme || r.URL.Host != u.Host {
				return fmt.Errorf("redirect to another host")
			}
			return nil
		},
	}
}

// allowed judges an address about to be dialled. Private addresses are
// allowed: the URL stands in the configuration file.
func (f *fetcher) allowed(a netip.Addr, local bool) bool {
	if a.IsLoopback() {
		return local
	}
	if a.IsUnspecified() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.WithZone("") == metadataV6 {
		return false
	}
	return f.refuse == nil || !f.refuse(a)
}
