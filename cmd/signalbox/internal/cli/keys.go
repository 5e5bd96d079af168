package cli

import (
	"context"
	"encoding/json"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signalbox-net/signalbox/cmd/signalbox/internal/config"
)

// authKey is what the command line reads of the API's pre-auth keys.
type authKey struct {
	ID         string     `json:"id"`
	Key        string     `json:"key"`
	User       *user      `json:"user"`
	Reusable   bool       `json:"reusable"`
	Ephemeral  bool       `json:"ephemeral"`
	Used       bool       `json:"used"`
	Expiration *time.Time `json:"expiration"`
	CreatedAt  *time.Time `json:"createdAt"`
	ACLTags    []string   `json:"aclTags"`
}

// expiration turns --expiration into a moment.
func (m *program) expiration(s string) (time.Time, error) {
	d, err := config.ParseDuration(s)
	if err != nil || d == 0 {
		return time.Time{}, usagef("--expiration: want a duration such as 30m, 24h or 90d, got %q", s)
	}
	return m.Now().UTC().Add(d), nil
}

func (m *program) preauthkeysCmd() *cobra.Command {
	g := m.group("preauthkeys", "Manage the keys that let devices join without a person", "preauthkey", "authkey", "pre")
	g.AddCommand(m.preauthkeysCreate(), m.preauthkeysList(), m.preauthkeysEnd("expire", "Expire a key: no device joins by it any more", "revoke", "exp", "e"),
		m.preauthkeysEnd("delete", "Delete a key", "del", "rm", "d"))
	return g
}

func (m *program) preauthkeysCreate() *cobra.Command {
	var owner, expires string
	var req struct {
		User       string    `json:"user"`
		Reusable   bool      `json:"reusable"`
		Ephemeral  bool      `json:"ephemeral"`
		Expiration time.Time `json:"expiration"`
		ACLTags    []string  `json:"aclTags"`
	}
	cmd := m.verb("create", "Create a key", 0, func(cmd *cobra.Command, _ []string) (err error) {
		if req.Expiration, err = m.expiration(expires); err != nil {
			return err
		}
		if owner == "" && len(req.ACLTags) == 0 {
			return usagef("a key needs an owner: --user, --tags, or both")
		}
		c, err := m.client()
		if err != nil {
			return err
		}
		if req.User, err = userID(cmd.Context(), c, owner); err != nil {
			return err
		}
		if req.ACLTags == nil {
			req.ACLTags = []string{}
		}
		var k authKey
		raw, err := c.get(cmd.Context(), "POST", "/preauthkey", req, "preAuthKey", &k)
		if err != nil {
			return err
		}
		return m.print(raw, k.Key)
	})
	cmd.Long = "The key is shown this once. Its nodes belong to --user, or to --tags."
	cmd.Aliases = []string{"c", "new"}
	cmd.Flags().StringVarP(&owner, "user", "u", "", "id or name of the user who owns the key")
	cmd.Flags().BoolVar(&req.Reusable, "reusable", false, "let more than one device use it")
	cmd.Flags().BoolVar(&req.Ephemeral, "ephemeral", false, "its nodes are deleted when they stay away")
	cmd.Flags().StringVarP(&expires, "expiration", "e", "1h", "how long it can be used, as in 30m, 24h, 90d")
	cmd.Flags().StringSliceVar(&req.ACLTags, "tags", nil, "tags of its nodes, as in tag:web,tag:prod")
	return cmd
}

// userID accepts a name where Headscale wants an id. No user is id 0.
func userID(ctx context.Context, c *client, s string) (string, error) {
	if s == "" {
		return "0", nil
	}
	if checkID("", s) == nil {
		return s, nil
	}
	u, err := findUser(ctx, c, "", s)
	if err != nil {
		return "", err
	}
	return u.ID, nil
}

func (m *program) preauthkeysList() *cobra.Command {
	var owner string
	cmd := m.verb("list", "List the keys", 0, func(cmd *cobra.Command, _ []string) error {
		c, err := m.client()
		if err != nil {
			return err
		}
		want, err := userID(cmd.Context(), c, owner)
		if err != nil {
			return err
		}
		var raws []json.RawMessage
		if _, err := c.get(cmd.Context(), "GET", "/preauthkey", nil, "preAuthKeys", &raws); err != nil {
			return err
		}
		kept, rows := []json.RawMessage{}, [][]string(nil)
		for _, raw := range raws {
			var k authKey
			if err := json.Unmarshal(raw, &k); err != nil {
				return err
			}
			name := ""
			if k.User != nil {
				name = k.User.Name
			}
			if owner != "" && (k.User == nil || k.User.ID != want) {
				continue
			}
			kept = append(kept, raw)
			rows = append(rows, []string{k.ID, k.Key, yesNo(k.Reusable), yesNo(k.Ephemeral), yesNo(k.Used),
				showTime(k.Expiration), showTime(k.CreatedAt), name, strings.Join(k.ACLTags, ", ")})
		}
		return m.printTable(kept, []string{"ID", "Key", "Reusable", "Ephemeral", "Used", "Expiration", "Created", "Owner", "Tags"}, rows)
	})
	cmd.Aliases = []string{"ls", "show"}
	cmd.Flags().StringVarP(&owner, "user", "u", "", "only the keys of this user (id or name)")
	return cmd
}

