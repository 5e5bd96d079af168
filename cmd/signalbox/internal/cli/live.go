package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/acl/tailnetfile"
)

// tailnet is what a policy works on: the named tailnet file, or without a name
// the server's tailnet as it is now. Either way the rest is computed here, by
// the same code.
func (m *program) tailnet(ctx context.Context, path string) (*tailnetfile.File, *acl.Tailnet, error) {
	if path != "" {
		return readTailnet(path)
	}
	c, err := m.client()
	if err != nil {
		return nil, nil, err
	}
	return c.tailnet(ctx)
}

func (c *client) tailnet(ctx context.Context) (*tailnetfile.File, *acl.Tailnet, error) {
	var doc json.RawMessage
	if err := c.callOwn(ctx, "GET", "/tailnet", nil, &doc); err != nil {
		return nil, nil, err
	}
	f, t, err := parseTailnet(doc)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", c.where, err)
	}
	if f.Policy == "" {
		f.Policy = denyAll // what a server without a stored policy does
	}
	return f, t, nil
}

const denyAll = `{"acls": []}`

// version is a stored version of the policy.
type version struct {
	Version int64     `json:"version"`
	Author  string    `json:"author"`
	Note    string    `json:"note"`
	Created time.Time `json:"created"`
	Bytes   int       `json:"bytes"`
	Live    bool      `json:"live"`
	Text    string    `json:"text"`
}

// version fetches one with its text; raw is what the server said.
func (c *client) version(ctx context.Context, number int64) (v *version, raw json.RawMessage, err error) {
	if err := c.callOwn(ctx, "GET", fmt.Sprintf("/policy/versions/%d", number), nil, &raw); err != nil {
		return nil, nil, err
	}
	v = new(version)
	if err := json.Unmarshal(raw, v); err != nil {
		return nil, nil, fmt.Errorf("%s: the answer is not what a Signalbox server says: %w", c.where, err)
	}
	return v, raw, nil
}

// versionNumber reads the argument VERSION.
func versionNumber(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n <= 0 {
		return 0, usagef("%q is no version: want a number from 'policy history'", s)
	}
	return n, nil
}

// versionText fetches a stored version of the policy.
func (m *program) versionText(ctx context.Context, arg string) (policyText, error) {
	n, err := versionNumber(arg)
	if err != nil {
		return policyText{}, err
	}
	c, err := m.client()
	if err != nil {
		return policyText{}, err
	}
	v, _, err := c.version(ctx, n)
	if err != nil {
		return policyText{}, err
	}
	return policyText{versionName(n), []byte(v.Text), true}, nil
}

// versionName stands where messages have the name of a file.
func versionName(n int64) string { return fmt.Sprintf("version %d", n) }

// livePolicy stands where messages have the name of a file.
const livePolicy = "live policy"

// completion is how long a shell waits for the names that it offers.
const completion = "1s"

// completeNodes offers the names of nodes for all arguments but the first
// skip ones.
func (m *program) completeNodes(most int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var out []string
		for _, n := range m.knownNodes(cmd.Context()) {
			out = append(out, n.GivenName)
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeNodeIDs offers ids, with the names that explain them.
func (m *program) completeNodeIDs(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	var out []string
	for _, n := range m.knownNodes(cmd.Context()) {
		out = append(out, n.ID+"\t"+printable(n.GivenName))
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// knownNodes is empty when the server cannot be asked: a shell that waits for
// names has no use for errors.
func (m *program) knownNodes(ctx context.Context) []node {
	m.timeout = completion
	c, err := m.client()
	if err != nil {
		return nil
	}
	var nodes []node
	c.get(ctx, "GET", "/node", nil, "nodes", &nodes)
	return nodes
}

// completeVersions offers the numbers of stored policies; files is whether a
// file may be named as well.
func (m *program) completeVersions(files bool) cobra.CompletionFunc {
	directive := cobra.ShellCompDirectiveNoFileComp
	if files {
		directive = cobra.ShellCompDirectiveDefault
	}
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if !files && len(args) > 0 {
			return nil, directive
		}
		m.timeout = completion
		c, err := m.client()
		if err != nil {
			return nil, directive
		}
		var list []version
		c.get(cmd.Context(), "GET", own+"/policy/versions?"+url.Values{"limit": {"50"}}.Encode(), nil, "versions", &list)
		var out []string
		for _, v := range list {
			out = append(out, fmt.Sprintf("%d\t%s %s", v.Version, showTime(&v.Created), printable(v.Note)))
		}
		return out, directive
	}
}
