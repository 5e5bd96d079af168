package cli

import (
	"encoding/json"
	"strings"

	"github.com/spf13/cobra"
)

const authIDHelp = "the last element of the URL that the device shows, or the whole URL"

// lastElement takes the id off an AuthURL; an id is left as it is. A URL copied
// from a page may have a query or a slash at its end.
func lastElement(s string) string {
	s, _, _ = strings.Cut(s, "?")
	s, _, _ = strings.Cut(s, "#")
	s = strings.TrimRight(strings.TrimSpace(s), "/")
	return s[strings.LastIndexByte(s, '/')+1:]
}

func (m *program) authCmd() *cobra.Command {
	g := m.group("auth", "Decide about devices and logins that wait for approval")
	g.AddCommand(m.authRegister(),
		m.authDecide("approve", "Approve a waiting request of a device that has its user", "Auth request approved"),
		m.authDecide("reject", "Reject a waiting request", "Auth request rejected"))
	return g
}

func (m *program) authRegister() *cobra.Command {
	var userName, authID string
	cmd := m.verb("register", "Register a waiting device for a user", 0, func(cmd *cobra.Command, _ []string) error {
		body := map[string]string{"user": userName, "authId": lastElement(authID)}
		return m.nodeVerb(cmd, "POST", "/auth/register", body, "Node NAME registered")
	})
	cmd.Flags().StringVarP(&userName, "user", "u", "", "name of the user who gets the node")
	cmd.Flags().StringVar(&authID, "auth-id", "", authIDHelp)
	required(cmd, "user", "auth-id")
	return cmd
}

func (m *program) authDecide(name, short, done string) *cobra.Command {
	var authID string
	cmd := m.verb(name, short, 0, func(cmd *cobra.Command, _ []string) error {
		c, err := m.client()
		if err != nil {
			return err
		}
		var raw json.RawMessage
		if err := c.call(cmd.Context(), "POST", "/auth/"+name, map[string]string{"authId": lastElement(authID)}, &raw); err != nil {
			return err
		}
		return m.print(raw, done)
	})
	cmd.Flags().StringVar(&authID, "auth-id", "", authIDHelp)
	required(cmd, "auth-id")
	return cmd
}
