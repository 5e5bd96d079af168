// Package sshaction answers the question that a device asks about an incoming Tailscale SSH connection whose rule says "check": may it go on?
//
// The device (not the one that connects) asks over Noise and holds the connection meanwhile. If a person approved the same pair and local
// user within the rule's check period, the answer is yes at once. Else a request is stored, the connecting person is shown its address as a
// banner, and the device is sent to a second address that answers when somebody has decided.
//
// The package never decides who may connect at all: the rules that it looks at are those of the policy as the device has them.
package sshaction

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/control/noise"
	"github.com/signalbox-net/signalbox/control/register"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// Config configures a Server. Every field but Log and Now is required.
type Config struct {
	Store     *db.Store
	Replica   *tailnet.Replica
	Ledger    *tailnet.Ledger
	Registrar *register.Registrar // tells when a request was decided
	ServerURL string              // base of the addresses that people open
	Log       *slog.Logger        // nil discards
	Now       func() time.Time    // nil means time.Now
}

// A Server answers SSH checks.
type Server struct{ cfg Config }

// New returns a Server.
func New(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Server{cfg}
}

// Routes mounts the paths inside Noise.
func (s *Server) Routes(r chi.Router) {
	r.Get("/machine/ssh/action/{src}/to/{dst}", s.ask)
	r.Get("/machine/ssh/action/{src}/to/{dst}/wait/{id}", s.wait)
}

// a check is one connection: from whom, to whom, as whom, and the rule that asks for it.
type check struct {
	src, dst *tailnet.Node
	user     string // local user at dst
	rule     *acl.SSHRule
}

// errUnknown answers everything that is not the asker's business alike.
var errUnknown = errors.New("node not found")

// parse finds the check that a request names. The asker must be the destination.
func (s *Server) parse(r *http.Request) (*check, error) {
	conn, ok := noise.Peer(r.Context())
	if !ok {
		return nil, errUnknown
	}
	snap := s.cfg.Replica.Current()
	src, dst := nodeParam(r, snap, "src"), nodeParam(r, snap, "dst")
	if src == nil || dst == nil || dst.MachineKey != conn.Machine || dst.Dead() {
		return nil, errUnknown
	}
	c := &check{src: src, dst: dst, user: r.URL.Query().Get("local_user")}
	if len(c.user) > 256 {
		return nil, errUnknown
	}
	c.rule = findRule(snap.Access().SSH(dst.Slot), src, c.user)
	return c, nil
}

func nodeParam(r *http.Request, snap *tailnet.Snapshot, name string) *tailnet.Node {
	id, err := strconv.ParseInt(chi.URLParam(r, name), 10, 64)
	if err != nil {
		return nil
	}
	return snap.Node(tailcfg.NodeID(id))
}

// findRule is the first check rule by which src may become user; nil when the policy has none (any more).
func findRule(rules *acl.SSH, src *tailnet.Node, user string) *acl.SSHRule {
	for i := range rules.Rules {
		r := &rules.Rules[i]
		if r.Check && !src.Dead() && hasPrincipal(r.Principals, src) && mapsTo(r.SSHUsers, user) {
			return r
		}
	}
	return nil
}

func hasPrincipal(list []*tailcfg.SSHPrincipal, n *tailnet.Node) bool {
	for _, p := range list {
		if p.Any {
			return true
		}
		if ip, err := netip.ParseAddr(p.NodeIP); err == nil && (ip == n.IPv4 || ip == n.IPv6) {
			return true
		}
	}
	return false
}

// mapsTo reports whether a rule's users lead to the local user. "=" stands for the asked name; a wildcard never leads to root.
func mapsTo(users map[string]string, local string) bool {
	for asked, to := range users {
		switch {
		case to == "":
		case to == local && to != "=":
			return true
		case to == "=" && (asked == local || asked == "*" && local != "root"):
			return true
		}
	}
	return false
}

// detail is what a stored request keeps of its check; the page and the audit log show it.
type detail struct {
	Src       tailcfg.NodeID `json:"src"`
	Dst       tailcfg.NodeID `json:"dst"`
	SrcName   string         `json:"srcName"`
	DstName   string         `json:"dstName"`
	LocalUser string         `json:"localUser"`
	Seconds   int64          `json:"checkPeriodSeconds"` // how long an approval stays good; 0 is for this connection only
}

func (c *check) detail() detail {
	d := detail{Src: c.src.ID, Dst: c.dst.ID, SrcName: c.src.GivenName, DstName: c.dst.GivenName, LocalUser: c.user}
	if !c.rule.CheckAlways {
		d.Seconds = int64(c.rule.CheckPeriod / time.Second)
	}
	return d
}

func (d *detail) same(o *detail) bool {
	return d.Src == o.Src && d.Dst == o.Dst && d.LocalUser == o.LocalUser
}

func (s *Server) ask(w http.ResponseWriter, r *http.Request) {
	c, err := s.parse(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusUnauthorized)
		return
	}
	if c.rule == nil {
		write(w, &tailcfg.SSHAction{Reject: true, Message: "the policy does not let you in\r\n"})
		return
	}
	if ok, err := s.passed(r.Context(), c); err != nil {
		s.fail(w, err)
		return
	} else if ok {
		write(w, accepted(c.rule))
		return
	}
	id, err := s.store(r, c)
	if errors.Is(err, db.ErrLimit) {
		write(w, &tailcfg.SSHAction{Reject: true, Message: "too many checks are waiting; try again in a few minutes\r\n"})
		return
	}
	if err != nil {
		s.fail(w, err)
		return
	}
	page := strings.TrimSuffix(s.cfg.ServerURL, "/") + "/auth/" + id
	hold := url.URL{Scheme: "https", Host: r.Host, Path: r.URL.Path + "/wait/" + id, RawQuery: url.Values{"local_user": {c.user}}.Encode()}
	write(w, &tailcfg.SSHAction{
		Message:         fmt.Sprintf("# This connection needs an approval:\r\n# %s\r\n", page),
		HoldAndDelegate: hold.String(),
	})
}

