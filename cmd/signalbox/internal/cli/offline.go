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

// checkOffline is policy check without a server. Without a tailnet file it
// covers what the text alone can tell.
func (m *program) checkOffline(path, tailnet string, text []byte) error {
	if tailnet == "" {
		if _, err := acl.Parse(text); err != nil {
			return m.refuseErrors(path, text, err)
		}
		return m.print(result("Policy is valid"), "Policy is valid (its text: users, nodes and tests need a server or --tailnet)")
	}
	_, t, err := readTailnet(tailnet)
	if err != nil {
		return err
	}
	compiled, rejection, err := tailnetfile.CompilePolicy(t, text)
	if err != nil {
		return err
	}
	if rejection != nil {
		return m.refusePolicy(path, text, rejection)
	}
	if m.machine() {
		return m.encode(m.Stdout, map[string]any{"Result": "Policy is valid", "warnings": compiled.Warnings})
	}
	for _, w := range compiled.Warnings {
		fmt.Fprintln(m.Stderr, "warning: "+withCaret(path, text, w.Line, w.Column, w.Message))
	}
	return m.print(nil, "Policy is valid")
}

// readTailnet reads a tailnet file. Its errors are about usage.
func readTailnet(path string) (*tailnetfile.File, *acl.Tailnet, error) {
	doc, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, usageError{err}
	}
	f, err := tailnetfile.Parse(doc)
	if err != nil {
		return nil, nil, usagef("%s: %w", path, err)
	}
	t, err := f.Tailnet()
	if err != nil {
		return nil, nil, usagef("%s: %w", path, err)
	}
	return f, t, nil
}

// compileText makes a policy text into its effect on a tailnet. What is wrong
// with the text is shown as refusePolicy does.
func (m *program) compileText(path string, text []byte, t *acl.Tailnet) (*acl.Access, error) {
	p, err := acl.Parse(text)
	if err != nil {
		return nil, m.refuseErrors(path, text, err)
	}
	a, err := acl.Compile(p, t)
	if err != nil {
		return nil, m.refuseErrors(path, text, err)
	}
	return a, nil
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

var serverPlace = regexp.MustCompile(`^policy:(\d+):(\d+): (.*)$`)

// inFile puts the file's name and the source line into a server's complaint:
// the server sees the text only and calls it policy.
func inFile(err error, path string, text []byte) error {
	var coded codedError
	if errors.As(err, &coded) {
		return err
	}
	lines := strings.Split(err.Error(), "\n")
	found := false
	for i, l := range lines {
		g := serverPlace.FindStringSubmatch(l)
		if g == nil {
			continue
		}
		found = true
		line, _ := strconv.Atoi(g[1])
		col, _ := strconv.Atoi(g[2])
		lines[i] = withCaret(path, text, line, col, g[3])
	}
	if found {
		lines = append([]string{"the policy is refused"}, lines...)
	}
	return errors.New(strings.Join(lines, "\n"))
}
