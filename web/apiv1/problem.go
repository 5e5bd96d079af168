package apiv1

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/signalbox-net/signalbox/acl"
	"github.com/signalbox-net/signalbox/control/c2n"
	"github.com/signalbox-net/signalbox/control/register"
	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/web/auth"
)

// A statusError is an error with the HTTP status that it means.
type statusError struct {
	status int
	detail string
	fields []ProblemField
}

func (e *statusError) Error() string { return e.detail }

// badField refuses one part of the request; location is as in ProblemField.
func badField(location, format string, args ...any) error {
	msg := fmt.Sprintf(format, args...)
	return &statusError{http.StatusBadRequest, location + ": " + msg, []ProblemField{{Message: msg, Location: location}}}
}

func notFound(format string, args ...any) error {
	return &statusError{status: http.StatusNotFound, detail: fmt.Sprintf(format, args...)}
}

func conflict(format string, args ...any) error {
	return &statusError{status: http.StatusConflict, detail: fmt.Sprintf(format, args...)}
}

// policyErrors renders the faults of a policy text as FILE:LINE:COL: message,
// one a line, the decisive one first. There is no file here, so it is called
// policy.
func policyErrors(faults []*acl.Error) error {
	const most = 100
	e := &statusError{status: http.StatusBadRequest}
	for i, f := range faults {
		if i == most {
			e.detail += fmt.Sprintf("\nand %d more", len(faults)-most)
			break
		}
		loc := fmt.Sprintf("policy:%d:%d", f.Line, f.Column)
		if i > 0 {
			e.detail += "\n"
		}
		e.detail += loc + ": " + f.Message
		e.fields = append(e.fields, ProblemField{Message: f.Message, Location: loc})
	}
	return e
}

// problem says how an error looks to the caller. It is the only place that
// knows: a text that is not listed here never leaves the server.
func problem(err error) *Problem {
	var (
		status  *statusError
		tooBig  *http.MaxBytesError
		invalid *db.InvalidError
		limit   *auth.LimitError
	)
	switch {
	case errors.As(err, &status):
		return newProblem(status.status, status.detail, status.fields)
	case errors.As(err, &tooBig):
		return newProblem(http.StatusRequestEntityTooLarge, fmt.Sprintf("the body is longer than %d bytes", tooBig.Limit), nil)
	case errors.As(err, &limit):
		return newProblem(http.StatusTooManyRequests, limit.Error(), nil)
	case errors.Is(err, auth.ErrCredential):
		return newProblem(http.StatusUnauthorized, auth.ErrCredential.Error(), nil)
	case errors.As(err, &invalid):
		return newProblem(http.StatusBadRequest, invalid.Field+": "+invalid.Msg, []ProblemField{{Message: invalid.Msg, Location: "body." + invalid.Field}})
	case errors.Is(err, register.ErrNoLogin), errors.Is(err, register.ErrUnknownUser):
		return newProblem(http.StatusNotFound, err.Error(), nil)
	case errors.Is(err, register.ErrDecided), errors.Is(err, register.ErrFull):
		return newProblem(http.StatusConflict, err.Error(), nil)
	case errors.Is(err, register.ErrNeedsUser), errors.Is(err, register.ErrTagsRefused):
		return newProblem(http.StatusBadRequest, err.Error(), nil)
	case errors.Is(err, c2n.ErrUnknownNode):
		return newProblem(http.StatusNotFound, err.Error(), nil)
	case errors.Is(err, c2n.ErrOffline):
		return newProblem(http.StatusConflict, c2n.ErrOffline.Error(), nil)
	case errors.Is(err, c2n.ErrTimeout):
		return newProblem(http.StatusGatewayTimeout, c2n.ErrTimeout.Error(), nil)
	case errors.Is(err, c2n.ErrBusy):
		return newProblem(http.StatusTooManyRequests, c2n.ErrBusy.Error(), nil)
	case errors.Is(err, c2n.ErrTooLarge):
		return newProblem(http.StatusBadGateway, c2n.ErrTooLarge.Error(), nil)
	case errors.Is(err, c2n.ErrBadAnswer):
		return newProblem(http.StatusBadGateway, c2n.ErrBadAnswer.Error(), nil)
	case errors.Is(err, db.ErrNotFound):
		return newProblem(http.StatusNotFound, "no such thing", nil)
	case errors.Is(err, db.ErrExists):
		return newProblem(http.StatusConflict, err.Error(), nil)
	case errors.Is(err, db.ErrStale):
		return newProblem(http.StatusConflict, "it was changed meanwhile, look again and repeat", nil)
	case errors.Is(err, db.ErrInUse):
		return newProblem(http.StatusConflict, "it is still in use", nil)
	case errors.Is(err, db.ErrLimit):
		return newProblem(http.StatusTooManyRequests, "too many of these exist, try again later", nil)
	case errors.Is(err, db.ErrPoolExhausted):
		return newProblem(http.StatusConflict, "no free address is left", nil)
	case errors.Is(err, db.ErrUnavailable), errors.Is(err, db.ErrCorrupt), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return newProblem(http.StatusServiceUnavailable, "the database does not take writes at the moment, nothing was changed", nil)
	default:
		return newProblem(http.StatusInternalServerError, "internal error", nil)
	}
}

// grpcCodes are the numbers that Headscale 0.29's gateway put beside a status.
var grpcCodes = map[int]int{
	http.StatusBadRequest:            3,  // INVALID_ARGUMENT
	http.StatusUnauthorized:          16, // UNAUTHENTICATED
	http.StatusNotFound:              5,  // NOT_FOUND
	http.StatusMethodNotAllowed:      12, // UNIMPLEMENTED
	http.StatusConflict:              6,  // ALREADY_EXISTS
	http.StatusPreconditionFailed:    9,  // FAILED_PRECONDITION
	http.StatusRequestEntityTooLarge: 3,
	http.StatusUnsupportedMediaType:  3,
	http.StatusTooManyRequests:       8,  // RESOURCE_EXHAUSTED
	http.StatusInternalServerError:   13, // INTERNAL
	http.StatusBadGateway:            14, // UNAVAILABLE
	http.StatusServiceUnavailable:    14, // UNAVAILABLE
	http.StatusGatewayTimeout:        4,  // DEADLINE_EXCEEDED
}

func newProblem(status int, detail string, fields []ProblemField) *Problem {
	return &Problem{
		Title: http.StatusText(status), Status: status, Detail: detail, Errors: fields,
		Code: grpcCodes[status], Message: detail, Details: []any{},
	}
}

// refuse answers with the problem that err is.
func (s *server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	p := problem(err)
	// That a node does not answer is the answer.
	if p.Status >= 500 && p.Status != http.StatusGatewayTimeout && r.Context().Err() == nil {
		s.log.Error("api v1", "method", r.Method, "route", pattern(r), "status", p.Status, "err", err)
	}
	if p.Status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "5")
	}
	if p.Status == http.StatusRequestEntityTooLarge {
		w.Header().Set("Connection", "close")
	}
	writeJSON(w, p.Status, "application/problem+json", p)
}

// writeJSON sends v, which only holds values that encode.
func writeJSON(w http.ResponseWriter, status int, contentType string, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		status, contentType = http.StatusInternalServerError, "application/problem+json"
		b, _ = json.Marshal(newProblem(status, "internal error", nil))
	}
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	w.Write(append(b, '\n'))
}
