package apiv1

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// Lifetimes of keys for which the caller names none.
const (
	authKeyLife = time.Hour
	apiKeyLife  = 90 * 24 * time.Hour
)

func (s *server) createPreAuthKey(w http.ResponseWriter, r *http.Request) (any, error) {
	var req CreatePreAuthKeyRequest
	if err := decode(w, r, &req, maxBody, false); err != nil {
		return nil, err
	}
	tags, err := tagList("body.aclTags", req.ACLTags)
	if err != nil {
		return nil, err
	}
	if req.User == 0 && len(tags) == 0 {
		return nil, badField("body.user", "is required for a key without aclTags")
	}
	expires, err := future("body.expiration", req.Expiration, s.now(), authKeyLife)
	if err != nil {
		return nil, err
	}
	secret, keyID, hash := db.NewKey(db.KeyAuth)
	var out *PreAuthKey
	err = s.write(r, func(tx *db.Tx) error {
		var owner *db.User
		if req.User != 0 {
			if owner, err = tx.User(tailcfg.UserID(req.User)); errors.Is(err, db.ErrNotFound) {
				return badField("body.user", "no user has the id %d", req.User)
			} else if err != nil {
				return err
			}
		}
		k := &db.AuthKey{
			KeyID: keyID, Hash: hash, Tailnet: tx.Tailnet(), User: tailcfg.UserID(req.User), Reusable: req.Reusable, Ephemeral: req.Ephemeral,
			Preauthorized: true, Tags: tags, Expires: expires, Created: tx.Now(),
		}
		if err := tx.CreateAuthKey(k); errors.Is(err, db.ErrLimit) {
			return conflict("the user has %d auth keys that work: expire or delete some", db.MaxLiveKeys)
		} else if err != nil {
			return err
		}
		out = authKeyOf(k, owner)
		return tx.Audit("authkey.create", authKeyTarget(k), nil, out)
	})
	if err != nil {
		return nil, err
	}
	out.Key = secret
	return PreAuthKeyResponse{out}, nil
}

// listPreAuthKeys lists all keys, or those of ?user= as versions before 0.27
// asked for them.
func (s *server) listPreAuthKeys(r *http.Request) (any, error) {
	snap := s.Replica.Current()
	var of tailcfg.UserID
	if ref := r.URL.Query().Get("user"); ref != "" {
		u, err := findUser(snap, "query.user", ref)
		if err != nil {
			return nil, err
		}
		of = u.ID
	}
	keys, err := s.authKeys(r)
	if err != nil {
		return nil, err
	}
	out := PreAuthKeysResponse{PreAuthKeys: []*PreAuthKey{}}
	for _, k := range keys {
		if of == 0 || k.User == of {
			out.PreAuthKeys = append(out.PreAuthKeys, authKeyOf(k, snap.User(k.User)))
		}
	}
	return out, nil
}

func (s *server) authKeys(r *http.Request) (keys []*db.AuthKey, err error) {
	err = s.view(r, func(rd *db.Reader) error {
		keys, err = rd.AuthKeys()
		return err
	})
	return keys, err
}

func (s *server) expirePreAuthKey(w http.ResponseWriter, r *http.Request) (any, error) {
	var req ExpirePreAuthKeyRequest
	if err := decode(w, r, &req, maxBody, false); err != nil {
		return nil, err
	}
	if req.ID <= 0 && req.Key == "" {
		return nil, badField("body.id", "is required")
	}
	err := s.write(r, func(tx *db.Tx) error {
		k, err := findAuthKey(tx, int64(req.ID), req.Key)
		if err != nil {
			return err
		}
		before := authKeyOf(k, nil)
		if !k.Expires.IsZero() && k.Expires.Before(tx.Now()) {
			return nil
		}
		k.Expires = tx.Now()
		if err := tx.PutAuthKey(k); err != nil {
			return err
		}
		return tx.Audit("authkey.expire", authKeyTarget(k), before, authKeyOf(k, nil))
	})
	if err != nil {
		return nil, err
	}
	return EmptyResponse{}, nil
}

func (s *server) deletePreAuthKey(r *http.Request) (any, error) {
	id, err := queryID(r, "id")
	if err != nil {
		return nil, err
	}
	if id == 0 {
		return nil, badField("query.id", "is required")
	}
	err = s.write(r, func(tx *db.Tx) error {
		k, err := findAuthKey(tx, id, "")
		if err != nil {
			return err
		}
		if err := tx.DeleteAuthKey(k.ID); err != nil {
			return err
		}
		return tx.Audit("authkey.delete", authKeyTarget(k), authKeyOf(k, nil), nil)
	})
	if err != nil {
		return nil, err
	}
	return EmptyResponse{}, nil
}

func authKeyTarget(k *db.AuthKey) string { return fmt.Sprintf("authkey:%d (%s)", k.ID, k.KeyID) }

