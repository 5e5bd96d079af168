package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/signalbox-net/signalbox/cmd/signalbox/internal/config"
	"github.com/signalbox-net/signalbox/cmd/signalbox/internal/serve"
)

// serverFlags are those of serve, and of configtest, which answers whether
// serve would start with them.
func serverFlags(cmd *cobra.Command, o *config.Overrides) {
	cmd.Flags().StringVar(&o.URL, "url", "", "URL for clients: sets server_url, the listen addresses, and the relay's host name")
	cmd.Flags().BoolVar(&o.AllowPlainHTTP, "allow-plain-http", false, "accept an http:// URL whose host is neither localhost nor private")
}

// loadServer reads and checks the configuration; followed is for
// config.CheckFiles.
func (m *program) loadServer(o config.Overrides, followed bool) (*config.Config, error) {
	o.DataDir = m.dataDir
	cfg, err := config.Load(config.Find(m.configPath, m.Vars), m.Vars, o)
	if err != nil {
		return cfg, err
	}
	return cfg, cfg.CheckFiles(followed, func(fault config.Fault) { serve.Check(cfg, fault) })
}

func (m *program) serveCmd() *cobra.Command {
	var o config.Overrides
	cmd := m.verb("serve", "Run the server", 0, func(cmd *cobra.Command, _ []string) error {
		cfg, err := m.loadServer(o, false)
		if err != nil {
			return configError(err)
		}
		return serve.Run(cmd.Context(), cfg, m.Stdout, m.Stderr)
	})
	cmd.Long = `Run the server. Without a configuration file it keeps everything in the data
directory, listens on 127.0.0.1:8080, and prints the command by which a device
joins. With --url http://HOST:PORT other machines can join as well.`
	serverFlags(cmd, &o)
	return cmd
}

func (m *program) configtestCmd() *cobra.Command {
	var o config.Overrides
	cmd := m.verb("configtest", "Check the configuration without starting the server", 0, func(*cobra.Command, []string) error {
		cfg, err := m.loadServer(o, true)
		var problems config.Problems
		if err != nil && !errors.As(err, &problems) {
			return err
		}
		if m.machine() {
			if err := m.encode(m.Stdout, testResult(cfg, problems)); err != nil {
				return err
			}
			if len(problems) > 0 {
				return configError(err)
			}
			return nil
		}
		for _, w := range cfg.Warnings {
			fmt.Fprintf(m.Stderr, "warning: %s\n", w)
		}
		if err != nil {
			return configError(err)
		}
		from := cfg.Path
		if from == "" {
			from = "no file, defaults only"
		}
		return m.print(nil, "ok: "+from)
	})
	serverFlags(cmd, &o)
	return cmd
}

// configError heads the list of problems, one a line.
func configError(err error) error {
	var problems config.Problems
	if !errors.As(err, &problems) {
		return err
	}
	head := "the configuration has a problem:"
	if len(problems) > 1 {
		head = fmt.Sprintf("the configuration has %d problems:", len(problems))
	}
	return fmt.Errorf("%s\n%w", head, err)
}

type testProblem struct {
	File    string `json:"file,omitempty"`
	Line    int    `json:"line,omitempty"`
	Column  int    `json:"column,omitempty"`
	Source  string `json:"source,omitempty"` // variable or flag
	Key     string `json:"key,omitempty"`
	Message string `json:"message"`
}

func testResult(cfg *config.Config, problems config.Problems) any {
	out := struct {
		OK       bool          `json:"ok"`
		File     string        `json:"file"`
		Problems []testProblem `json:"problems"`
		Warnings []string      `json:"warnings"`
	}{len(problems) == 0, cfg.Path, []testProblem{}, cfg.Warnings}
	if out.Warnings == nil {
		out.Warnings = []string{}
	}
	for _, p := range problems {
		out.Problems = append(out.Problems, testProblem{p.File, p.Line, p.Col, p.Env + p.Flag, p.Key, p.Msg})
	}
	return out
}
