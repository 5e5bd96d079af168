// Package serve runs the server: it wires the packages of Signalbox together
// as the configuration says.
package serve

import (
	"context"
	"errors"
	"io"

	"github.com/signalbox-net/signalbox/cmd/signalbox/internal/config"
)

// Run serves until ctx ends. The line for joining a device goes to stdout, the
// log to stderr.
func Run(ctx context.Context, cfg *config.Config, stdout, stderr io.Writer) error {
	return errors.New("the server is not wired up yet")
}
