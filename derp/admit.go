package derp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"

	"tailscale.com/tailcfg"
)

// derpserver has no admission callback, only the URL of an admission
// controller that it asks with http.DefaultClient. Ours has a scheme of its
// own, served inside the process; the connection that is being judged travels
// in the request's context.
const (
	admissionScheme = "signalbox-derp"
	admissionURL    = admissionScheme + "://admit/"
)

// registerAdmission teaches http.DefaultTransport the scheme, once per
// process: RegisterProtocol panics on a repetition.
var registerAdmission = sync.OnceValue(func() error {
	t, ok := http.DefaultTransport.(*http.Transport)
	if !ok {
		return fmt.Errorf("register relay admission: http.DefaultTransport is a %T", http.DefaultTransport)
	}
	t.RegisterProtocol(admissionScheme, admission{})
	return nil
})

type connContextKey struct{}

// admission answers derpserver's question about one connection.
type admission struct{}

var errNotRelayed = errors.New("relay admission: not a relay connection")

// RoundTrip implements http.RoundTripper. derpserver has opened the client's
// box by now, so the key in the request is proved. Whatever is not clearly
// allowed is an error or a refusal; derpserver treats both alike.
func (admission) RoundTrip(r *http.Request) (*http.Response, error) {
	defer r.Body.Close()
	c, ok := r.Context().Value(connContextKey{}).(*conn)
	if !ok {
		return nil, errNotRelayed
	}
	var req tailcfg.DERPAdmitClientRequest
	if err := json.NewDecoder(io.LimitReader(r.Body, maxVerifyBody)).Decode(&req); err != nil {
		return nil, fmt.Errorf("relay admission: %w", err)
	}
	body, err := json.Marshal(tailcfg.DERPAdmitClientResponse{Allow: c.srv.admit(c, req.NodePublic)})
	if err != nil {
		return nil, fmt.Errorf("relay admission: %w", err)
	}
	return &http.Response{
		StatusCode: http.StatusOK, Status: "200 OK",
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header:        http.Header{"Content-Type": {"application/json"}},
		Body:          io.NopCloser(bytes.NewReader(body)),
		ContentLength: int64(len(body)),
		Request:       r,
	}, nil
}
