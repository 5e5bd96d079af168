package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"strconv"
	"time"

	"github.com/spf13/cobra"
)

// user is what the command line reads of the API's users.
type user struct {
	ID          string     `json:"id"`
	Name        string     `json:"name"`
	DisplayName string     `json:"displayName"`
	Email       string     `json:"email"`
	CreatedAt   *time.Time `json:"createdAt"`
}

func (m *program) usersCmd() *cobra.Command {
	g := m.group("users", "Manage the users", "user", "namespace", "namespaces", "ns")
	g.AddCommand(m.usersCreate(), m.usersList(), m.usersRename(), m.usersDestroy())
	return g
}

func (m *program) usersCreate() *cobra.Command {
	var req struct {
		Name        string `json:"name"`
		DisplayName string `json:"displayName"`
		Email       string `json:"email"`
		PictureURL  string `json:"pictureUrl"`
	}
	cmd := m.verb("create NAME", "Create a user", 1, func(cmd *cobra.Command, args []string) error {
		c, err := m.client()
		if err != nil {
			return err
		}
		req.Name = args[0]
		raw, err := c.get(cmd.Context(), "POST", "/user", req, "user", nil)
		if err != nil {
			return err
		}
		return m.print(raw, "User created")
	})
	cmd.Aliases = []string{"c", "new"}
	cmd.Flags().StringVarP(&req.DisplayName, "display-name", "d", "", "name for people")
	cmd.Flags().StringVarP(&req.Email, "email", "e", "", "e-mail address")
	cmd.Flags().StringVarP(&req.PictureURL, "picture-url", "p", "", "URL of a picture")
	return cmd
}

func (m *program) usersList() *cobra.Command {
	var id, name, email string
	cmd := m.verb("list", "List the users", 0, func(cmd *cobra.Command, _ []string) error {
		c, err := m.client()
		if err != nil {
			return err
		}
		q := url.Values{}
		for k, v := range map[string]string{"id": id, "name": name, "email": email} {
			if v != "" {
				q.Set(k, v)
			}
		}
		var users []user
		raw, err := c.get(cmd.Context(), "GET", "/user?"+q.Encode(), nil, "users", &users)
		if err != nil {
			return err
		}
		var rows [][]string
		for _, u := range users {
			rows = append(rows, []string{u.ID, u.DisplayName, u.Name, u.Email, showTime(u.CreatedAt)})
		}
		return m.printTable(raw, []string{"ID", "Name", "Username", "Email", "Created"}, rows)
	})
	cmd.Aliases = []string{"ls", "show"}
	cmd.Flags().StringVarP(&id, "identifier", "i", "", "only the user with this id")
	cmd.Flags().StringVarP(&name, "name", "n", "", "only the user of this name")
	cmd.Flags().StringVarP(&email, "email", "e", "", "only the user with this e-mail address")
	return cmd
}

// whichUser has the flags that name one user.
type whichUser struct{ id, name string }

func (w *whichUser) flags(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&w.id, "identifier", "i", "", "the user's id")
	cmd.Flags().StringVarP(&w.name, "name", "n", "", "the user's name")
}

func (w *whichUser) find(ctx context.Context, c *client) (*user, error) {
	if (w.id == "") == (w.name == "") {
		return nil, usagef("name the user by one of --identifier and --name")
	}
	if w.id != "" {
		if err := checkID("--identifier", w.id); err != nil {
			return nil, err
		}
	}
	return findUser(ctx, c, w.id, w.name)
}

func findUser(ctx context.Context, c *client, id, name string) (*user, error) {
	q := url.Values{}
	if id != "" {
		q.Set("id", id)
	} else {
		q.Set("name", name)
	}
	var users []user
	if _, err := c.get(ctx, "GET", "/user?"+q.Encode(), nil, "users", &users); err != nil {
		return nil, err
	}
	switch {
	case len(users) == 1:
		return &users[0], nil
	case len(users) > 1:
		return nil, fmt.Errorf("%d users are called %q: name one by its id", len(users), name)
	case id != "":
		return nil, fmt.Errorf("there is no user with the id %s", id)
	}
	return nil, fmt.Errorf("there is no user %q", name)
}

func checkID(flag, s string) error {
	if n, err := strconv.ParseUint(s, 10, 63); err != nil || n == 0 {
		return usagef("%s: want an id, a number from 1 on, got %q", flag, s)
	}
	return nil
}

func (m *program) usersRename() *cobra.Command {
	var which whichUser
	var newName string
	cmd := m.verb("rename", "Rename a user", 0, func(cmd *cobra.Command, _ []string) error {
		c, err := m.client()
		if err != nil {
			return err
		}
		u, err := which.find(cmd.Context(), c)
		if err != nil {
			return err
		}
		raw, err := c.get(cmd.Context(), "POST", "/user/"+u.ID+"/rename/"+url.PathEscape(newName), nil, "user", nil)
		if err != nil {
			return err
		}
		return m.print(raw, "User renamed")
	})
	cmd.Aliases = []string{"mv"}
	which.flags(cmd)
	cmd.Flags().StringVarP(&newName, "new-name", "r", "", "the new name")
	required(cmd, "new-name")
	return cmd
}

func (m *program) usersDestroy() *cobra.Command {
	var which whichUser
	cmd := m.verb("destroy", "Delete a user who has no nodes", 0, func(cmd *cobra.Command, _ []string) error {
		c, err := m.client()
		if err != nil {
			return err
		}
		u, err := which.find(cmd.Context(), c)
		if err != nil {
			return err
		}
		ok, err := m.confirm("Do you want to remove the user %s (%s) and any associated preauthkeys?", u.Name, u.ID)
		if err != nil {
			return err
		}
		if !ok {
			return m.print(result("User not destroyed"), "User not destroyed")
		}
		var answer json.RawMessage
		if err := c.call(cmd.Context(), "DELETE", "/user/"+u.ID, nil, &answer); err != nil {
			return err
		}
		return m.print(answer, "User destroyed")
	})
	cmd.Aliases = []string{"delete"}
	which.flags(cmd)
	return cmd
}
