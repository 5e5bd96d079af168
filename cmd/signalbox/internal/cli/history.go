package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func (m *program) policyHistory() *cobra.Command {
	var limit int
	cmd := m.verb("history", "List the stored versions of the policy, the newest first", 0, func(cmd *cobra.Command, _ []string) error {
		c, err := m.client()
		if err != nil {
			return err
		}
		var list []version
		raw, err := c.get(cmd.Context(), "GET", fmt.Sprintf("%s/policy/versions?limit=%d", own, limit), nil, "versions", &list)
		if err != nil {
			return err
		}
		var rows [][]string
		for _, v := range list {
			live := ""
			if v.Live {
				live = "live"
			}
			rows = append(rows, []string{strconv.FormatInt(v.Version, 10), live, showTime(&v.Created), v.Author, strconv.Itoa(v.Bytes), v.Note})
		}
		return m.printTable(raw, []string{"Version", "", "Created", "Author", "Bytes", "Note"}, rows)
	})
	cmd.Aliases = []string{"versions", "log"}
	cmd.Flags().IntVarP(&limit, "number", "n", 20, "how many, at most 1000")
	return cmd
}

// policyShow without an argument is Headscale's other name of policy get.
func (m *program) policyShow() *cobra.Command {
	cmd := m.verb("show [VERSION]", "Print a stored version of the policy, or the one in effect", 0, func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return m.printLive(cmd.Context())
		}
		n, err := versionNumber(args[0])
		if err != nil {
			return err
		}
		c, err := m.client()
		if err != nil {
			return err
		}
		v, raw, err := c.version(cmd.Context(), n)
		if err != nil {
			return err
		}
		if m.machine() {
			return m.encode(m.Stdout, raw)
		}
		return m.printText(v.Text)
	})
	cmd.Args = func(_ *cobra.Command, args []string) error {
		if len(args) > 1 {
			return usagef("name one version")
		}
		return nil
	}
	cmd.ValidArgsFunction = m.completeVersions(false)
	return cmd
}

func (m *program) policyRollback() *cobra.Command {
	var ch change
	cmd := m.verb("rollback VERSION", "Make an earlier version of the policy live again, as a new version", 1, func(cmd *cobra.Command, args []string) error {
		n, err := versionNumber(args[0])
		if err != nil {
			return err
		}
		pt, err := m.versionText(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		ch.text, ch.path = pt.text, pt.name
		ch.done = fmt.Sprintf("Policy rolled back to version %d.", n)
		ch.send = func(ctx context.Context, c *client, header http.Header) (http.Header, error) {
			return c.send(ctx, "POST", fmt.Sprintf("%s/policy/versions/%d/rollback", own, n), header, nil, nil)
		}
		return m.change(cmd.Context(), &ch)
	})
	cmd.Long = "The text has to hold against the users and nodes of today, its own tests included."
	ch.flags(cmd)
	cmd.ValidArgsFunction = m.completeVersions(false)
	return cmd
}

func (m *program) serversCmd() *cobra.Command {
	cmd := m.verb("servers", "List the servers on this database", 0, func(cmd *cobra.Command, _ []string) error {
		c, err := m.client()
		if err != nil {
			return err
		}
		var list []struct {
			ID, Name, Version  string
			Started, Heartbeat time.Time
			Alive, Self        bool
			Sessions           int
			Streams, Lag       int64
			Revision           string
		}
		raw, err := c.get(cmd.Context(), "GET", own+"/servers", nil, "servers", &list)
		if err != nil {
			return err
		}
		var rows [][]string
		for _, s := range list {
			rev, lag, name := "-", "-", s.Name
			if s.Revision != "" {
				rev, lag = s.Revision, strconv.FormatInt(s.Lag, 10)
			}
			if s.Self {
				name += " (this one)"
			}
			rows = append(rows, []string{
				s.ID, name, s.Version, showTime(&s.Started), showTime(&s.Heartbeat), yesNo(s.Alive), strconv.Itoa(s.Sessions), strconv.FormatInt(s.Streams, 10), rev, lag,
			})
		}
		return m.printTable(raw, []string{"ID", "Name", "Version", "Started", "Last sign of life", "Alive", "Nodes connected", "Streams", "Revision", "Lag"}, rows)
	})
	cmd.Long = "Streams and revision of other servers are those of their last sign of life, which each gives every 15 seconds. Lag is how many revisions the database is ahead."
	return cmd
}

func (m *program) auditCmd() *cobra.Command {
	var after int64
	var limit int
	cmd := m.verb("audit", "List what was changed, when and by whom", 0, func(cmd *cobra.Command, _ []string) error {
		query := fmt.Sprintf("last=%d", limit)
		if cmd.Flags().Changed("after") {
			query = fmt.Sprintf("after=%d&limit=%d", after, limit)
		}
		if limit <= 0 {
			return usagef("--number: want a number from 1 to 1000")
		}
		c, err := m.client()
		if err != nil {
			return err
		}
		var list []struct {
			Number, Action, Target string
			Time                   time.Time
			Actor                  struct{ Kind, Name, KeyID, Source string }
			Before, After          json.RawMessage
		}
		raw, err := c.get(cmd.Context(), "GET", own+"/audit?"+query, nil, "events", &list)
		if err != nil {
			return err
		}
		var rows [][]string
		for _, e := range list {
			var who []string
			for _, s := range []string{e.Actor.Kind, e.Actor.Name, e.Actor.KeyID, e.Actor.Source} {
				if s != "" {
					who = append(who, s)
				}
			}
			rows = append(rows, []string{e.Number, showTime(&e.Time), strings.Join(who, " "), e.Action, e.Target, short(e.Before), short(e.After)})
		}
		return m.printTable(raw, []string{"Number", "Time", "Who", "Action", "Of", "Before", "After"}, rows)
	})
	cmd.Long = "Without --after the newest events, oldest first. -o json has everything."
	cmd.Flags().Int64Var(&after, "after", 0, "only events after this number")
	cmd.Flags().IntVarP(&limit, "number", "n", 50, "how many, at most 1000")
	return cmd
}

// short is a document for a table.
func short(b json.RawMessage) string {
	const most = 60
	s := []rune(string(b))
	if len(s) > most {
		return string(s[:most-1]) + "…"
	}
	return string(s)
}
