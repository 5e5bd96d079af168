package cli

import (
	"context"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/acl/tailnetfile"
)

// policyDiff compares what two policies do to the nodes of a tailnet.
func (m *program) policyDiff() *cobra.Command {
	var tailnet string
	cmd := m.verb("diff OLD NEW", "Say what a change of policy opens and closes", 2, func(cmd *cobra.Command, args []string) error {
		f, t, err := m.tailnet(cmd.Context(), tailnet)
		if err != nil {
			return err
		}
		var sides [2]*acl.Access
		for i, arg := range args {
			pt, err := m.policyText(cmd.Context(), arg, f, tailnet)
			if err != nil {
				return err
			}
			if sides[i], err = m.compileText(pt, t); err != nil {
				return err
			}
		}
		e := acl.Diff(sides[0], sides[1])
		return m.print(e, effectText(e))
	})
	cmd.Long = `OLD and NEW are policy files (- is standard input), versions from 'policy
history', or the word live; ./7 is a file called 7. Both are tried on the
server's tailnet as it is now, or on the tailnet file of --tailnet, where live is
the policy in that file.

It compares effects, not texts: connections, peers, SSH logins and capabilities.
"+" is gained, "-" is lost.`
	cmd.Flags().StringVar(&tailnet, "tailnet", "", "ask no server: compare on the nodes of this tailnet file")
	cmd.ValidArgsFunction = m.completeVersions(true)
	return cmd
}

// policyText finds a policy by what the arguments of diff may say. f is the
// tailnet at hand, from the file tailnet or, if that is empty, from the server.
func (m *program) policyText(ctx context.Context, arg string, f *tailnetfile.File, tailnet string) (policyText, error) {
	if arg == "live" {
		if f.Policy == "" {
			return policyText{}, usagef("%s holds no policy", tailnet)
		}
		return policyText{livePolicy, []byte(f.Policy), true}, nil
	}
	if _, err := strconv.ParseInt(arg, 10, 64); err == nil {
		if tailnet != "" {
			return policyText{}, usagef("version %s is on a server, which --tailnet does not ask; name a file", arg)
		}
		return m.versionText(ctx, arg)
	}
	text, err := m.readPolicy(arg)
	if err != nil {
		return policyText{}, usageError{err}
	}
	return policyText{name: arg, text: text}, nil
}
