//go:build !unix

package db

import (
	"fmt"
	"os"
)

type fileLock struct{ f *os.File }

// lockFile does not lock here: the server runs on Unix systems, others only
// build its command line.
func lockFile(path string) (*fileLock, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the database: %w", err)
	}
	return &fileLock{f}, nil
}

func (l *fileLock) Close() error { return l.f.Close() }
