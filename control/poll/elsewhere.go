package poll

import (
	"errors"
	"time"

	"tailscale.com/tailcfg"
)

var errElsewhere = errors.New("another server has a newer stream of the same node")

// Since is when the node's stream here began; false when it has none.
func (s *Server) Since(id tailcfg.NodeID) (time.Time, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.nodes[id]
	if a == nil || a.session == nil {
		return time.Time{}, false
	}
	return a.session.Started, true
}

// Yield ends the node's stream here, which its client has left for another server.
func (s *Server) Yield(id tailcfg.NodeID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.nodes[id]
	if a == nil || a.session == nil {
		return
	}
	x := a.session
	s.Replaced.Add(1)
	x.cancel(errElsewhere)
	time.AfterFunc(replacedAfter, func() { x.abort(errElsewhere) })
}
