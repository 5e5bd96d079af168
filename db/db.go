package db

import "context"

// A Store is an open database.
type Store struct{}

// Open opens, checks and migrates the database.
func Open(ctx context.Context, c Config) (*Store, error) { return nil, errNotImplemented }

// A Reader reads one consistent state of the database.
type Reader struct{}

// A Tx reads and writes within one Update.
type Tx struct{ *Reader }
