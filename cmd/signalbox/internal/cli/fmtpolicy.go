package cli

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/signalbox-net/signalbox/acl"
)

// policyFmt gives a policy the standard HuJSON layout. Comments stay.
func (m *program) policyFmt() *cobra.Command {
	var path string
	var write, list bool
	cmd := m.verbFile("fmt", "Print a policy in the standard layout", &path, func(*cobra.Command) error {
		text, err := m.readPolicy(path)
		if err != nil {
			return err
		}
		out, err := acl.Format(text)
		if err != nil {
			return m.refuseErrors(path, text, err)
		}
		switch {
		case list:
			if !bytes.Equal(out, text) {
				fmt.Fprintln(m.Stdout, path)
				return codedError{errTold, exitError}
			}
			return nil
		case write && path != "-":
			if bytes.Equal(out, text) {
				return nil
			}
			return replaceFile(path, out)
		}
		_, err = m.Stdout.Write(out)
		return err
	})
	cmd.Flags().BoolVarP(&write, "write", "w", false, "write it to the file instead")
	cmd.Flags().BoolVarP(&list, "list", "l", false, "only say whether the file differs; code 1 when it does")
	return cmd
}

// replaceFile is all or nothing: a policy cut short by a full disk would be
// taken up by the server that follows the file.
func replaceFile(path string, text []byte) error {
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".policy-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(text)
	if err == nil {
		err = f.Chmod(fi.Mode().Perm())
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