// preauthkeysEnd is expire or delete.
func (m *program) preauthkeysEnd(name, short string, aliases ...string) *cobra.Command {
	var id string
	cmd := m.verb(name, short, 0, func(cmd *cobra.Command, _ []string) error {
		if err := checkID("--id", id); err != nil {
			return err
		}
		c, err := m.client()
		if err != nil {
			return err
		}
		var raw json.RawMessage
		if name == "expire" {
			err = c.call(cmd.Context(), "POST", "/preauthkey/expire", map[string]string{"id": id}, &raw)
		} else {
			err = c.call(cmd.Context(), "DELETE", "/preauthkey?id="+id, nil, &raw)
		}
		if err != nil {
			return err
		}
		return m.print(raw, "Key "+name+"d")
	})
	cmd.Aliases = aliases
	cmd.Flags().StringVarP(&id, "id", "i", "", "the key's id")
	required(cmd, "id")
	return cmd
}

func (m *program) apikeysCmd() *cobra.Command {
	g := m.group("apikeys", "Manage the keys of the HTTP API", "apikey", "api")
	g.AddCommand(m.apikeysCreate(), m.apikeysList(), m.apikeysEnd("expire", "Expire a key", "revoke", "exp", "e"),
		m.apikeysEnd("delete", "Delete a key", "remove", "del"))
	return g
}

func (m *program) apikeysCreate() *cobra.Command {
	var expires string
	cmd := m.verb("create", "Create a key", 0, func(cmd *cobra.Command, _ []string) error {
		at, err := m.expiration(expires)
		if err != nil {
			return err
		}
		c, err := m.client()
		if err != nil {
			return err
		}
		var secret string
		raw, err := c.get(cmd.Context(), "POST", "/apikey", map[string]any{"expiration": at}, "apiKey", &secret)
		if err != nil {
			return err
		}
		return m.print(raw, secret)
	})
	cmd.Long = "The key is shown this once. If it is lost, expire it and create another."
	cmd.Aliases = []string{"c", "new"}
	cmd.Flags().StringVarP(&expires, "expiration", "e", "90d", "how long it can be used, as in 30m, 24h, 90d")
	return cmd
}

func (m *program) apikeysList() *cobra.Command {
	cmd := m.verb("list", "List the keys", 0, func(cmd *cobra.Command, _ []string) error {
		c, err := m.client()
		if err != nil {
			return err
		}
		var keys []struct {
			ID, Prefix                      string
			Expiration, CreatedAt, LastSeen *time.Time
		}
		raw, err := c.get(cmd.Context(), "GET", "/apikey", nil, "apiKeys", &keys)
		if err != nil {
			return err
		}
		var rows [][]string
		for _, k := range keys {
			rows = append(rows, []string{k.ID, k.Prefix, showTime(k.Expiration), showTime(k.CreatedAt), showTime(k.LastSeen)})
		}
		return m.printTable(raw, []string{"ID", "Prefix", "Expiration", "Created", "Last seen"}, rows)
	})
	cmd.Aliases = []string{"ls", "show"}
	return cmd
}

// apikeysEnd is expire or delete.
func (m *program) apikeysEnd(name, short string, aliases ...string) *cobra.Command {
	var id, prefix string
	cmd := m.verb(name, short, 0, func(cmd *cobra.Command, _ []string) error {
		if (id == "") == (prefix == "") {
			return usagef("name the key by one of --id and --prefix")
		}
		body := map[string]string{"prefix": keyPrefix(prefix)}
		if id != "" {
			if err := checkID("--id", id); err != nil {
				return err
			}
			body = map[string]string{"id": id}
		}
		c, err := m.client()
		if err != nil {
			return err
		}
		var raw json.RawMessage
		switch {
		case name == "expire":
			err = c.call(cmd.Context(), "POST", "/apikey/expire", body, &raw)
		case id != "":
			err = c.call(cmd.Context(), "DELETE", "/apikey?id="+id, nil, &raw)
		default:
			err = c.call(cmd.Context(), "DELETE", "/apikey/"+url.PathEscape(keyPrefix(prefix)), nil, &raw)
		}
		if err != nil {
			return err
		}
		return m.print(raw, "Key "+name+"d")
	})
	cmd.Aliases = aliases
	cmd.Flags().StringVarP(&id, "id", "i", "", "the key's number in the list")
	cmd.Flags().StringVarP(&prefix, "prefix", "p", "", "the key's prefix: tskey-api-<id>, <id>, or the masked form")
	return cmd
}

// keyPrefix takes what people paste: the id alone, tskey-api-<id>, the masked
// form, or even the whole key, whose secret then stays here.
func keyPrefix(s string) string {
	s = strings.TrimPrefix(s, "tskey-api-")
	id, _, _ := strings.Cut(s, "-")
	return id
}
