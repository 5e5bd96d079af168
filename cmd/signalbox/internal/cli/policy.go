package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/signalbox-net/signalbox/acl"
)

// maxPolicy is what a server accepts.
const maxPolicy = 2 << 20

func (m *program) policyCmd() *cobra.Command {
	g := m.group("policy", "Manage the access policy")
	get, set, check := m.policyGet(), m.policySet(), m.policyCheck()
	noBypass(get, set, check)
	g.AddCommand(get, m.policyShow(), set, check, m.policyHistory(), m.policyRollback(), m.policyExplain(), m.policyDiff(), m.policyFmt(), m.policyCompile())
	return g
}

func (m *program) policyGet() *cobra.Command {
	cmd := m.verb("get", "Print the policy in effect, as it was stored", 0, func(cmd *cobra.Command, _ []string) error {
		return m.printLive(cmd.Context())
	})
	cmd.Aliases = []string{"view", "fetch"}
	return cmd
}

func (m *program) printLive(ctx context.Context) error {
	c, err := m.client()
	if err != nil {
		return err
	}
	var answer struct{ Policy string }
	if err := c.call(ctx, "GET", "/policy", nil, &answer); err != nil {
		return err
	}
	return m.printText(answer.Policy)
}

// printText is for `policy set` and for editors: a policy is never wrapped
// into JSON.
func (m *program) printText(policy string) error {
	if !strings.HasSuffix(policy, "\n") {
		policy += "\n"
	}
	_, err := io.WriteString(m.Stdout, policy)
	return err
}

// readPolicy reads the file, or standard input for "-".
func (m *program) readPolicy(path string) ([]byte, error) {
	in := m.Stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxPolicy+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxPolicy {
		return nil, fmt.Errorf("%s: longer than %d bytes", path, maxPolicy)
	}
	return b, nil
}

// verbFile is a verb on a policy file, which is named by -f, as Headscale does,
// or by the only argument.
func (m *program) verbFile(name, short string, path *string, run func(*cobra.Command) error) *cobra.Command {
	cmd := m.verb(name+" [FILE]", short, 0, func(cmd *cobra.Command, _ []string) error { return run(cmd) })
	cmd.Args = func(_ *cobra.Command, args []string) error {
		if len(args) > 1 || len(args) == 1 && *path != "" || len(args) == 0 && *path == "" {
			return usagef("name one policy file: -f FILE")
		}
		if len(args) == 1 {
			*path = args[0]
		}
		return nil
	}
	cmd.Flags().StringVarP(path, "file", "f", "", "policy file in HuJSON; - for standard input")
	return cmd
}

// noBypass explains the absence of Headscale's flags for a database without a
// server: there, a policy can lock the administrator out; here, the socket is
// always open to one, and two writers on one database are not.
func noBypass(cmds ...*cobra.Command) {
	for _, cmd := range cmds {
		for _, name := range []string{"bypass-server-and-access-database-directly", "bypass-grpc-and-access-database-directly"} {
			cmd.Flags().BoolFunc(name, "", func(string) error {
				return errors.New("only the server writes its database: start it, the socket is open to an administrator whatever the policy says")
			})
			must(cmd.Flags().MarkHidden(name))
		}
	}
}

func (m *program) policySet() *cobra.Command {
	var ch change
	var allowAll bool
	var note string
	cmd := m.verbFile("set", "Replace the policy", &ch.path, func(cmd *cobra.Command) (err error) {
		if ch.text, err = m.readPolicy(ch.path); err != nil {
			return err
		}
		// A text with faults gets the server's answer: the faults come first.
		if p, err := acl.Parse(ch.text); err == nil && p.AllowsAll() && !allowAll {
			return errors.New("this policy has neither acls nor grants, which allows everything to everybody; say --allow-all if that is meant")
		}
		ch.done = "Policy updated."
		ch.send = func(ctx context.Context, c *client, header http.Header) (http.Header, error) {
			return c.send(ctx, "PUT", "/api/v1/policy", header, map[string]string{"policy": string(ch.text), "note": note}, nil)
		}
		return m.change(cmd.Context(), &ch)
	})
	cmd.Long = "The policy's own tests have to pass. A refused policy changes nothing."
	cmd.Aliases = []string{"put", "update"}
	cmd.Flags().BoolVar(&allowAll, "allow-all", false, "accept a policy without acls and grants, which allows everything")
	cmd.Flags().StringVar(&note, "note", "", "remark for 'policy history'")
	ch.flags(cmd)
	return cmd
}

func (m *program) policyCheck() *cobra.Command {
	var path, tailnet string
	var offline bool
	cmd := m.verbFile("check", "Check a policy without storing it", &path, func(cmd *cobra.Command) error {
		text, err := m.readPolicy(path)
		if err != nil {
			return err
		}
		if offline && tailnet == "" {
			return m.checkText(path, text)
		}
		_, t, err := m.tailnet(cmd.Context(), tailnet)
		if err != nil {
			return err
		}
		if tailnet == "" {
			if err := m.checkServer(cmd.Context(), path, text); err != nil {
				return err
			}
		}
		return m.checkAgainst(t, path, text)
	})
	cmd.Long = "The server checks it against its users and nodes and runs the policy's tests; nothing changes."
	cmd.Flags().BoolVar(&offline, "offline", false, "ask no server: check the text only")
	cmd.Flags().StringVar(&tailnet, "tailnet", "", "ask no server: check against the users and nodes of this tailnet file")
	return cmd
}

// checkServer asks the server, which has the last word.
func (m *program) checkServer(ctx context.Context, path string, text []byte) error {
	c, err := m.client()
	if err != nil {
		return err
	}
	err = c.call(ctx, "POST", "/policy/check", map[string]string{"policy": string(text)}, nil)
	return m.refusedText(err, path, text)
}
