package apiv1

import (
	"context"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/c2n"
	"github.com/signalbox-net/signalbox/db"
)

// Caller calls nodes, *c2n.Server.
type Caller interface {
	Echo(ctx context.Context, node tailcfg.NodeID) (time.Duration, error)
	Ping(ctx context.Context, node tailcfg.NodeID, ip netip.Addr, by tailcfg.PingType) (*tailcfg.PingResponse, error)
	Get(ctx context.Context, node tailcfg.NodeID, path string) (*c2n.Response, error)
}

// PingNodeRequest names what the node pings. Without an address it is the server that asks the node itself for a sign of life.
type PingNodeRequest struct {
	IP   string `json:"ip"`
	Type string `json:"type"` // one of c2n.PingTypes; "disco" when empty
}

// echo is the type of a ping without an address.
const echo = "echo"

// PingNodeResponse is how a ping went.
type PingNodeResponse struct {
	Type           string  `json:"type"` // "echo", or as in the request
	Seconds        float64 `json:"seconds"`
	IP             string  `json:"ip,omitempty"`
	NodeIP         string  `json:"nodeIp,omitempty"`
	NodeName       string  `json:"nodeName,omitempty"`
	Endpoint       string  `json:"endpoint,omitempty"`       // the way was direct, to this address
	PeerRelay      string  `json:"peerRelay,omitempty"`      // it led through this peer relay
	DERPRegion     int     `json:"derpRegion,omitempty"`     // it led through this region's relay
	DERPRegionCode string  `json:"derpRegionCode,omitempty"` //
	PeerAPIPort    uint16  `json:"peerApiPort,omitempty"`
	Error          string  `json:"error,omitempty"` // in the node's words
}

// pingNode has a node answer, or ping a peer.
func (s *server) pingNode(w http.ResponseWriter, r *http.Request) (any, error) {
	var req PingNodeRequest
	if err := decode(w, r, &req, maxBody, true); err != nil {
		return nil, err
	}
	ip, by, err := pingOf(&req)
	if err != nil {
		return nil, err
	}
	detail := map[string]string{"type": echo}
	if ip.IsValid() {
		detail = map[string]string{"type": string(by), "ip": ip.String()}
	}
	id, err := s.callee(r, "node.ping", detail)
	if err != nil {
		return nil, err
	}
	if !ip.IsValid() {
		took, err := s.Calls.Echo(r.Context(), id)
		if err != nil {
			return nil, err
		}
		return PingNodeResponse{Type: echo, Seconds: took.Seconds()}, nil
	}
	p, err := s.Calls.Ping(r.Context(), id, ip, by)
	if err != nil {
		return nil, err
	}
	return PingNodeResponse{
		Type: string(p.Type), Seconds: p.LatencySeconds, IP: p.IP, NodeIP: p.NodeIP, NodeName: p.NodeName, Endpoint: p.Endpoint, PeerRelay: p.PeerRelay,
		DERPRegion: p.DERPRegionID, DERPRegionCode: p.DERPRegionCode, PeerAPIPort: p.PeerAPIPort, Error: p.Err,
	}, nil
}

func pingOf(req *PingNodeRequest) (ip netip.Addr, by tailcfg.PingType, err error) {
	if req.IP == "" {
		if req.Type != "" && req.Type != echo {
			return ip, by, badField("body.ip", "is missing: a ping by %q needs the address of a peer", req.Type)
		}
		return ip, by, nil
	}
	if ip, err = netip.ParseAddr(req.IP); err != nil || ip.Zone() != "" {
		return ip, by, badField("body.ip", "must be an IP address")
	}
	if req.Type == "" {
		return ip, tailcfg.PingDisco, nil
	}
	i := slices.IndexFunc(c2n.PingTypes, func(t tailcfg.PingType) bool { return strings.EqualFold(string(t), req.Type) })
	if i < 0 {
		return ip, by, badField("body.type", "must be one of disco, TSMP, ICMP and peerapi")
	}
	return ip, c2n.PingTypes[i], nil
}

// CallNodeRequest names a path of the node's own diagnostics, one of c2n.Paths.
type CallNodeRequest struct {
	Path string `json:"path"`
}

// CallNodeResponse is what the node answered. A node that is too old for a path says 400.
type CallNodeResponse struct {
	Status      int     `json:"status"`
	ContentType string  `json:"contentType"`
	Body        string  `json:"body"`
	Seconds     float64 `json:"seconds"`
}

// callNode gets one page of a node's diagnostics.
func (s *server) callNode(w http.ResponseWriter, r *http.Request) (any, error) {
	var req CallNodeRequest
	if err := decode(w, r, &req, maxBody, false); err != nil {
		return nil, err
	}
	if !slices.Contains(c2n.Paths, req.Path) {
		return nil, badField("body.path", "must be one of %s", strings.Join(c2n.Paths, ", "))
	}
	id, err := s.callee(r, "node.c2n", map[string]string{"path": req.Path})
	if err != nil {
		return nil, err
	}
	res, err := s.Calls.Get(r.Context(), id, req.Path)
	if err != nil {
		return nil, err
	}
	body := string(res.Body)
	if !utf8.ValidString(body) {
		body = strings.ToValidUTF8(body, "\uFFFD")
	}
	return CallNodeResponse{Status: res.Status, ContentType: res.ContentType, Body: body, Seconds: res.Elapsed.Seconds()}, nil
}

// callee is the node that the path names. That somebody calls it is in the audit log before it is called.
func (s *server) callee(r *http.Request, action string, detail any) (tailcfg.NodeID, error) {
	id, err := pathID(r, "id")
	if err != nil {
		return 0, err
	}
	if s.Replica.Current().Node(tailcfg.NodeID(id)) == nil {
		return 0, noNode(id)
	}
	_, err = s.Ledger.Do(r.Context(), actor(r), func(tx *db.Tx) error { return tx.Audit(action, nodeTarget(tailcfg.NodeID(id)), nil, detail) })
	return tailcfg.NodeID(id), err
}
