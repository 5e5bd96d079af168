package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

const (
	// beatEvery is how often servers give a sign of life and judge those of others.
	beatEvery = 15 * time.Second
	// aliveFor is how old the heartbeat of a server may be that is shown as alive.
	aliveFor = 90 * time.Second
	// goneFor is how long a server has to be silent until its relays are taken out of the map.
	goneFor = 10 * time.Minute
	// settled is how old a stream has to be before what the database says of it counts: until then its beginning may not be written.
	settled = 10 * time.Second
)

// signs are the signs of life of all servers as they came in here. A server lives as long as its heartbeat changes; what its clock says in it
// does not matter.
type signs struct {
	mu     sync.Mutex // guards the following fields
	looked time.Time  // when the rows were last read
	beats  map[int64]sign
}

type sign struct{ beat, at time.Time }

// silent is for how long nothing was heard of a server. One that is not known has always been silent.
func (g *signs) silent(id int64, now time.Time) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	if s, ok := g.beats[id]; ok {
		return now.Sub(s.at)
	}
	return goneFor
}

// gone reports whether a server that was heard of has been silent for long.
func (g *signs) gone(id int64, now time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	s, ok := g.beats[id]
	return ok && now.Sub(s.at) >= goneFor
}

// alive counts the servers whose last heartbeat, by their own clocks, is younger than within.
func (g *signs) alive(now time.Time, within time.Duration) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := 0
	for _, s := range g.beats {
		if now.Sub(s.beat) < within {
			n++
		}
	}
	return n
}

// take notes what the rows say. After a time in which this server could not look, because it was paused or the database away, nobody could be
// heard, so nobody counts as silent.
func (g *signs) take(list []*db.Instance, now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if now.Sub(g.looked) > 3*beatEvery {
		g.beats = map[int64]sign{}
	}
	g.looked = now
	for _, i := range list {
		if s, ok := g.beats[i.ID]; !ok || !s.beat.Equal(i.Heartbeat) {
			g.beats[i.ID] = sign{i.Heartbeat, now}
		}
	}
}

// errRival is what Rival reports.
var errRival = errors.New("another server runs under this one's name on the same database: each needs a host name or a listen_addr of its own")

// Rival is an error when another process has taken this server's row.
func (s *Server) Rival() error {
	if s.rival.Load() {
		return errRival
	}
	return nil
}

// Alive is how many servers live, as of the last look at their signs of life: this one, and those whose heartbeat is younger than aliveFor.
func (s *Server) Alive() int { return max(1, s.signs.alive(s.cfg.Now(), aliveFor)) }

// beat says that this server lives. A row that another process has taken is left to it while it lives.
func (s *Server) beat(ctx context.Context) {
	i := s.cfg.Instance
	var found bool
	s.do(ctx, "heartbeat", func(tx *db.Tx) error {
		list, err := tx.Instances()
		if err != nil {
			return err
		}
		rival := false
		for _, row := range list {
			other := row.Name == i.Name && row.Started.UnixMicro() != i.Started.UnixMicro()
			rival = rival || other && s.signs.silent(row.ID, s.cfg.Now()) < s.cfg.ReturnGrace
		}
		// Noted here, where transactions follow one another, so that of two beats the later one has the last word.
		if was := s.rival.Swap(rival); rival {
			found = found || !was
			return nil
		}
		i.Revision, i.Streams = s.cfg.Replica.Current().Revision(), s.Poll.Sessions.Load()
		return tx.Heartbeat(&i)
	})
	if found && ctx.Err() == nil {
		s.log.Error("heartbeat", "name", i.Name, "err", errRival)
	}
}

