package serve

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

// A follower takes a file into the tailnet whenever it changes. A file that is missing, empty or wrong never replaces what is there: it is
// reported, in the log and in health, until it is right.
type follower struct {
	name string // of the health check
	path string
	take func(ctx context.Context, text []byte) error

	// facts is what else than the text take judges by. When it has changed, what was refused is tried again. Nil when there is nothing.
	facts func() any

	log *slog.Logger
	now chan struct{} // one slot: look at once

	mu    sync.Mutex // guards the following fields
	err   error
	moved chan struct{} // closed at the next report
}

// lookEvery is how often a file is looked at.
const lookEvery = time.Second

func (s *server) followers() []*follower {
	var out []*follower
	add := func(name, path string, take func(context.Context, []byte) error) {
		out = append(out, &follower{name: name, path: path, take: take, log: s.log, now: make(chan struct{}, 1), moved: make(chan struct{})})
	}
	if s.cfg.Policy.Mode == "file" {
		add("policy_file", s.cfg.Policy.Path, s.takePolicy)
		out[0].facts = func() any { return s.replica.Current().ACLTailnet() }
	}
	if p := s.cfg.DNS.ExtraRecordsPath; p != "" {
		add("extra_records", p, s.takeRecords)
	}
	return out
}

func (f *follower) fault() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// kick makes the follower look now.
func (f *follower) kick() {
	select {
	case f.now <- struct{}{}:
	default:
	}
}

func (f *follower) run(ctx context.Context) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var seen string // content last taken or refused, when looked is set
	var judged any  // facts at that time
	looked := false
	facts := func() any {
		if f.facts == nil {
			return nil
		}
		return f.facts()
	}
	for {
		if text, err := os.ReadFile(f.path); err != nil {
			f.report(err)
		} else if !looked || string(text) != seen || errors.Is(f.fault(), db.ErrUnavailable) || f.fault() != nil && facts() != judged {
			judged = facts() // before: take may judge by later ones
			err := f.take(ctx, text)
			seen, looked = string(text), true
			f.report(err)
		} else if errors.As(f.fault(), new(*os.PathError)) {
			f.report(nil)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-f.now:
			looked = false
		}
	}
}

func (f *follower) report(err error) {
	f.mu.Lock()
	old := f.err
	f.err = err
	close(f.moved)
	f.moved = make(chan struct{})
	f.mu.Unlock()
	if err != nil && (old == nil || old.Error() != err.Error()) {
		f.log.Error("file not taken; what was there stays in force", "file", f.path, "err", err)
	} else if err == nil && old != nil {
		f.log.Info("file taken again", "file", f.path)
	}
}

// takePolicy makes the text of the policy file the live policy.
func (s *server) takePolicy(ctx context.Context, text []byte) error {
	if strings.TrimSpace(string(text)) == "" {
		return fmt.Errorf("policy.path: %s is empty", s.cfg.Policy.Path)
	}
	snap := s.replica.Current()
	if v := snap.Policy().Version; v != nil && string(v.Text) == string(text) {
		return nil
	}
	x := acl.Examine(text, snap.ACLTailnet())
	if faults := x.Faults(); len(faults) > 0 {
		first, what, more := faults[0], "", ""
		if len(x.Errors) == 0 {
			what = "a test of the policy fails: "
		}
		if len(faults) > 1 {
			more = fmt.Sprintf(" (and %d more)", len(faults)-1)
		}
		return fmt.Errorf("%s:%d:%d: %s%s%s", s.cfg.Policy.Path, first.Line, first.Column, what, first.Message, more)
	}
	if x.Policy.AllowsAll() {
		s.log.Warn("the policy file has neither acls nor grants: every device reaches every device", "file", s.cfg.Policy.Path)
	}
	_, err := s.ledger.Do(ctx, db.Actor{Kind: "system", Name: "policy file"}, func(tx *db.Tx) error {
		v, err := tx.SetPolicy(text, "from "+s.cfg.Policy.Path, nil)
		if err != nil {
			return err
		}
		return tx.Audit("policy.set", fmt.Sprintf("policy:%d", v.ID), nil, map[string]string{"file": s.cfg.Policy.Path})
	})
	return err
}

// maxRecords bounds an extra records file: every client is sent all of them.
const maxRecords = 10_000

// takeRecords reads a JSON array of {"name", "type", "value"}, as Headscale's extra_records_path.
func (s *server) takeRecords(ctx context.Context, text []byte) error {
	var list []struct{ Name, Type, Value string }
	if err := json.Unmarshal(text, &list); err != nil {
		return fmt.Errorf("extra records: %w", err)
	}
	if len(list) > maxRecords {
		return fmt.Errorf("extra records: %d records, at most %d are possible", len(list), maxRecords)
	}
	records := make([]tailcfg.DNSRecord, 0, len(list))
	for i, r := range list {
		rec, err := record(r.Name, r.Type, r.Value)
		if err != nil {
			return fmt.Errorf("extra record %d: %w", i+1, err)
		}
		records = append(records, rec)
	}
	// Files that tools write have no stable order; without one every rewrite would be sent to every client.
	slices.SortFunc(records, func(a, b tailcfg.DNSRecord) int {
		return strings.Compare(a.Name+" "+a.Type+" "+a.Value, b.Name+" "+b.Type+" "+b.Value)
	})
	_, err := s.ledger.Do(ctx, db.Actor{Kind: "system", Name: "extra records file"}, func(tx *db.Tx) error {
		return putSetting(tx, tailnet.SettingExtraRecords, records)
	})
	return err
}

func record(name, kind, value string) (tailcfg.DNSRecord, error) {
	addr, err := netip.ParseAddr(value)
	if err != nil {
		return tailcfg.DNSRecord{}, fmt.Errorf("%s: value %q is not an IP address", name, value)
	}
	switch {
	case strings.Trim(name, ".") == "":
		return tailcfg.DNSRecord{}, errors.New("name is empty")
	case kind == "" || kind == "A" && addr.Is4() || kind == "AAAA" && addr.Is6():
		return tailcfg.DNSRecord{Name: strings.ToLower(strings.TrimSuffix(name, ".")), Type: kind, Value: addr.String()}, nil
	}
	return tailcfg.DNSRecord{}, fmt.Errorf("%s: type %q does not fit the address %s; A and AAAA are possible", name, kind, value)
}
