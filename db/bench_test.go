package db_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/db/dbtest"
	"go4.org/mem"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// benchSite is a SQLite database with so many nodes.
func benchSite(b *testing.B, nodes int) (*site, []tailcfg.NodeID) {
	b.Helper()
	return benchSiteAt(b, db.Config{Path: filepath.Join(b.TempDir(), "bench.db")}, nodes)
}

func benchSiteAt(b *testing.B, c db.Config, nodes int) (*site, []tailcfg.NodeID) {
	b.Helper()
	store, err := db.Open(b.Context(), c)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { store.Close() })
	s := &site{Store: store, user: &db.User{Name: "anna"}}
	s.tailnet, _, err = store.Bootstrap(b.Context(), "default", func(tx *db.Tx) error { return tx.CreateUser(s.user) })
	if err != nil {
		b.Fatal(err)
	}
	var ids []tailcfg.NodeID
	for len(ids) < nodes {
		_, err := s.Update(b.Context(), s.tailnet, admin, func(tx *db.Tx) error {
			for range min(1000, nodes-len(ids)) {
				n := dbtest.NewNode(s.user)
				n.State = benchState(len(ids))
				if err := dbtest.Register(tx, n, pools, fmt.Sprintf("node%d", len(ids))); err != nil {
					return err
				}
				ids = append(ids, n.ID)
			}
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	return s, ids
}

func benchState(i int) db.NodeState {
	s := db.NodeState{DiscoKey: key.NewDisco().Public(), HomeDERP: 1 + i%20, Cap: 137, Online: true, Instance: 1,
		Hostinfo: &tailcfg.Hostinfo{
			IPNVersion: "1.102.5-t1234567", BackendLogID: fmt.Sprintf("%064d", i), OS: "linux", OSVersion: "6.1.0-26-amd64",
			Distro: "debian", DistroVersion: "12", Hostname: fmt.Sprintf("node%d", i), GoArch: "amd64", GoVersion: "go1.26.8",
			Services: []tailcfg.Service{{Proto: tailcfg.PeerAPI4, Port: 43210}, {Proto: tailcfg.PeerAPI6, Port: 43210}},
			NetInfo:  &tailcfg.NetInfo{PreferredDERP: 1, WorkingUDP: "true", DERPLatency: map[string]float64{"1-v4": 0.012, "2-v4": 0.034}},
		}}
	for j := range 4 {
		s.Endpoints = append(s.Endpoints, tailcfg.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(j)}), uint16(i)), Type: tailcfg.EndpointSTUN})
	}
	return s
}

// cpu reports the CPU time of the process for each operation: wall time of a
// write is mostly the disk's.
func cpu(b *testing.B, per int) func() {
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	start := used()
	return func() {
		b.ReportMetric(float64((used()-start).Microseconds())/float64(b.N*per), "cpu-us/op")
	}
}

func BenchmarkRegister(b *testing.B) {
	for _, nodes := range []int{0, 10_000} {
		b.Run(fmt.Sprintf("nodes=%d", nodes), func(b *testing.B) {
			s, _ := benchSite(b, nodes)
			_, keyID, hash := db.NewKey(db.KeyAuth)
			_, err := s.Update(b.Context(), s.tailnet, admin, func(tx *db.Tx) error {
				return tx.CreateAuthKey(&db.AuthKey{KeyID: keyID, Hash: hash, Reusable: true, User: s.user.ID})
			})
			if err != nil {
				b.Fatal(err)
			}
			ready := make([]*db.Node, 512) // keys cost more than rows to make
			for i := range ready {
				ready[i] = dbtest.NewNode(s.user)
				ready[i].State = benchState(i)
			}
			i := 0
			register := func() error {
				n := *ready[i%len(ready)]
				i++
				if i > len(ready) {
					// Another key, made from the one that is used.
					raw := [32]byte{31: 1}
					binary.LittleEndian.PutUint64(raw[:], uint64(i))
					n.NodeKey = key.NodePublicFromRaw32(mem.B(raw[:]))
					n.MachineKey = key.MachinePublicFromRaw32(mem.B(raw[:]))
				}
				_, err := s.Update(b.Context(), s.tailnet, admin, func(tx *db.Tx) error {
					if _, err := tx.RedeemAuthKey(keyID, hash, n.MachineKey); err != nil {
						return err
					}
					// All of one name, which is the hard case for FreeName.
					if err := dbtest.Register(tx, &n, pools, "localhost"); err != nil {
						return err
					}
					return tx.Audit("node.create", n.GivenName, nil, n)
				})
				return err
			}
			done := cpu(b, 1)
			for b.Loop() {
				if err := register(); err != nil {
					b.Fatal(err)
				}
			}
			done()
		})
	}
}

