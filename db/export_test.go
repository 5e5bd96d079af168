package db

import "context"

// OnStatement has f see every statement of the store. It must be set before
// the store is used.
func (s *Store) OnStatement(f func(query string)) { s.onStatement = f }

// CheckPragma reads one pragma back as Open does.
func (s *Store) CheckPragma(ctx context.Context, name, want string) error {
	return s.checkSQLite(ctx, s.write, "test", map[string]string{name: want})
}

// ExecOnReader tries to write on the connections that only read.
func (s *Store) ExecOnReader(query string) error {
	_, err := s.read.Exec(query)
	return err
}

// ExecOnWriter runs a statement past the change log.
func (s *Store) ExecOnWriter(query string) error {
	_, err := s.write.Exec(query)
	return err
}

// Migrations lists a dialect's migrations.
func Migrations(dialect string) (names []string, err error) {
	all, err := migrations(dialect)
	for _, m := range all {
		names = append(names, m.name)
	}
	return names, err
}

// MigrationSQL is the text of a dialect's migrations, in order.
func MigrationSQL(dialect string) (texts []string, err error) {
	all, err := migrations(dialect)
	for _, m := range all {
		texts = append(texts, m.sql)
	}
	return texts, err
}

// Pending is how many writes wait for their turn.
func (s *Store) Pending() int {
	s.writer.mu.Lock()
	defer s.writer.mu.Unlock()
	return len(s.writer.pending)
}
