package control

import "context"

// Beat gives a sign of life at once.
func (s *Server) Beat(ctx context.Context) { s.beat(ctx) }

// ClearRelayMaps does at once what Run does every minute.
func (s *Server) ClearRelayMaps(ctx context.Context) { s.clearRelayMaps(ctx) }
