package apiv1

import (
	"bytes"
	"cmp"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

func (s *server) getPolicy(r *http.Request) (any, error) {
	var v *db.PolicyVersion
	err := s.view(r, func(rd *db.Reader) (err error) {
		v, err = rd.Policy()
		return err
	})
	if errors.Is(err, db.ErrNotFound) {
		return nil, notFound("no policy is stored")
	}
	if err != nil {
		return nil, err
	}
	return tagged{policyOf(v), policyTag(v)}, nil
}

func policyOf(v *db.PolicyVersion) PolicyResponse {
	return PolicyResponse{Policy: string(v.Text), UpdatedAt: optional(v.Created)}
}

// policyTag is the ETag of the live policy: its version, in quotes.
func policyTag(v *db.PolicyVersion) string { return `"` + strconv.FormatInt(v.ID, 10) + `"` }

// condition is what a request demands of the live policy before it may be
// replaced: the tags of If-Match (RFC 9110, 13.1.1). Nil demands nothing.
type condition []string

func conditionOf(r *http.Request) condition {
	var c condition
	for _, line := range r.Header.Values("If-Match") {
		for tag := range strings.SplitSeq(line, ",") {
			c = append(c, strings.TrimSpace(tag))
		}
	}
	return c
}

// holds also takes a version without quotes, which is what people type.
func (c condition) holds(live *db.PolicyVersion) bool {
	return c == nil || live != nil && slices.ContainsFunc(c, func(tag string) bool {
		return tag == "*" || tag == policyTag(live) || tag == strconv.FormatInt(live.ID, 10)
	})
}

func (c condition) failed(live *db.PolicyVersion) error {
	e := &statusError{status: http.StatusPreconditionFailed, detail: "no policy is stored yet"}
	if live != nil {
		e.detail = "the policy was changed meanwhile: version " + strconv.FormatInt(live.ID, 10) + " is live, not " + strings.Join(c, ", ")
	}
	return e
}

// setPolicy makes a text live that parses, compiles and passes its own tests
// against the tailnet as it is. Any other text changes nothing.
func (s *server) setPolicy(w http.ResponseWriter, r *http.Request) (any, error) {
	var req SetPolicyRequest
	if err := decode(w, r, &req, maxPolicyBody, false); err != nil {
		return nil, err
	}
	if err := text("body.note", req.Note, maxNote); err != nil {
		return nil, err
	}
	v, err := s.storePolicy(r, edit{"policy.set", req.Policy, req.Note})
	if err != nil {
		return nil, err
	}
	return tagged{policyOf(v), policyTag(v)}, nil
}

// maxNote is the longest note of a policy version in bytes.
const maxNote = 500

// edit is a new text for the policy, with the action for the audit log.
type edit struct{ action, text, note string }

// errMoved ends a transaction in which a compiled policy turned out to belong
// to an older tailnet.
var errMoved = errors.New("the tailnet moved on")

// storeTries is how often a policy is compiled because the tailnet moves on
// between compiling and storing.
const storeTries = 5

// storePolicy makes a text the live policy, unless it is already. What becomes
// live is what was compiled and tested: in the transaction nothing that the
// verdict depends on may have moved since. Nodes that come and go all the time
// do not hold up an edit, though: the last try puts up with them, since a node
// that joins a moment later is not waited for either.
func (s *server) storePolicy(r *http.Request, e edit) (*db.PolicyVersion, error) {
	if s.PolicyMode == "file" {
		return nil, &statusError{status: http.StatusBadRequest, detail: "the policy comes from a file (policy.mode is file): change the file"}
	}
	matches := conditionOf(r)
	facts := []db.Kind{db.KindUser, db.KindSetting, db.KindNode, db.KindPrimary}
	for try := 1; ; try++ {
		if try == storeTries {
			facts = facts[:2]
		}
		c, err := s.compile(r, e.text)
		if err != nil {
			return nil, err
		}
		var v *db.PolicyVersion
		err = s.write(r, func(tx *db.Tx) error {
			if v, err = tx.Policy(); err != nil && !errors.Is(err, db.ErrNotFound) {
				return err
			}
			switch {
			case !matches.holds(v):
				return matches.failed(v)
			case v != nil && bytes.Equal(v.Text, []byte(e.text)):
				return nil
			}
			if moved, err := tx.MovedSince(c.snap.Revision(), facts...); err != nil || moved {
				return cmp.Or(err, errMoved)
			}
			v, err = e.replace(tx, v)
			return err
		})
		if !errors.Is(err, errMoved) {
			return v, err
		}
		if try == storeTries {
			return nil, conflict("users or settings change at the same time, try again")
		}
		s.catchUp(r)
	}
}

func (e edit) replace(tx *db.Tx, was *db.PolicyVersion) (*db.PolicyVersion, error) {
	var revision db.Revision
	if was != nil {
		revision = was.Revision
	}
	v, err := tx.SetPolicy([]byte(e.text), e.note, &revision)
	if err != nil {
		return nil, err
	}
	return v, tx.Audit(e.action, "policy:"+strconv.FormatInt(v.ID, 10), policyMark(was), policyMark(v))
}

// policyMark is a policy in an audit row: the version, whose text is kept
// beside the log.
func policyMark(v *db.PolicyVersion) any {
	if v == nil {
		return nil
	}
	return struct {
		Version int64 `json:"version"`
		Bytes   int   `json:"bytes"`
	}{v.ID, len(v.Text)}
}

func (s *server) checkPolicy(w http.ResponseWriter, r *http.Request) (any, error) {
	var req PolicyRequest
	if err := decode(w, r, &req, maxPolicyBody, false); err != nil {
		return nil, err
	}
	if _, err := s.compile(r, req.Policy); err != nil {
		return nil, err
	}
	return EmptyResponse{}, nil
}

// compiled is a policy that was tried on a snapshot.
type compiled struct {
	snap   *tailnet.Snapshot
	policy *acl.Policy
	access *acl.Access
}

// slot waits until a policy may be compiled. Few are at a time, since one may
// be large and wrong on purpose. The caller calls free when it is done.
func (s *server) slot(r *http.Request) (free func(), err error) {
	select {
	case s.compiles <- struct{}{}:
		return func() { <-s.compiles }, nil
	case <-r.Context().Done():
		return nil, &statusError{status: http.StatusTooManyRequests, detail: "too many policies are being checked, try again later"}
	}
}

// compile tries a policy text on the current tailnet, its tests included.
func (s *server) compile(r *http.Request, text string) (*compiled, error) {
	if !utf8.ValidString(text) || strings.IndexByte(text, 0) >= 0 {
		return nil, badField("body.policy", "must be text")
	}
	free, err := s.slot(r)
	if err != nil {
		return nil, err
	}
	defer free()
	snap := s.Replica.Current()
	x := acl.Examine([]byte(text), snap.ACLTailnet())
	if faults := x.Faults(); len(faults) > 0 {
		return nil, policyErrors(faults)
	}
	return &compiled{snap, x.Policy, x.Access}, nil
}

// compileStored compiles a version that was accepted before: names in it that the tailnet refutes by now denote nobody, as they do while it is
// live.
func compileStored(text []byte, snap *tailnet.Snapshot) (*acl.Access, error) {
	p, err := acl.Parse(text)
	if err != nil {
		return nil, policyFault(err)
	}
	a, _, err := acl.CompileStored(p, snap.ACLTailnet())
	if err != nil {
		return nil, policyFault(err)
	}
	return a, nil
}

// policyFault turns what acl found into an answer.
func policyFault(err error) error {
	var faults acl.Errors
	if errors.As(err, &faults) && len(faults) > 0 {
		return policyErrors(faults)
	}
	var one *acl.Error
	if errors.As(err, &one) {
		return policyErrors([]*acl.Error{one})
	}
	return err
}
