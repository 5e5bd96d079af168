package c2n

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/db"
)

// system is who moves mail. Who asked for a call is in the audit log.
var system = db.Actor{Kind: "system"}

// elapsedBytes is how an answer in the mail begins: the time it took in microseconds, big-endian.
const elapsedBytes = 8

// words are errors as the mail has them.
var words = map[string]error{
	"elsewhere": errElsewhere, "busy": ErrBusy, "timeout": ErrTimeout, "large": ErrTooLarge, "bad": ErrBadAnswer, "unknown": ErrUnknownNode,
}

func wordOf(err error) string {
	for word, e := range words {
		if errors.Is(err, e) {
			return word
		}
	}
	return "bad"
}

// dropIn bounds the removal of mail that nobody waits for any more.
const dropIn = time.Second

// there makes a call through a stream of another server.
func (s *Server) there(ctx context.Context, node tailcfg.NodeID, holder int64, req *request) (answer, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return answer{}, err
	}
	id := random()
	got, err := s.await(id)
	if err != nil {
		return answer{}, err
	}
	defer s.forget(id)
	_, err = s.cfg.Ledger.Do(ctx, system, func(tx *db.Tx) error {
		return tx.PostMail(&db.Mail{From: s.cfg.Instance, To: holder, Call: id, Node: node, Body: body})
	})
	if errors.Is(err, db.ErrLimit) {
		err = ErrBusy
	}
	if err != nil {
		return answer{}, fmt.Errorf("call node %d at server %d: %w", node, holder, err)
	}
	select {
	case m := <-got:
		return readAnswer(m)
	case <-ctx.Done():
	}
	// A server that is paused must not make the call when it goes on.
	drop, cancel := context.WithTimeout(context.WithoutCancel(ctx), dropIn)
	defer cancel()
	if _, err := s.cfg.Ledger.Do(drop, system, func(tx *db.Tx) error { return tx.DropMail(id) }); err != nil {
		s.log.Warn("mail is left to be swept", "err", err)
	}
	return answer{}, ctx.Err()
}

// readAnswer takes an answer out of its mail.
func readAnswer(m *db.Mail) (answer, error) {
	if m.Error != "" {
		if err := words[m.Error]; err != nil {
			return answer{}, err
		}
		return answer{}, ErrBadAnswer
	}
	if len(m.Body) < elapsedBytes {
		return answer{}, ErrBadAnswer
	}
	return answer{body: m.Body[elapsedBytes:], elapsed: time.Duration(binary.BigEndian.Uint64(m.Body)) * time.Microsecond}, nil
}

// await registers somebody who waits for an answer by mail.
func (s *Server) await(id string) (<-chan *db.Mail, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.mail) >= inAll {
		return nil, ErrBusy
	}
	ch := make(chan *db.Mail, 1)
	s.mail[id] = ch
	return ch, nil
}

func (s *Server) forget(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.mail, id)
}

// again is how long the mail waits after the database refused it.
const again = time.Second

// Run moves mail until ctx ends: it makes the calls of other servers and hands out their answers to ours.
func (s *Server) Run(ctx context.Context) error {
	box, cancel := s.cfg.Store.Mailbox()
	defer cancel()
	var calls sync.WaitGroup
	defer calls.Wait()
	places := make(chan struct{}, serving)
	well := true
	for {
		var retry <-chan time.Time
		err := s.collect(ctx, &calls, places)
		if err != nil && ctx.Err() == nil {
			if well {
				s.log.Error("take mail of other servers", "err", err)
			}
			retry = time.After(again)
		}
		well = err == nil
		select {
		case <-ctx.Done():
			return nil
		case <-box:
		case <-retry:
		}
	}
}

// collect takes all mail for this server.
func (s *Server) collect(ctx context.Context, calls *sync.WaitGroup, places chan struct{}) error {
	for {
		waits := false
		err := s.cfg.Store.View(ctx, func(r *db.Reader) (err error) {
			waits, err = r.In(s.cfg.Ledger.Tailnet()).HasMail(s.cfg.Instance)
			return err
		})
		if err != nil || !waits {
			return err
		}
		var list []*db.Mail
		if _, err := s.cfg.Ledger.Do(ctx, system, func(tx *db.Tx) (err error) {
			list, err = tx.TakeMail(s.cfg.Instance)
			return err
		}); err != nil {
			return err
		}
		for _, m := range list {
			s.open(ctx, m, calls, places)
		}
	}
}

// open does what a mail is for.
func (s *Server) open(ctx context.Context, m *db.Mail, calls *sync.WaitGroup, places chan struct{}) {
	if m.Answer {
		s.mu.Lock()
		ch := s.mail[m.Call]
		delete(s.mail, m.Call)
		s.mu.Unlock()
		if ch != nil {
			ch <- m
		}
		return
	}
	select {
	case places <- struct{}{}:
		calls.Go(func() {
			defer func() { <-places }()
			s.serve(ctx, m)
		})
	default:
		// Who asked gives up by itself: one answer more would be more work in a moment that has too much of it.
		s.log.Warn("a call of another server is dropped: too many are under way", "server", m.From)
	}
}

// serve makes the call of another server and posts the answer.
func (s *Server) serve(ctx context.Context, m *db.Mail) {
	a, err := s.callFor(ctx, m)
	if ctx.Err() != nil || errors.Is(err, ErrTimeout) {
		return // whoever asked began earlier, and has given up
	}
	out := &db.Mail{From: s.cfg.Instance, To: m.From, Call: m.Call, Answer: true, Node: m.Node}
	if err != nil {
		out.Error = wordOf(err)
	} else {
		out.Body = append(binary.BigEndian.AppendUint64(nil, uint64(a.elapsed.Microseconds())), a.body...)
	}
	if _, err := s.cfg.Ledger.Do(ctx, system, func(tx *db.Tx) error {
		posted := *out
		return tx.PostMail(&posted)
	}); err != nil {
		s.log.Warn("the answer of a node is lost", "node", m.Node, "err", err)
	}
}

func (s *Server) callFor(ctx context.Context, m *db.Mail) (answer, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.cfg.Timeout, ErrTimeout)
	defer cancel()
	var req request
	if err := json.Unmarshal(m.Body, &req); err != nil {
		return answer{}, ErrBadAnswer
	}
	n := s.cfg.Replica.Current().Node(m.Node)
	if n == nil {
		return answer{}, ErrUnknownNode
	}
	a, err := s.here(ctx, n, &req, false)
	if errors.Is(err, context.DeadlineExceeded) {
		err = ErrTimeout
	}
	return a, err
}
