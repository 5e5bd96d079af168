package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/signalbox-net/signalbox/acl"
)

// policyDiff compares what two policies do to the nodes of a tailnet file.
func (m *program) policyDiff() *cobra.Command {
	var tailnet string
	cmd := m.verb("diff OLD NEW", "Say what a change of policy opens and closes, by a tailnet file", 2, func(_ *cobra.Command, args []string) error {
		_, t, err := readTailnet(tailnet)
		if err != nil {
			return err
		}
		var sides [2]*acl.Access
		for i, path := range args {
			text, err := m.readPolicy(path)
			if err != nil {
				return usageError{err}
			}
			if sides[i], err = m.compileText(path, text, t); err != nil {
				return err
			}
		}
		e := acl.Diff(sides[0], sides[1])
		return m.print(e, effectText(e))
	})
	cmd.Long = `It compares effects, not texts: connections, peers, SSH logins and
capabilities. "+" is gained, "-" is lost.`
	cmd.Flags().StringVar(&tailnet, "tailnet", "", "tailnet file in JSON")
	required(cmd, "tailnet")
	return cmd
}

// effectText is the effect for a person, one change a line.
func effectText(e *acl.Effect) string {
	if e.Empty() {
		return "Nothing changes."
	}
	var lines []string
	section := func(title string, n int, line func(int) string) {
		if n == 0 {
			return
		}
		lines = append(lines, title)
		for i := range n {
			lines = append(lines, "  "+line(i))
		}
	}
	section("Connections", len(e.Flows), func(i int) string {
		f := e.Flows[i]
		return fmt.Sprintf("%s %s -> %s: %s", sign(f.Opened), names(f.From), names(f.To), f.Allow)
	})
	section("Peers", len(e.Peers), func(i int) string {
		p := e.Peers[i]
		return fmt.Sprintf("%s %s see %s", sign(p.Appear), names(p.Viewers), names(p.Peers))
	})
	section("SSH logins", len(e.Logins), func(i int) string {
		l := e.Logins[i]
		return fmt.Sprintf("%s -> %s as %s: %s, was %s", names(l.From), names(l.To), l.User, l.Now, l.Was)
	})
	section("Capabilities", len(e.Caps), func(i int) string {
		c := e.Caps[i]
		text := fmt.Sprintf("%s %s: %s", sign(c.Gained), names(c.Nodes), c.Cap)
		if len(c.Values) > 0 {
			text += " " + strings.Join(c.Values, " ")
		}
		return text
	})
	return printableLines(lines)
}

func sign(gained bool) string {
	if gained {
		return "+"
	}
	return "-"
}

// names shortens a long list: the whole one is in -o json.
func names(list []string) string {
	const most = 8
	if len(list) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(list[:most], ", "), len(list)-most)
	}
	return strings.Join(list, ", ")
}
