package serve

import (
	"runtime/debug"

	"github.com/signalbox-net/signalbox/web/pages"
)

// version is set by the linker for releases (-X).
var version = "0.1.0-dev"

// Version is this program's version.
func Version() string { return version }

// build is what /version tells.
func build() pages.Build {
	b := pages.Build{Version: version}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Commit = s.Value
		case "vcs.time":
			b.BuildTime = s.Value
		case "vcs.modified":
			b.Dirty = s.Value == "true"
		}
	}
	return b
}
