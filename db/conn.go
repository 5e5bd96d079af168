package db

import (
	"context"
	"database/sql"
	"errors"
	"sync/atomic"

	"gorm.io/gorm"
)

var (
	errOver    = errors.New("db: used after its transaction ended")
	errTooSlow = errors.New("took too long")
)

// A conn is what gorm sees as its database: one transaction's connection. It
// stops working at the first storage fault. SQLite rolls a transaction back by
// itself on some faults, and what came after would be committed statement by
// statement.
type conn struct {
	gorm.ConnPool
	store *Store
	ctx   context.Context
	fault *storageFault // the first one; owned by the goroutine that runs the transaction
	over  atomic.Bool
}

func (c *conn) check(query string) error {
	switch {
	case c.over.Load():
		return errOver
	case c.fault != nil:
		return c.fault
	}
	if f := c.store.onStatement; f != nil {
		f(query)
	}
	return nil
}

func (c *conn) PrepareContext(ctx context.Context, query string) (*sql.Stmt, error) {
	if err := c.check(query); err != nil {
		return nil, err
	}
	return c.ConnPool.PrepareContext(ctx, query)
}

func (c *conn) ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error) {
	if err := c.check(query); err != nil {
		return nil, err
	}
	return c.ConnPool.ExecContext(ctx, query, args...)
}

func (c *conn) QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	if err := c.check(query); err != nil {
		return nil, err
	}
	return c.ConnPool.QueryContext(ctx, query, args...)
}

// err translates a statement's error, and notes it when it is a storage fault.
func (c *conn) err(err error) error {
	if err == nil {
		return nil
	}
	err = c.store.fail(c.ctx, err)
	if f, ok := errors.AsType[*storageFault](err); ok && c.fault == nil {
		c.fault = f
	}
	return err
}
