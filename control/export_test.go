package control

import (
	"context"
	"time"
)

// Reap does at once what Run does every 15 seconds.
func (s *Server) Reap(ctx context.Context, now time.Time) { s.reap(ctx, now) }

// Alarms are what Run looks at every minute and warns of.
var Alarms = alarms
