// Command signalbox is a coordination server for WireGuard meshes of stock
// Tailscale clients, and the command line to administer it.
package main

import (
	"os"

	"github.com/signalbox-net/signalbox/cmd/signalbox/internal/cli"
)

func main() { os.Exit(cli.Run(cli.System(), os.Args[1:])) }
