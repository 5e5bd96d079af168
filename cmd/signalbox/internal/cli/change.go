package cli

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/acl/tailnetfile"
)

// A change replaces the live policy by text, and tells the effect of that.
type change struct {
	path string // name of the text, for messages
	text []byte
	done string // what is said when it worked

	// send asks the server to do it.
	send func(ctx context.Context, c *client, header http.Header) (http.Header, error)

	dryRun    bool
	ifVersion int64
}

func (ch *change) flags(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&ch.dryRun, "dry-run", false, "say what it would do, and change nothing")
	cmd.Flags().Int64Var(&ch.ifVersion, "if-version", 0, "only if this version is the one in effect")
}

// effect is what a change does to the tailnet at hand.
type effect struct {
	Result   string              `json:"Result"`
	Version  int64               `json:"version,omitempty"` // now in effect
	Effect   *acl.Effect         `json:"effect"`
	Warnings []tailnetfile.Fault `json:"warnings"`

	was int64 // the version that it was compared with
}

// raced is how often an effect is worked out again because somebody else
// changed the policy meanwhile.
const raced = 5

// change does it. The effect that it prints is that of this change alone: when
// another one comes between, it looks again, or with --if-version gives up.
func (m *program) change(ctx context.Context, ch *change) error {
	c, err := m.client()
	if err != nil {
		return err
	}
	for try := 1; ; try++ {
		e, err := m.effect(ctx, c, ch)
		if err != nil {
			return err
		}
		if ch.dryRun {
			e.Result = "Nothing was changed: this is a dry run."
			return m.tell(ch, e)
		}
		header := http.Header{}
		if e.was != 0 {
			header.Set("If-Match", fmt.Sprintf("%q", strconv.FormatInt(e.was, 10)))
		}
		answer, err := ch.send(ctx, c, header)
		var told *refusal
		if errors.As(err, &told) && told.status == http.StatusPreconditionFailed && ch.ifVersion == 0 && try < raced {
			continue
		}
		if err != nil {
			return m.refusedText(err, ch.path, ch.text)
		}
		e.Version = tagVersion(answer.Get("ETag"))
		if e.Result = ch.done; e.Version == e.was {
			e.Result = "Policy unchanged: this text is in effect already."
		}
		return m.tell(ch, e)
	}
}

// effect compares the text with the policy in effect, after the server has
// said that the text is good.
func (m *program) effect(ctx context.Context, c *client, ch *change) (*effect, error) {
	if err := m.checkServer(ctx, ch.path, ch.text); err != nil {
		return nil, err
	}
	f, t, err := c.tailnet(ctx)
	if err != nil {
		return nil, err
	}
	if ch.ifVersion != 0 && ch.ifVersion != f.PolicyVersion {
		return nil, fmt.Errorf("the policy was changed meanwhile: version %d is live, not %d", f.PolicyVersion, ch.ifVersion)
	}
	e := &effect{Warnings: []tailnetfile.Fault{}, was: f.PolicyVersion}
	now, _, err := policyText{text: ch.text}.compile(t)
	if err != nil {
		return e, nil // the server knows more of the language than this program
	}
	old, _, err := policyText{text: []byte(f.Policy), stored: true}.compile(t)
	if err != nil {
		// What does not compile any more, say because it has outgrown a limit,
		// lets nobody through, and may be what the change is there to mend.
		if old, _, err = (policyText{text: []byte(denyAll)}).compile(t); err != nil {
			return nil, err
		}
	}
	e.Effect = acl.Diff(old, now)
	if p, err := acl.Parse(ch.text); err == nil {
		for _, w := range acl.Warnings(p, t) {
			e.Warnings = append(e.Warnings, tailnetfile.Fault(w))
		}
	}
	return e, nil
}

// tell shows warnings and effect.
func (m *program) tell(ch *change, e *effect) error {
	if m.machine() {
		return m.encode(m.Stdout, e)
	}
	m.warn(ch.path, ch.text, e.Warnings)
	text := "What it changes is not known: the server is newer than this command."
	if e.Effect != nil {
		text = effectText(e.Effect)
	}
	return m.print(nil, e.Result+"\n"+text)
}

// tagVersion reads a version from the ETag of a policy; 0 when there is none.
func tagVersion(tag string) int64 {
	s, err := strconv.Unquote(tag)
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseInt(s, 10, 64)
	return n
}
