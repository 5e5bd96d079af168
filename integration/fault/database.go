package fault

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"fmt"

	_ "github.com/glebarez/go-sqlite" // reads the server's file, as a process of its own
)

// readDatabase opens a database file for reading, beside the server.
func readDatabase(path string) (*sql.DB, error) {
	return sql.Open("sqlite", "file:"+path+"?mode=ro&_pragma=query_only(1)&_pragma=busy_timeout(5000)")
}

// inspect looks for what must never be in a database file, whatever happened
// to the process that wrote it.
func inspect(ctx context.Context, path string) (wrong []string, err error) {
	db, err := readDatabase(path)
	if err != nil {
		return nil, err
	}
	defer db.Close()
	var verdict string
	if err := db.QueryRowContext(ctx, "PRAGMA integrity_check(5)").Scan(&verdict); err != nil {
		return nil, err
	}
	if verdict != "ok" {
		wrong = append(wrong, "integrity_check: "+verdict)
	}
	// A file may be written to while it is looked at: one snapshot of it.
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return nil, err
	}
	defer tx.Rollback()
	broken, err := inspectRows(ctx, tx, append(rules, danglingRows))
	return append(wrong, broken...), err
}

// inspectRows looks for rows that break a rule, and holes in the audit log.
func inspectRows(ctx context.Context, tx *sql.Tx, rules []rule) (wrong []string, err error) {
	for _, rule := range rules {
		rows, err := tx.QueryContext(ctx, rule.query)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", rule.what, err)
		}
		for rows.Next() {
			var which string
			if err := rows.Scan(&which); err != nil {
				return nil, err
			}
			wrong = append(wrong, rule.what+": "+which)
		}
		if err := rows.Err(); err != nil {
			return nil, err
		}
	}
	broken, err := checkAudit(ctx, tx)
	return append(wrong, broken...), err
}

// A rule is a query that finds nothing in a database that holds.
type rule struct{ what, query string }

// danglingRows is for SQLite; PostgreSQL lets none come about.
var danglingRows = rule{"row that refers to nothing", `SELECT "table" || ' ' || coalesce(rowid, '') || ' to ' || parent FROM pragma_foreign_key_check`}

// rules are for every database.
var rules = []rule{
	{"node without an address", "SELECT id FROM nodes WHERE ipv4 IS NULL OR ipv6 IS NULL"},
	{"node without an owner", "SELECT id FROM nodes WHERE user_id IS NULL AND tags IN ('', '[]')"},
	{"node without state", "SELECT id FROM nodes WHERE id NOT IN (SELECT node_id FROM node_states)"},
	{"address of two nodes", "SELECT ipv4 FROM nodes GROUP BY ipv4 HAVING count(*) > 1 UNION ALL SELECT ipv6 FROM nodes GROUP BY ipv6 HAVING count(*) > 1"},
	{"name of two nodes", "SELECT given_name FROM nodes GROUP BY given_name HAVING count(*) > 1"},
	{"key of two nodes", "SELECT node_key FROM nodes GROUP BY node_key HAVING count(*) > 1"},
	{"one-time key used twice", "SELECT id FROM auth_keys WHERE NOT reusable AND uses > 1"},
	{"uses of a key without their machines", `SELECT k.id FROM auth_keys k WHERE k.uses <>
		(SELECT count(*) FROM auth_key_uses u WHERE u.auth_key_id = k.id)`},
	{"spent key without its node", `SELECT u.auth_key_id || ' of ' || u.machine_key FROM auth_key_uses u
		WHERE u.machine_key NOT IN (SELECT machine_key FROM nodes) AND u.machine_key NOT IN (SELECT machine_key FROM tombstones)`},
	{"gap in the revisions before", `SELECT revision FROM (SELECT DISTINCT revision, lag(revision) OVER (ORDER BY revision) AS before
		FROM (SELECT DISTINCT revision FROM changes) AS revs) AS pairs WHERE revision <> before + 1`},
	{"change after the last revision", "SELECT revision FROM changes WHERE revision > (SELECT revision FROM tailnets WHERE id = tailnet_id)"},
	{"last revision without its change", "SELECT revision FROM tailnets WHERE revision NOT IN (SELECT revision FROM changes)"},
	{"policy of a revision without it", "SELECT revision FROM policies WHERE revision NOT IN (SELECT revision FROM changes)"},
}

// checkAudit recomputes the audit log: numbers without a gap, each event with
// the hash of the one before, and the head as the tailnet's row has it.
func checkAudit(ctx context.Context, tx *sql.Tx) (wrong []string, err error) {
	rows, err := tx.QueryContext(ctx, `SELECT tailnet_id, number, time, actor_kind, actor_id, actor_name, key_id, source, action, target,
		coalesce(before, ''), coalesce(after, ''), prev_hash FROM audit_events ORDER BY number`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var last int64
	prev := make([]byte, sha256.Size)
	for rows.Next() {
		var tailnet, number, time, actorID int64
		var kind, name, keyID, source, action, target, before, after string
		var hash []byte
		if err := rows.Scan(&tailnet, &number, &time, &kind, &actorID, &name, &keyID, &source, &action, &target, &before, &after, &hash); err != nil {
			return nil, err
		}
		if number != last+1 {
			wrong = append(wrong, fmt.Sprintf("audit event %d follows %d", number, last))
		}
		if string(hash) != string(prev) {
			wrong = append(wrong, fmt.Sprintf("audit event %d (%s) does not carry the hash of the one before", number, action))
		}
		text, err := json.Marshal([]any{tailnet, number, time, kind, actorID, name, keyID, source, action, target, before, after, hex.EncodeToString(hash)})
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(text)
		last, prev = number, sum[:]
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	var number int64
	var head []byte
	if err := tx.QueryRowContext(ctx, "SELECT audit_number, audit_head FROM tailnets").Scan(&number, &head); err != nil {
		return nil, err
	}
	if number != last || string(head) != string(prev) {
		wrong = append(wrong, fmt.Sprintf("the head of the audit log is event %d, the last event %d, or their hashes differ", number, last))
	}
	return wrong, nil
}