func BenchmarkRegisterConcurrently(b *testing.B) {
	s, _ := benchSite(b, 0)
	var i atomic.Int64
	b.SetParallelism(64)
	done := cpu(b, 1)
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if err := s.register(fmt.Sprintf("n%d", i.Add(1))); err != nil {
				b.Error(err)
			}
		}
	})
	done()
}

func BenchmarkPutNodeStates(b *testing.B) {
	s, ids := benchSite(b, 10_000)
	for _, n := range []int{1, 50, 500} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			states := map[tailcfg.NodeID]db.NodeState{}
			for i := range n {
				states[ids[i*len(ids)/n]] = benchState(i)
			}
			done := cpu(b, 1)
			for b.Loop() {
				_, err := s.Update(b.Context(), s.tailnet, admin, func(tx *db.Tx) error { return tx.PutNodeStates(states) })
				if err != nil {
					b.Fatal(err)
				}
			}
			done()
		})
	}
}

// BenchmarkPostgresTwoServers writes reports of 50 nodes a transaction from two
// servers at once, to the empty database that SIGNALBOX_BENCH_POSTGRES names:
// the server of the tests keeps its files in memory, and here the disk counts.
func BenchmarkPostgresTwoServers(b *testing.B) {
	dsn := os.Getenv("SIGNALBOX_BENCH_POSTGRES")
	if dsn == "" {
		b.Skip("SIGNALBOX_BENCH_POSTGRES is not set")
	}
	c := db.Config{Driver: db.DriverPostgres, PostgresDSN: dsn, WriteTimeout: time.Minute} // the nodes are made a thousand at a time
	s, ids := benchSiteAt(b, c, 10_000)
	other, err := db.Open(b.Context(), c)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { other.Close() })
	const batch = 50
	stores := []*db.Store{s.Store, other}
	b.Run("50", func(b *testing.B) {
		var writers atomic.Int64
		done := cpu(b, 1)
		b.RunParallel(func(p *testing.PB) {
			n := int(writers.Add(1))
			states := map[tailcfg.NodeID]db.NodeState{}
			for i := range batch {
				states[ids[(n*batch+i)%len(ids)]] = benchState(i)
			}
			for p.Next() {
				_, err := stores[n%2].Update(b.Context(), s.tailnet, admin, func(tx *db.Tx) error { return tx.PutNodeStates(states) })
				if err != nil {
					b.Error(err)
					return
				}
			}
		})
		done()
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "tx/s")
		b.ReportMetric(batch*float64(b.N)/b.Elapsed().Seconds(), "rows/s")
	})
}

func BenchmarkFollow50(b *testing.B) {
	s, ids := benchSite(b, 10_000)
	states := map[tailcfg.NodeID]db.NodeState{}
	for i := range 50 {
		states[ids[i*200]] = benchState(i)
	}
	rev, err := s.Update(b.Context(), s.tailnet, admin, func(tx *db.Tx) error { return tx.PutNodeStates(states) })
	if err != nil {
		b.Fatal(err)
	}
	done := cpu(b, 1)
	for b.Loop() {
		batch, err := s.Follow(b.Context(), s.tailnet, rev-1)
		if err != nil || len(batch.Nodes) != 50 {
			b.Fatal(len(batch.Nodes), err)
		}
	}
	done()
}

func BenchmarkLoad10000(b *testing.B) {
	s, _ := benchSite(b, 10_000)
	done := cpu(b, 1)
	for b.Loop() {
		batch, err := s.Load(b.Context(), s.tailnet)
		if err != nil || len(batch.Nodes) != 10_000 {
			b.Fatal(len(batch.Nodes), err)
		}
	}
	done()
}
