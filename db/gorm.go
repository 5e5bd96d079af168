package db

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"gorm.io/gorm"
	"gorm.io/gorm/logger"
)

func gormConfig(log *slog.Logger) *gorm.Config {
	return &gorm.Config{
		SkipDefaultTransaction: true,
		DisableAutomaticPing:   true,
		NowFunc:                func() time.Time { return time.Now().UTC() },
		Logger:                 gormLog{log},
		// TranslateError stays off: it drops the name of the violated
		// constraint. Store.fail translates.
	}
}

// rowBatch is how many rows one INSERT has. The SQLite driver's time to bind
// grows with the square of a statement's variables (it looks each one up in a
// list), while PostgreSQL pays for each round trip.
func (s *Store) rowBatch() int {
	if s.pg {
		return 500
	}
	return 32
}

// gormLog passes gorm's own messages on. Statements are not logged: their
// values are people's data, and errors reach the caller anyway.
type gormLog struct{ log *slog.Logger }

func (l gormLog) LogMode(logger.LogLevel) logger.Interface { return l }
func (l gormLog) Info(ctx context.Context, format string, args ...any) {
	l.log.DebugContext(ctx, "gorm", "msg", fmt.Sprintf(format, args...))
}
func (l gormLog) Warn(ctx context.Context, format string, args ...any) {
	l.log.WarnContext(ctx, "gorm", "msg", fmt.Sprintf(format, args...))
}
func (l gormLog) Error(ctx context.Context, format string, args ...any) {
	l.log.ErrorContext(ctx, "gorm", "msg", fmt.Sprintf(format, args...))
}
func (l gormLog) Trace(context.Context, time.Time, func() (string, int64), error) {}
