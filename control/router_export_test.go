package control

import "context"

// ProbeRouters does one round of probes. Probes without an answer are given up when round ends.
func (s *Server) ProbeRouters(ctx, round context.Context) { s.probeRouters(ctx, round) }
