//go:build !linux

package listener

import (
	"errors"
	"time"
)

func setUserTimeout(uintptr, time.Duration) error { return nil }

func peerUID(uintptr) (uint32, error) {
	return 0, errors.New("peer credentials are only available on Linux")
}
