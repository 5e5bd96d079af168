package apiv1

import (
	"net/http"
	"slices"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/control/register"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// authRegister makes a waiting device a node of a user.
func (s *server) authRegister(w http.ResponseWriter, r *http.Request) (any, error) {
	var req AuthRegisterRequest
	if err := decode(w, r, &req, maxBody, false); err != nil {
		return nil, err
	}
	return s.register(r, "body.user", req.User, "body.authId", req.AuthID)
}

// registerNode is authRegister as it was before 0.30, by query parameters.
func (s *server) registerNode(r *http.Request) (any, error) {
	q := r.URL.Query()
	return s.register(r, "query.user", q.Get("user"), "query.key", q.Get("key"))
}

func (s *server) register(r *http.Request, userAt, userRef, idAt, id string) (any, error) {
	id, err := authID(idAt, id)
	if err != nil {
		return nil, err
	}
	u, err := findUser(s.Replica.Current(), userAt, userRef)
	if err != nil {
		return nil, err
	}
	n, err := s.Register.Approve(r.Context(), actor(r), id, u.ID)
	if err != nil {
		return nil, err
	}
	s.catchUp(r)
	return NodeResponse{nodeOf(n, ownerOf(s.Replica.Current(), n.User), nil)}, nil
}

func (s *server) authApprove(w http.ResponseWriter, r *http.Request) (any, error) {
	return s.decide(w, r, s.Register.Confirm)
}

func (s *server) authReject(w http.ResponseWriter, r *http.Request) (any, error) {
	return s.decide(w, r, s.Register.Reject)
}

func (s *server) decide(w http.ResponseWriter, r *http.Request, verdict decision) (any, error) {
	var req AuthRequest
	if err := decode(w, r, &req, maxBody, false); err != nil {
		return nil, err
	}
	id, err := authID("body.authId", req.AuthID)
	if err != nil {
		return nil, err
	}
	if err := verdict(r.Context(), actor(r), id); err != nil {
		return nil, err
	}
	s.catchUp(r)
	return EmptyResponse{}, nil
}

// authID takes the id in an AuthURL as people paste it.
func authID(location, s string) (string, error) {
	if s == "" {
		return "", badField(location, "is required")
	}
	id, ok := register.ParseID(s)
	if !ok {
		return "", badField(location, "must be the 32 characters at the end of the address that the device printed")
	}
	return id, nil
}

// debugNode invents a device that waits to be registered under the given id,
// and answers with the node that it would become.
func (s *server) debugNode(w http.ResponseWriter, r *http.Request) (any, error) {
	var req DebugNodeRequest
	if err := decode(w, r, &req, maxBody, false); err != nil {
		return nil, err
	}
	id, err := authID("body.key", req.Key)
	if err != nil {
		return nil, err
	}
	if err := text("body.name", req.Name, 255); err != nil {
		return nil, err
	}
	routes, err := s.routeList("body.routes", req.Routes)
	if err != nil {
		return nil, err
	}
	u, err := findUser(s.Replica.Current(), "body.user", req.User)
	if err != nil {
		return nil, err
	}
	a := &db.AuthRequest{
		Hash: register.HashID(id), Kind: db.AuthRequestRegister, MachineKey: key.NewMachine().Public(), NodeKey: key.NewNode().Public(),
		Hostinfo: &tailcfg.Hostinfo{Hostname: req.Name, OS: "debug", RoutableIPs: slices.Clone(routes)}, Cap: tailcfg.CurrentCapabilityVersion,
		Source: actor(r).Source, State: db.AuthRequestPending,
	}
	err = s.write(r, func(tx *db.Tx) error {
		a.ID, a.Tailnet, a.Created, a.Expires = 0, tx.Tailnet(), tx.Now(), tx.Now().Add(register.LoginTTL)
		if err := tx.CreateAuthRequest(a); err != nil {
			return taken(err, "this id is in use already")
		}
		return tx.Audit("debug.node", "authrequest", nil, a.Hostinfo)
	})
	if err != nil {
		return nil, err
	}
	n := &db.Node{
		MachineKey: a.MachineKey, NodeKey: a.NodeKey, User: u.ID, Hostname: req.Name, GivenName: tailnet.Label(req.Name, 0), RegisterMethod: "cli",
		Created: a.Created, State: db.NodeState{Hostinfo: a.Hostinfo, Cap: a.Cap},
	}
	return NodeResponse{nodeOf(n, u, nil)}, nil
}
