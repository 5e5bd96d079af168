package db

import (
	"errors"
	"fmt"
)

// What callers branch on, by errors.Is.
var (
	ErrNotFound      = errors.New("not found")
	ErrExists        = errors.New("already exists")    // see ExistsError
	ErrStale         = errors.New("changed meanwhile") // an expected revision is not the current one
	ErrInUse         = errors.New("still in use")      // rows depend on what should be deleted
	ErrPoolExhausted = errors.New("address pool is exhausted")
	ErrLimit         = errors.New("limit reached") // no room, and nothing that may be evicted
	ErrKeyUsed       = errors.New("auth key has already been used")
	ErrKeyExpired    = errors.New("auth key has expired")
	ErrKeyRevoked    = errors.New("auth key has been revoked")

	// ErrUnavailable is a fault of the storage: nothing was changed, the same
	// call may work later.
	ErrUnavailable = errors.New("database is unavailable")

	// ErrCorrupt is a damaged database. It is an ErrUnavailable too.
	ErrCorrupt = fmt.Errorf("database is damaged (%w)", ErrUnavailable)
)

// An ExistsError is a violated uniqueness. errors.Is(err, ErrExists) holds.
type ExistsError struct {
	Field string // the record's field, as in "NodeKey", "IPv4", "GivenName"; "" when unknown
}

func (e *ExistsError) Error() string {
	if e.Field == "" {
		return ErrExists.Error()
	}
	return e.Field + " " + ErrExists.Error()
}

func (e *ExistsError) Unwrap() error { return ErrExists }

// An InvalidError is a value that the database refuses to hold.
type InvalidError struct {
	Field string
	Msg   string
}

func (e *InvalidError) Error() string { return e.Field + ": " + e.Msg }