// findAuthKey finds a key by its row, else by any written form of the key.
func findAuthKey(tx *db.Tx, id int64, written string) (*db.AuthKey, error) {
	keys, err := tx.AuthKeys()
	if err != nil {
		return nil, err
	}
	keyID := keyIDOf(written)
	for _, k := range keys {
		if id > 0 && k.ID == id || id <= 0 && k.KeyID == keyID {
			return k, nil
		}
	}
	return nil, notFound("no such pre-auth key")
}

// keyIDOf takes the id out of any form in which people have a key: the whole
// secret, the masked form, the prefix, or the id alone.
func keyIDOf(s string) string {
	s = strings.TrimPrefix(strings.TrimPrefix(s, "tskey-auth-"), "tskey-api-")
	id, _, _ := strings.Cut(s, "-")
	return id
}

func (s *server) createAPIKey(w http.ResponseWriter, r *http.Request) (any, error) {
	var req CreateAPIKeyRequest
	if err := decode(w, r, &req, maxBody, true); err != nil {
		return nil, err
	}
	expires, err := future("body.expiration", req.Expiration, s.now(), apiKeyLife)
	if err != nil {
		return nil, err
	}
	secret, keyID, hash := db.NewKey(db.KeyAPI)
	err = s.write(r, func(tx *db.Tx) error {
		k := &db.APIKey{KeyID: keyID, Hash: hash, Tailnet: tx.Tailnet(), Expires: expires, Created: tx.Now()}
		if err := tx.CreateAPIKey(k); err != nil {
			return err
		}
		return tx.Audit("apikey.create", apiKeyTarget(k), nil, apiKeyOf(k))
	})
	if err != nil {
		return nil, err
	}
	return CreateAPIKeyResponse{APIKey: secret}, nil
}

func (s *server) listAPIKeys(r *http.Request) (any, error) {
	out := APIKeysResponse{APIKeys: []*APIKey{}}
	err := s.view(r, func(rd *db.Reader) error {
		keys, err := rd.APIKeys()
		for _, k := range keys {
			out.APIKeys = append(out.APIKeys, apiKeyOf(k))
		}
		return err
	})
	return out, err
}

func (s *server) expireAPIKey(w http.ResponseWriter, r *http.Request) (any, error) {
	var req ExpireAPIKeyRequest
	if err := decode(w, r, &req, maxBody, false); err != nil {
		return nil, err
	}
	if req.ID <= 0 && req.Prefix == "" {
		return nil, badField("body.prefix", "or id is required")
	}
	err := s.write(r, func(tx *db.Tx) error {
		k, err := findAPIKey(tx, int64(req.ID), req.Prefix)
		if err != nil {
			return err
		}
		before := apiKeyOf(k)
		if !k.Expires.IsZero() && k.Expires.Before(tx.Now()) {
			return nil
		}
		k.Expires = tx.Now()
		if err := tx.PutAPIKey(k); err != nil {
			return err
		}
		return tx.Audit("apikey.expire", apiKeyTarget(k), before, apiKeyOf(k))
	})
	if err != nil {
		return nil, err
	}
	return EmptyResponse{}, nil
}

// deleteAPIKey takes the key from ?id=, else from the path.
func (s *server) deleteAPIKey(r *http.Request) (any, error) {
	id, err := queryID(r, "id")
	if err != nil {
		return nil, err
	}
	prefix, err := pathText(r, "prefix")
	if err != nil {
		return nil, err
	}
	if id == 0 && prefix == "" {
		return nil, badField("query.id", "is required")
	}
	err = s.write(r, func(tx *db.Tx) error {
		k, err := findAPIKey(tx, id, prefix)
		if err != nil {
			return err
		}
		if err := tx.DeleteAPIKey(k.ID); err != nil {
			return err
		}
		return tx.Audit("apikey.delete", apiKeyTarget(k), apiKeyOf(k), nil)
	})
	if err != nil {
		return nil, err
	}
	return EmptyResponse{}, nil
}

func apiKeyTarget(k *db.APIKey) string { return fmt.Sprintf("apikey:%d (%s)", k.ID, k.KeyID) }

func findAPIKey(tx *db.Tx, id int64, written string) (*db.APIKey, error) {
	keys, err := tx.APIKeys()
	if err != nil {
		return nil, err
	}
	keyID := keyIDOf(written)
	for _, k := range keys {
		if id > 0 && k.ID == id || id <= 0 && k.KeyID == keyID {
			return k, nil
		}
	}
	return nil, notFound("no such API key")
}

// tagList checks tags and returns them sorted and each once.
func tagList(location string, in []string) ([]string, error) {
	const most = 64
	if len(in) > most {
		return nil, badField(location, "must not have more than %d tags", most)
	}
	out := make([]string, 0, len(in))
	for i, t := range in {
		at := location + "[" + strconv.Itoa(i) + "]"
		if len(t) > 128 {
			return nil, badField(at, "must not be longer than 128 bytes")
		}
		if err := tailcfg.CheckTag(t); err != nil {
			return nil, badField(at, "%s", err)
		}
		out = append(out, t)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// ownerOf is the person behind a node or key; nil for none.
func ownerOf(snap *tailnet.Snapshot, id tailcfg.UserID) *db.User {
	if id == 0 {
		return nil
	}
	return snap.User(id)
}
