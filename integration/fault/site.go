package fault

import (
	"context"
	"database/sql"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"

	"github.com/signalbox-net/signalbox/integration/postgres"
)

// A Site is two servers on one PostgreSQL, each with its own line to it, and
// the address that clients know, where a balancer takes each connection to a
// server that lives.
type Site struct {
	t     testing.TB
	DB    *postgres.Server
	Lines [2]*postgres.Line
	Servers
	Front string // host:port of the balancer
}

// Servers are the two of a site.
type Servers struct{ A, B *Server }

func (s Servers) both() []*Server { return []*Server{s.A, s.B} }

// StartSite starts both servers at the same moment on an empty database.
func StartSite(t testing.TB, db *postgres.Server) *Site {
	t.Helper()
	x := &Site{t: t, DB: db}
	x.A, x.B = NewServer(t), NewServer(t)
	l, err := net.Listen("tcp", frontHost(x.A.Host)+":8080")
	if err != nil {
		t.Fatal(err)
	}
	x.Front = l.Addr().String()
	b := &balancer{l: l, backends: []string{x.A.Addr, x.B.Addr}}
	var carriers sync.WaitGroup
	carriers.Go(func() { b.run(&carriers) })
	t.Cleanup(func() {
		l.Close()
		carriers.Wait()
	})
	var starts sync.WaitGroup
	for i, s := range x.both() {
		x.Lines[i] = x.DB.Line()
		s.ByEnv = true
		s.Env = append(x.Lines[i].Env(),
			"SIGNALBOX_SERVER_URL=http://"+x.Front, "SIGNALBOX_LISTEN_ADDR="+s.Addr, "SIGNALBOX_DERP_SERVER_HOST_NAME="+s.Host)
		starts.Go(s.Start)
		t.Cleanup(s.Kill) // before its line ends, or it would complain
	}
	starts.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return x
}

// frontHost is an address beside that of a server.
func frontHost(host string) string { return strings.TrimSuffix(host, ".1") + ".2" }

// A balancer takes connections to the first of its backends that answers.
type balancer struct {
	l        net.Listener
	backends []string
}

func (b *balancer) run(carriers *sync.WaitGroup) {
	for {
		c, err := b.l.Accept()
		if err != nil {
			return
		}
		carriers.Go(func() { b.carry(c) })
	}
}

func (b *balancer) carry(near net.Conn) {
	defer near.Close()
	for _, addr := range b.backends {
		far, err := net.DialTimeout("tcp", addr, time.Second)
		if err != nil {
			continue
		}
		defer far.Close()
		var ways sync.WaitGroup
		ways.Go(func() { io.Copy(far, near); far.Close(); near.Close() })
		ways.Go(func() { io.Copy(near, far); far.Close(); near.Close() })
		ways.Wait()
		return
	}
}

// inspect looks in PostgreSQL for what must never be there.
func (x *Site) inspect(ctx context.Context) (wrong []string, err error) {
	db, err := sql.Open("pgx", x.DB.DSN())
	if err != nil {
		return nil, err
	}
	defer db.Close()
	tx, err := db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelRepeatableRead, ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer tx.Rollback()
	return inspectRows(ctx, tx, rules)
}