// accepted is the rule's answer once a check has passed.
func accepted(rule *acl.SSHRule) *tailcfg.SSHAction {
	if rule.Accepted != nil {
		return rule.Accepted
	}
	return &tailcfg.SSHAction{Accept: true, AllowAgentForwarding: true, AllowLocalPortForwarding: true, AllowRemotePortForwarding: true}
}

// passed reports whether an approval of the same check is still good.
func (s *Server) passed(ctx context.Context, c *check) (bool, error) {
	if c.rule.CheckAlways {
		return false, nil
	}
	want, now, found := c.detail(), s.cfg.Now(), false
	err := s.cfg.Store.View(ctx, func(r *db.Reader) error {
		rows, err := r.In(s.cfg.Ledger.Tailnet()).AuthRequests()
		for _, row := range rows {
			var d detail
			if row.Kind == db.AuthRequestSSH && row.State == db.AuthRequestApproved && row.Node == c.dst.ID && json.Unmarshal(row.Detail, &d) == nil &&
				d.same(&want) && d.Seconds > 0 && now.Before(row.Expires) && now.Before(row.Expires.Add(time.Duration(want.Seconds-d.Seconds)*time.Second)) {
				found = true
			}
		}
		return err
	})
	return found, err
}

// store keeps a request that waits for a person and returns its id.
func (s *Server) store(r *http.Request, c *check) (string, error) {
	conn, _ := noise.Peer(r.Context())
	var raw [register.IDBytes]byte
	if _, err := rand.Read(raw[:]); err != nil {
		return "", err
	}
	id := register.EncodeID(raw)
	d, err := json.Marshal(c.detail())
	if err != nil {
		return "", err
	}
	actor := db.Actor{Kind: "node", ID: int64(c.dst.ID), Name: c.dst.GivenName, Source: conn.Remote.Addr().String()}
	_, err = s.cfg.Ledger.Do(r.Context(), actor, func(tx *db.Tx) error {
		return tx.CreateAuthRequest(&db.AuthRequest{
			Hash: register.HashID(id), Kind: db.AuthRequestSSH, MachineKey: c.dst.MachineKey, NodeKey: c.dst.NodeKey, Hostinfo: c.src.State.Hostinfo,
			Source: conn.Remote.Addr().String(), Created: tx.Now(), Expires: tx.Now().Add(register.LoginTTL), Followed: true, Node: c.dst.ID,
			User: c.src.User, Detail: d,
		})
	})
	return id, err
}

// wait answers when the request was decided.
func (s *Server) wait(w http.ResponseWriter, r *http.Request) {
	c, err := s.parse(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusUnauthorized)
		return
	}
	id, ok := register.ParseID(chi.URLParam(r, "id"))
	if !ok || c.rule == nil {
		write(w, &tailcfg.SSHAction{Reject: true, Message: "this check is not valid any more\r\n"})
		return
	}
	row, err := s.request(r.Context(), id)
	if err != nil {
		s.undecided(w, err)
		return
	}
	moved, stop := s.cfg.Registrar.Watch(row.ID)
	defer stop()
	for {
		if row, err = s.request(r.Context(), id); err != nil {
			s.undecided(w, err)
			return
		}
		if a := verdict(c, row); a != nil {
			write(w, a)
			return
		}
		end := time.NewTimer(row.Expires.Sub(s.cfg.Now()))
		select {
		case <-moved:
		case <-end.C:
		case <-r.Context().Done():
			end.Stop()
			return
		}
		end.Stop()
	}
}

// verdict is what a person decided; nil while nobody has.
func verdict(c *check, row *db.AuthRequest) *tailcfg.SSHAction {
	want := c.detail()
	var d detail
	switch {
	case json.Unmarshal(row.Detail, &d) != nil || !d.same(&want):
		return &tailcfg.SSHAction{Reject: true, Message: "this check is not valid any more\r\n"}
	case row.State == db.AuthRequestApproved:
		return accepted(c.rule)
	case row.State == db.AuthRequestRejected:
		return &tailcfg.SSHAction{Reject: true, Message: "the connection was rejected\r\n"}
	}
	return nil
}

func (s *Server) undecided(w http.ResponseWriter, err error) {
	if errors.Is(err, db.ErrNotFound) {
		write(w, &tailcfg.SSHAction{Reject: true, Message: "this check has expired; connect again\r\n"})
		return
	}
	s.fail(w, err)
}

func (s *Server) request(ctx context.Context, id string) (row *db.AuthRequest, err error) {
	err = s.cfg.Store.View(ctx, func(r *db.Reader) error {
		row, err = r.In(s.cfg.Ledger.Tailnet()).AuthRequestByHash(register.HashID(id))
		return err
	})
	return row, err
}

// fail answers a fault of the storage: the device asks again.
func (s *Server) fail(w http.ResponseWriter, err error) {
	s.cfg.Log.Error("ssh check", "err", err)
	w.Header().Set("Retry-After", "5")
	http.Error(w, "the check could not be stored", http.StatusServiceUnavailable)
}

func write(w http.ResponseWriter, a *tailcfg.SSHAction) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(a)
}
