package apiv1

import (
	"bytes"
	"errors"
	"net/http"
	"strconv"
	"unicode/utf8"

	"github.com/signalbox-net/signalbox/acl"
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
	return policyOf(v), nil
}

func policyOf(v *db.PolicyVersion) PolicyResponse {
	return PolicyResponse{Policy: string(v.Text), UpdatedAt: optional(v.Created)}
}

// setPolicy makes a text live that parses, compiles and passes its own tests
// against the tailnet as it is. Any other text changes nothing.
func (s *server) setPolicy(w http.ResponseWriter, r *http.Request) (any, error) {
	var req PolicyRequest
	if err := decode(w, r, &req, maxPolicyBody, false); err != nil {
		return nil, err
	}
	if s.PolicyMode == "file" {
		return nil, &statusError{status: http.StatusBadRequest, detail: "the policy comes from a file (policy.mode is file): change the file"}
	}
	if err := s.compile(r, req.Policy); err != nil {
		return nil, err
	}
	var v *db.PolicyVersion
	err := s.write(r, func(tx *db.Tx) error {
		was, err := tx.Policy()
		if err != nil && !errors.Is(err, db.ErrNotFound) {
			return err
		}
		if was != nil && bytes.Equal(was.Text, []byte(req.Policy)) {
			v = was
			return nil
		}
		if v, err = tx.SetPolicy([]byte(req.Policy), "", nil); err != nil {
			return err
		}
		return tx.Audit("policy.set", "policy:"+strconv.FormatInt(v.ID, 10), policyMark(was), policyMark(v))
	})
	if err != nil {
		return nil, err
	}
	return policyOf(v), nil
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
	if err := s.compile(r, req.Policy); err != nil {
		return nil, err
	}
	return EmptyResponse{}, nil
}

// compile tries a policy text on the current tailnet. Few texts are compiled
// at a time, since one may be large and wrong on purpose.
func (s *server) compile(r *http.Request, text string) error {
	if !utf8.ValidString(text) || bytes.IndexByte([]byte(text), 0) >= 0 {
		return badField("body.policy", "must be text")
	}
	select {
	case s.compiles <- struct{}{}:
		defer func() { <-s.compiles }()
	case <-r.Context().Done():
		return &statusError{status: http.StatusTooManyRequests, detail: "too many policies are being checked, try again later"}
	}
	facts := s.Replica.Current().ACLTailnet()
	p, err := acl.Parse([]byte(text))
	if err != nil {
		return policyFault(err)
	}
	access, err := acl.Compile(p, facts)
	if err != nil {
		return policyFault(err)
	}
	failures := acl.Check(p, facts, access)
	if len(failures) == 0 {
		return nil
	}
	faults := make([]*acl.Error, len(failures))
	for i, f := range failures {
		faults[i] = &acl.Error{Line: f.Line, Column: f.Column, Path: f.Path, Message: f.Message}
	}
	return policyErrors(faults)
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
