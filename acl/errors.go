package acl

import (
	"fmt"
	"strings"
)

// Error is one fault of a policy text.
type Error struct {
	Line, Column int    // 1-based; Column counts characters
	Path         string // of the offending value, such as acls[2].dst[0]
	Message      string // bare, in the hosted service's wording where that is known
}

func (e *Error) Error() string {
	return fmt.Sprintf("line %d, column %d: %s", e.Line, e.Column, e.Message)
}

// Errors are all faults that were found, the decisive one first. Parse and
// Compile return either this type or no error at all.
type Errors []*Error

func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, x := range e {
		lines[i] = x.Error()
	}
	return strings.Join(lines, "\n")
}

// Message is the bare text of the decisive error.
func (e Errors) Message() string {
	if len(e) == 0 {
		return ""
	}
	return e[0].Message
}

// Unwrap lets errors.As find the single faults.
func (e Errors) Unwrap() []error {
	out := make([]error, len(e))
	for i, x := range e {
		out[i] = x
	}
	return out
}

// Failure is a test of the policy that does not hold.
type Failure struct {
	Line, Column int
	Path         string // such as tests[0].accept[1]
	Message      string // what was expected and what is the case
}

// Warning is a remark about a valid policy.
type Warning struct {
	Line, Column int
	Path         string
	Message      string
}
