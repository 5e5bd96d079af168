package cli

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/acl/tailnetfile"
)

// policyCompile prints what a policy gives to every node of a tailnet file.
// Its output and exit codes are an interface for CI.
func (m *program) policyCompile() *cobra.Command {
	var tailnet string
	cmd := m.verb("compile POLICY", "Print what a policy gives to the nodes of a tailnet file", 1, func(_ *cobra.Command, args []string) error {
		doc, err := os.ReadFile(tailnet)
		if err != nil {
			return usageError{err}
		}
		text, err := m.readPolicy(args[0])
		if err != nil {
			return usageError{err}
		}
		out, ok, err := tailnetfile.CompileJSON(doc, text)
		if err != nil {
			return usagef("%s: %w", tailnet, err)
		}
		if _, err := fmt.Fprintf(m.Stdout, "%s\n", out); err != nil {
			return err
		}
		if !ok {
			return codedError{errTold, exitError}
		}
		return nil
	})
	cmd.Long = `Needs no server. The output is one JSON object whatever -o says. A policy that
is refused gives {"error": …, "errors": […]} and exit code 1; a file that cannot
be read gives code 2.`
	cmd.Flags().StringVar(&tailnet, "tailnet", "", "tailnet file in JSON")
	required(cmd, "tailnet")
	return cmd
}

// checkText is policy check by the text alone.
func (m *program) checkText(path string, text []byte) error {
	if _, err := acl.Parse(text); err != nil {
		return m.refuseErrors(path, text, err)
	}
	return m.print(result("Policy is valid"), "Policy is valid (its text: users, nodes and tests need a server or --tailnet)")
}

// checkAgainst is policy check on a tailnet.
func (m *program) checkAgainst(t *acl.Tailnet, path string, text []byte) error {
	compiled, rejection := tailnetfile.CompilePolicy(t, text)
	if rejection != nil {
		return m.refusePolicy(path, text, rejection)
	}
	if m.machine() {
		return m.encode(m.Stdout, map[string]any{"Result": "Policy is valid", "warnings": compiled.Warnings})
	}
	m.warn(path, text, compiled.Warnings)
	return m.print(nil, "Policy is valid")
}

// warn shows remarks about a valid policy to a person.
func (m *program) warn(path string, text []byte, warnings []tailnetfile.Fault) {
	for _, w := range warnings {
		fmt.Fprintln(m.Stderr, "warning: "+withCaret(path, text, w.Line, w.Column, w.Message))
	}
}

// readTailnet reads a tailnet file. Its errors are about usage.
func readTailnet(path string) (*tailnetfile.File, *acl.Tailnet, error) {
	doc, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, usageError{err}
	}
	f, t, err := parseTailnet(doc)
	if err != nil {
		return nil, nil, usagef("%s: %w", path, err)
	}
	return f, t, nil
}

func parseTailnet(doc []byte) (*tailnetfile.File, *acl.Tailnet, error) {
	f, err := tailnetfile.Parse(doc)
	if err != nil {
		return nil, nil, err
	}
	t, err := f.Tailnet()
	return f, t, err
}

// A policyText is a policy with what is to be known of it.
type policyText struct {
	name string // for messages: the file, or where else it comes from
	text []byte

	// stored says that a server accepted the text before, so that it compiles
	// as the server does it: names in it that the tailnet refutes by now
	// denote nobody.
	stored bool
}

// compileText makes a policy text into its effect on a tailnet. What is wrong
// with the text is shown as refusePolicy does; stale names of a stored one are
// warned of.
func (m *program) compileText(pt policyText, t *acl.Tailnet) (*acl.Access, error) {
	a, stale, err := pt.compile(t)
	if err != nil {
		return nil, m.refuseErrors(pt.name, pt.text, err)
	}
	var warnings []tailnetfile.Fault
	for _, e := range stale {
		warnings = append(warnings, tailnetfile.Fault(*e))
	}
	m.warn(pt.name, pt.text, warnings)
	return a, nil
}

func (pt policyText) compile(t *acl.Tailnet) (a *acl.Access, stale acl.Errors, err error) {
	p, err := acl.Parse(pt.text)
	if err != nil {
		return nil, nil, err
	}
	if pt.stored {
		return acl.CompileStored(p, t)
	}
	a, err = acl.Compile(p, t)
	return a, nil, err
}

// refuseErrors is refusePolicy for the error of package acl.
func (m *program) refuseErrors(path string, text []byte, err error) error {
	var errs acl.Errors
	if !errors.As(err, &errs) {
		return err
	}
	r := &tailnetfile.Rejection{Error: errs.Message()}
	for _, e := range errs {
		r.Errors = append(r.Errors, tailnetfile.Fault(*e))
	}
	return m.refusePolicy(path, text, r)
}

// refusePolicy shows all faults and ends with code 1.
func (m *program) refusePolicy(path string, text []byte, r *tailnetfile.Rejection) error {
	if m.machine() {
		if err := m.encode(m.Stdout, r); err != nil {
			return err
		}
		return codedError{errTold, exitError}
	}
	var lines []string
	for _, f := range r.Errors {
		lines = append(lines, withCaret(path, text, f.Line, f.Column, f.Message))
	}
	return errors.New("the policy is refused\n" + strings.Join(lines, "\n"))
}

// maxShown is the longest source line that is repeated under a message.
const maxShown = 160

// withCaret is "FILE:LINE:COL: message" and below it the line of the text with
// a mark under the place. Columns count characters from 1.
func withCaret(path string, text []byte, line, col int, msg string) string {
	if path == "-" {
		path = "<stdin>"
	}
	head := fmt.Sprintf("%s:%d:%d: %s", path, line, col, msg)
	lines := strings.Split(string(text), "\n")
	if line < 1 || line > len(lines) {
		return head
	}
	src := []rune(strings.TrimSuffix(lines[line-1], "\r"))
	if col < 1 || col > len(src)+1 || len(src) > maxShown || len(src) == 0 {
		return head
	}
	mark := make([]rune, 0, col)
	for _, r := range src[:col-1] {
		if r != '\t' { // a tab stays one, whatever its width
			r = ' '
		}
		mark = append(mark, r)
	}
	shown := strings.Map(func(r rune) rune {
		if r == '\t' {
			return r
		}
		return []rune(printable(string(r)))[0]
	}, string(src))
	return head + "\n  " + shown + "\n  " + string(mark) + "^"
}

var (
	serverPlace = regexp.MustCompile(`^policy:(\d+):(\d+)$`)
	moreFaults  = regexp.MustCompile(`\nand \d+ more$`)
)

// refusedText shows a server's complaint about a policy as refusePolicy does:
// the server sees the text only and calls it policy. Other errors stay.
func (m *program) refusedText(err error, path string, text []byte) error {
	var told *refusal
	if !errors.As(err, &told) || len(told.faults) == 0 {
		return err
	}
	r := &tailnetfile.Rejection{Error: told.faults[0].Message}
	for _, f := range told.faults {
		g := serverPlace.FindStringSubmatch(f.Location)
		if g == nil {
			return err
		}
		line, _ := strconv.Atoi(g[1])
		col, _ := strconv.Atoi(g[2])
		r.Errors = append(r.Errors, tailnetfile.Fault{Line: line, Column: col, Message: f.Message})
	}
	err = m.refusePolicy(path, text, r)
	if more := moreFaults.FindString(told.text); more != "" && !m.machine() {
		err = fmt.Errorf("%w%s", err, more)
	}
	return err
}
