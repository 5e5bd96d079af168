// Package cli is the command line of Signalbox: Headscale's verbs and flags,
// and a few of its own.
//
// It owns flags, output formats and exit codes. All verbs but serve,
// configtest, generate and the offline ones of policy are clients of a
// server's /api/v1, over its unix socket or over the network with an API key;
// what the server answers is printed as it is (-o json), so a command line and
// a server of different versions get along.
//
// A flow: `signalbox nodes list -o json` finds the socket by configuration and
// flags, gets /api/v1/node, and prints the array in the answer.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/signalbox-net/signalbox/cmd/signalbox/internal/config"
)

// Exit codes, for scripts. They are part of --help.
const (
	exitOK      = 0
	exitError   = 1 // the command was refused or failed
	exitUsage   = 2 // unknown verb, flag or argument
	exitDamaged = 3 // serve: the database is damaged
	exitNoReply = 4 // no server answers
)

const exitHelp = `Exit codes:
  0  done
  1  refused or failed; the reason is on standard error
  2  wrong usage: unknown verb, flag or argument
  3  serve: the database is damaged
  4  no server answers`

// Env is the process around the command line. Tests make their own.
type Env struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Vars           []string         // NAME=value
	Now            func() time.Time // nil: time.Now
}

// System is the Env of this process.
func System() Env {
	return Env{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Vars: os.Environ(), Now: time.Now}
}

// Run executes one command line (without the program's name) and returns the
// exit code. An interrupt or SIGTERM ends it gracefully.
func Run(env Env, args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if env.Now == nil {
		env.Now = time.Now
	}
	m := &program{Env: env}
	root := m.root()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	return m.fail(cmd, err)
}

// program is one run of the command line.
type program struct {
	Env
	ran bool // the verb's own code was reached: later errors are not about usage

	configPath string
	output     string
	force      bool
	server     string
	apiKey     string
	dataDir    string
	timeout    string
	insecure   bool
}

// A usageError is reported with code 2 and a pointer to the help.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// A codedError ends the process with a code of its own.
type codedError struct {
	error
	code int
}

func (e codedError) Unwrap() error { return e.error }
func (e codedError) ExitCode() int { return e.code }

// errTold ends a verb that has already said what is wrong.
var errTold = errors.New("")

// fail prints err, in the output format if that is a machine's, and returns
// the exit code.
func (m *program) fail(cmd *cobra.Command, err error) int {
	code := exitError
	var coded interface{ ExitCode() int }
	var usage usageError
	switch {
	case errors.As(err, &usage) || !m.ran:
		code = exitUsage
	case errors.As(err, &coded):
		code = coded.ExitCode()
	}
	if errors.Is(err, errTold) {
		return code
	}
	if m.machine() {
		m.encode(m.Stderr, map[string]string{"error": err.Error()})
		return code
	}
	fmt.Fprintf(m.Stderr, "signalbox: %v\n", err)
	if code == exitUsage {
		fmt.Fprintf(m.Stderr, "See '%s --help'.\n", cmd.CommandPath())
	}
	return code
}

func (m *program) root() *cobra.Command {
	root := m.group("signalbox", "Coordination server for WireGuard meshes of Tailscale clients")
	root.Long = `Signalbox is a coordination server for WireGuard meshes that stock Tailscale
clients join. 'signalbox serve' runs it; the other verbs administer a running
server, over its unix socket or with --server and an API key.

The socket is looked for in this order: --server, unix_socket of the
configuration (-c) or of SIGNALBOX_UNIX_SOCKET, signalbox.sock in --data-dir,
the same in the default data directory.

` + exitHelp
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetIn(m.Stdin)
	root.SetOut(m.Stdout)
	root.SetErr(m.Stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.CompletionOptions.HiddenDefaultCmd = false

	f := root.PersistentFlags()
	f.StringVarP(&m.configPath, "config", "c", "", "configuration file (default "+config.DefaultPath+" if there is one)")
	f.StringVarP(&m.output, "output", "o", "", "output format: json, json-line, yaml or table")
	f.BoolVar(&m.force, "force", false, "do not ask back")
	f.StringVar(&m.server, "server", "", "URL of the server, or path of its unix socket")
	f.StringVar(&m.apiKey, "api-key", "", "API key for --server (better in SIGNALBOX_CLI_API_KEY)")
	f.StringVar(&m.dataDir, "data-dir", "", "data directory (default /var/lib/signalbox for root, else ./signalbox-data)")
	f.StringVar(&m.timeout, "timeout", "", "how long to wait for the server (default 5s, or cli.timeout)")
	f.BoolVar(&m.insecure, "insecure", false, "do not check the certificate of --server")
	must(root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"json", "json-line", "yaml", "table"}, cobra.ShellCompDirectiveNoFileComp)))

	root.AddCommand(
		m.serveCmd(), m.configtestCmd(), m.dumpConfigCmd(), m.versionCmd(), m.healthCmd(), m.generateCmd(),
		m.usersCmd(), m.nodesCmd(), m.preauthkeysCmd(), m.apikeysCmd(), m.authCmd(), m.policyCmd(),
		m.tailnetCmd(), m.serversCmd(), m.auditCmd(), m.debugCmd(),
	)
	return root
}

// group is a command that only has others below it.
func (m *program) group(use, short string, aliases ...string) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Aliases: aliases,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			if cmd.SuggestionsMinimumDistance <= 0 {
				cmd.SuggestionsMinimumDistance = 2
			}
			msg := fmt.Sprintf("unknown command %q for %q", args[0], cmd.CommandPath())
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				msg += fmt.Sprintf(" (did you mean %s?)", strings.Join(near, " or "))
			}
			return usagef("%s", msg)
		},
	}
}

// verb is a command that does something. use begins with the name; args is
// the number of arguments it wants.
func (m *program) verb(use, short string, args int, run func(cmd *cobra.Command, args []string) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short,
		Args: func(cmd *cobra.Command, got []string) error {
			if len(got) != args {
				return usagef("%q takes %s, got %d", cmd.CommandPath(), count(args, "argument"), len(got))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, got []string) error {
			if err := m.checkOutput(); err != nil {
				return err
			}
			m.ran = true
			return run(cmd, got)
		},
	}
}

func count(n int, what string) string {
	switch n {
	case 0:
		return "no " + what
	case 1:
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// must is for mistakes in the tables of this package.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// required marks flags that a verb cannot do without.
func required(cmd *cobra.Command, flags ...string) {
	for _, f := range flags {
		must(cmd.MarkFlagRequired(f))
	}
}

func (m *program) overrides() config.Overrides { return config.Overrides{DataDir: m.dataDir} }

// loadClient reads the configuration for a verb that talks to a server.
func (m *program) loadClient() (*config.Config, error) {
	return config.LoadClient(config.Find(m.configPath, m.Vars), m.Vars, m.overrides())
}
