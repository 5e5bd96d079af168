package db_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/db/dbtest"
)

var postgres dbtest.Postgres

func TestMain(m *testing.M) {
	code := m.Run()
	postgres.Stop()
	os.Exit(code)
}

func openSQLite(t *testing.T, c db.Config) *db.Store {
	t.Helper()
	if c.Path == "" {
		c.Path = filepath.Join(t.TempDir(), "test.db")
	}
	s, err := db.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func openPostgres(t *testing.T, c db.Config) *db.Store {
	t.Helper()
	c.Driver, c.PostgresDSN = db.DriverPostgres, postgres.DSN(t)
	s, err := db.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSQLite(t *testing.T)   { dbtest.RunConformance(t, openSQLite) }
func TestPostgres(t *testing.T) { dbtest.RunConformance(t, openPostgres) }
