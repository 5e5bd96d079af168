package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"tailscale.com/types/key"

	"github.com/signalbox-net/signalbox/cmd/signalbox/internal/config"
	"github.com/signalbox-net/signalbox/cmd/signalbox/internal/serve"
)

// buildInfo is what `version -o json` prints, in Headscale's shape.
type buildInfo struct {
	Version   string `json:"version"`
	Commit    string `json:"commit"`
	BuildTime string `json:"buildTime"`
	Go        struct {
		Version string `json:"version"`
		OS      string `json:"os"`
		Arch    string `json:"arch"`
	} `json:"go"`
	Dirty bool `json:"dirty"`
}

func build() buildInfo {
	b := buildInfo{Version: serve.Version(), Commit: "unknown", BuildTime: "unknown"}
	b.Go.Version, b.Go.OS, b.Go.Arch = runtime.Version(), runtime.GOOS, runtime.GOARCH
	if bi, ok := debug.ReadBuildInfo(); ok {
		for _, s := range bi.Settings {
			switch s.Key {
			case "vcs.revision":
				b.Commit = s.Value
			case "vcs.time":
				b.BuildTime = s.Value
			case "vcs.modified":
				b.Dirty = s.Value == "true"
			}
		}
	}
	return b
}

func (m *program) versionCmd() *cobra.Command {
	return m.verb("version", "Print the version", 0, func(*cobra.Command, []string) error {
		b := build()
		return m.print(b, fmt.Sprintf("signalbox %s (commit %s, %s, %s/%s)", b.Version, b.Commit, b.Go.Version, b.Go.OS, b.Go.Arch))
	})
}

// pageWait is how long /health waits for a database that does not answer. A client that gave up before would not hear what it came for.
const pageWait = 5 * time.Second

func (m *program) healthCmd() *cobra.Command {
	cmd := m.verb("health", "Ask the server whether it is well", 0, func(cmd *cobra.Command, _ []string) error {
		c, err := m.client()
		if err != nil {
			return err
		}
		if m.timeout == "" {
			c.timeout += pageWait
		}
		// The page knows more than the API, which Headscale gave the database only.
		_, err = c.send(cmd.Context(), "GET", "/health", nil, nil, nil)
		if r := new(refusal); errors.As(err, &r) && len(r.failed) > 0 {
			return fmt.Errorf("the server is not well: %s. Its log says why", strings.Join(r.failed, ", "))
		}
		if err != nil {
			return err
		}
		var raw json.RawMessage
		if err := c.call(cmd.Context(), "GET", "/health", nil, &raw); err != nil {
			return err
		}
		var h struct{ DatabaseConnectivity bool }
		if err := json.Unmarshal(raw, &h); err != nil {
			return err
		}
		if !h.DatabaseConnectivity {
			return fmt.Errorf("the server runs, but its database does not answer")
		}
		return m.print(raw, "ok")
	})
	return cmd
}

func (m *program) generateCmd() *cobra.Command {
	g := m.group("generate", "Generate keys", "gen")
	g.AddCommand(m.verb("private-key", "Generate a key for noise.private_key_path or derp.server.private_key_path", 0,
		func(*cobra.Command, []string) error {
			text, err := key.NewMachine().MarshalText()
			if err != nil {
				return err
			}
			return m.print(map[string]string{"private_key": string(text)}, string(text))
		}))
	return g
}

func (m *program) debugCmd() *cobra.Command {
	g := m.group("debug", "For tests and for looking at trouble")
	var req struct {
		User   string   `json:"user"`
		Key    string   `json:"key"`
		Name   string   `json:"name"`
		Routes []string `json:"routes"`
	}
	cmd := m.verb("create-node", "Create a pretended device that waits for registration", 0, func(cmd *cobra.Command, _ []string) error {
		req.Key = lastElement(req.Key)
		if req.Routes == nil {
			req.Routes = []string{}
		}
		return m.nodeVerb(cmd, "POST", "/debug/node", req, "Node created: register it with 'signalbox auth register --user "+req.User+" --auth-id "+req.Key+"'")
	})
	cmd.Flags().StringVar(&req.Name, "name", "", "host name of the device")
	cmd.Flags().StringVarP(&req.User, "user", "u", "", "name of the user it is meant for")
	cmd.Flags().StringVarP(&req.Key, "key", "k", "", "registration id to wait under: 32 characters")
	cmd.Flags().StringSliceVarP(&req.Routes, "route", "r", nil, "routes that it offers")
	required(cmd, "name", "user", "key")
	g.AddCommand(cmd, m.debugC2N())
	return g
}

func (m *program) dumpConfigCmd() *cobra.Command {
	cmd := m.verb("dumpConfig", "Print the configuration in effect, without secrets", 0, func(*cobra.Command, []string) error {
		cfg, err := config.Load(config.Find(m.configPath, m.Vars), m.Vars, m.overrides())
		if err != nil {
			return err
		}
		text, err := cfg.Dump()
		if err != nil {
			return err
		}
		_, err = m.Stdout.Write(text)
		return err
	})
	cmd.Aliases = []string{"dump-config"}
	return cmd
}