// reap takes nodes offline whose server went away and that did not come back to another within the grace, and settles with the other servers
// who holds which node.
func (s *Server) reap(ctx context.Context, now time.Time) {
	var list []*db.Instance
	err := s.cfg.Store.View(ctx, func(r *db.Reader) (err error) {
		list, err = r.Instances()
		return err
	})
	if err != nil {
		if ctx.Err() == nil {
			s.log.Error("read instances", "err", err)
		}
		return
	}
	s.signs.take(list, now)
	s.settle(ctx, now)
	if now.Sub(s.started) < s.cfg.ReturnGrace {
		return
	}
	var gone []tailcfg.NodeID
	for _, n := range s.cfg.Replica.Current().Nodes() {
		if n != nil && s.left(n.ID, &n.State, now) {
			gone = append(gone, n.ID)
		}
	}
	if len(gone) == 0 {
		return
	}
	s.do(ctx, "take nodes offline", func(tx *db.Tx) error {
		recs, err := tx.NodesByID(gone)
		if err != nil {
			return err
		}
		states := map[tailcfg.NodeID]db.NodeState{}
		for id, rec := range recs {
			if rec == nil || !s.left(id, &rec.State, now) {
				continue
			}
			st := rec.State
			st.Online, st.Instance, st.LastSeen = false, 0, tx.Now()
			states[id] = st
		}
		return tx.PutNodeStates(states)
	})
}

// left reports whether a node that is shown online has no stream: none here, if here is where it was, and none at a server that lives.
func (s *Server) left(id tailcfg.NodeID, st *db.NodeState, now time.Time) bool {
	if !st.Online || s.Poll.Attached(id) {
		return false
	}
	return st.Instance == s.cfg.Instance.ID || s.signs.silent(st.Instance, now) >= s.cfg.ReturnGrace
}

// settle compares the streams here with the rows. A node that is shown offline, since this server was paused and taken for dead, is here. A
// node that another living server has is there: the stream here is one that its client left behind without a word. A row that does not have the
// stream's beginning yet says nothing of it.
func (s *Server) settle(ctx context.Context, now time.Time) {
	var odd []tailcfg.NodeID
	for _, n := range s.cfg.Replica.Current().Nodes() {
		if n == nil || n.State.Online && n.State.Instance == s.cfg.Instance.ID {
			continue
		}
		if since, ok := s.Poll.Since(n.ID); ok && now.Sub(since) > settled && !s.cfg.Ledger.Unwritten(n.ID) {
			odd = append(odd, n.ID)
		}
	}
	if len(odd) == 0 {
		return
	}
	var elsewhere []tailcfg.NodeID
	s.do(ctx, "settle who holds nodes", func(tx *db.Tx) error {
		recs, err := tx.NodesByID(odd)
		if err != nil {
			return err
		}
		elsewhere = nil
		states := map[tailcfg.NodeID]db.NodeState{}
		for id, rec := range recs {
			switch {
			case rec == nil || rec.State.Online && rec.State.Instance == s.cfg.Instance.ID:
			case rec.State.Online && s.signs.silent(rec.State.Instance, now) < s.cfg.ReturnGrace:
				elsewhere = append(elsewhere, id)
			default:
				st := rec.State
				st.Online, st.Instance = true, s.cfg.Instance.ID
				states[id] = st
			}
		}
		return tx.PutNodeStates(states)
	})
	for _, id := range elsewhere {
		s.Poll.Yield(id)
	}
}

// clearRelayMaps takes the relays of servers that are gone out of the map, since clients try each. A server that comes back stores its own.
func (s *Server) clearRelayMaps(ctx context.Context) {
	now := s.cfg.Now()
	settings := s.cfg.Replica.Current().Settings()
	for _, name := range settings.MapNames() {
		owner := int64(1)
		if rest, ok := strings.CutPrefix(name, tailnet.SettingDERPMap+"/"); ok {
			var err error
			if owner, err = strconv.ParseInt(rest, 10, 64); err != nil {
				continue
			}
		}
		if owner == s.cfg.Instance.ID || !s.signs.gone(owner, now) || len(settings.MapOf(name).Regions) == 0 {
			continue
		}
		s.do(ctx, "clear a relay map", func(tx *db.Tx) error {
			if _, err := tx.PutSetting(name, json.RawMessage(`{"Regions": {}}`)); err != nil {
				return err
			}
			return tx.Audit("server.gone", fmt.Sprintf("server:%d", owner), nil, map[string]string{"relays": "removed from the map"})
		})
	}
}
