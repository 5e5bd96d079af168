package apiv1

import (
	"net/netip"
	"time"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// optional is nil for the zero time.
func optional(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// list is never null.
func list[T ~string](in []T) []string {
	out := make([]string, len(in))
	for i, v := range in {
		out[i] = string(v)
	}
	return out
}

func prefixes(in []netip.Prefix) []string {
	out := make([]string, len(in))
	for i, p := range in {
		out[i] = p.String()
	}
	return out
}

// userOf renders a user; nil stays nil.
func userOf(u *db.User) *User {
	if u == nil {
		return nil
	}
	return &User{
		ID: ID(u.ID), Name: u.Name, CreatedAt: optional(u.Created), DisplayName: u.DisplayName, Email: u.Email,
		ProviderID: u.ProviderID, Provider: u.Provider, ProfilePicURL: u.ProfilePicURL,
	}
}

// authKeyOf renders a pre-auth key without its secret.
func authKeyOf(k *db.AuthKey, owner *db.User) *PreAuthKey {
	if k == nil {
		return nil
	}
	return &PreAuthKey{
		User: userOf(owner), ID: ID(k.ID), Key: "tskey-auth-" + k.KeyID + "-***", Reusable: k.Reusable, Ephemeral: k.Ephemeral,
		Used: k.Uses > 0, Expiration: optional(expiration(k.Expires, k.Revoked)), CreatedAt: optional(k.Created), ACLTags: list(k.Tags),
	}
}

func apiKeyOf(k *db.APIKey) *APIKey {
	return &APIKey{
		ID: ID(k.ID), Prefix: "tskey-api-" + k.KeyID, Expiration: optional(expiration(k.Expires, k.Revoked)),
		CreatedAt: optional(k.Created), LastSeen: optional(k.LastSeen),
	}
}

// expiration is when a key ends, or ended by being revoked: the shapes of this
// interface know no other end.
func expiration(expires, revoked time.Time) time.Time {
	if !revoked.IsZero() && (expires.IsZero() || revoked.Before(expires)) {
		return revoked
	}
	return expires
}

// nodeOf renders a node. owner is nil for a tagged one; key is the pre-auth key
// that it came in with, nil when there was none or it is gone.
func nodeOf(n *db.Node, owner *db.User, key *PreAuthKey) *Node {
	out := &Node{
		ID: ID(n.ID), MachineKey: n.MachineKey.String(), NodeKey: n.NodeKey.String(), DiscoKey: n.State.DiscoKey.String(),
		IPAddresses: []string{}, Name: n.Hostname, User: userOf(owner), LastSeen: optional(n.State.LastSeen), Expiry: optional(n.Expiry),
		PreAuthKey: key, CreatedAt: optional(n.Created), RegisterMethod: registerMethod(n.RegisterMethod), GivenName: n.GivenName,
		Online: n.State.Online, ApprovedRoutes: prefixes(n.ApprovedRoutes), AvailableRoutes: []string{}, Tags: list(n.Tags),
	}
	for _, a := range []netip.Addr{n.IPv4, n.IPv6} {
		if a.IsValid() {
			out.IPAddresses = append(out.IPAddresses, a.String())
		}
	}
	if h := n.State.Hostinfo; h != nil {
		out.AvailableRoutes = prefixes(h.RoutableIPs)
	}
	out.SubnetRoutes = prefixes((&tailnet.Node{Node: n}).Routes())
	if len(n.Tags) > 0 {
		out.User = &User{ID: TaggedUserID, Name: TaggedUserName}
	}
	return out
}

func registerMethod(m string) string {
	switch m {
	case "authkey":
		return RegisterAuthKey
	case "cli":
		return RegisterCLI
	case "oidc":
		return RegisterOIDC
	default:
		return RegisterUnspecified
	}
}
