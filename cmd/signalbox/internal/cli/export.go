package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"

	"github.com/spf13/cobra"
)

func (m *program) tailnetCmd() *cobra.Command {
	g := m.group("tailnet", "Look at the tailnet as a whole")
	g.AddCommand(m.tailnetExport())
	return g
}

// tailnetExport writes the server's tailnet for the verbs that take --tailnet.
func (m *program) tailnetExport() *cobra.Command {
	var out string
	cmd := m.verb("export", "Write users, nodes, settings and policy as a tailnet file, without secrets", 0, func(cmd *cobra.Command, _ []string) error {
		switch out {
		case "json-line", "yaml", "table":
			return usagef("a tailnet file is JSON: -o json, or -o FILE")
		case "json", "-":
			out = ""
		}
		c, err := m.client()
		if err != nil {
			return err
		}
		// As the server says it: members that this version does not know stay.
		var doc json.RawMessage
		if err := c.callOwn(cmd.Context(), "GET", "/tailnet", nil, &doc); err != nil {
			return err
		}
		if _, _, err := parseTailnet(doc); err != nil {
			return err
		}
		var text bytes.Buffer
		if err := json.Indent(&text, doc, "", "  "); err != nil {
			return err
		}
		text.WriteByte('\n')
		if out == "" {
			_, err = m.Stdout.Write(text.Bytes())
			return err
		}
		return writeFile(out, text.Bytes())
	})
	cmd.Long = `The file is what --tailnet takes: with it a policy is checked, explained and
compared without a server. It holds names, addresses and public keys.`
	// In place of the output format that other verbs have.
	cmd.Flags().StringVarP(&out, "output", "o", "", "file to write instead of standard output")
	return cmd
}

// writeFile replaces a file as a whole, or makes one that only its owner reads.
// A pipe or a device is written to.
func writeFile(path string, text []byte) error {
	switch fi, err := os.Stat(path); {
	case err == nil && fi.Mode().IsRegular():
		return replaceFile(path, text)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	return os.WriteFile(path, text, 0o600)
}
