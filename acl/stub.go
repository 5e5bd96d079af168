package acl

import (
	"errors"

	"tailscale.com/tailcfg"
)

var errNotBuilt = errors.New("acl: the compiler is not built yet")

type program struct{}

// Policy is a parsed policy.
type Policy struct{}

// Parse reads a policy text.
func Parse(src []byte) (*Policy, error) { return nil, errNotBuilt }

// Compile computes the access that p means for t.
func Compile(p *Policy, t *Tailnet) (*Access, error) { return nil, errNotBuilt }

// Check runs the policy's tests and sshTests.
func Check(p *Policy, t *Tailnet, a *Access) []Failure {
	return []Failure{{Message: errNotBuilt.Error()}}
}

// Warnings lists remarks about a valid policy.
func Warnings(p *Policy, t *Tailnet) []Warning { return []Warning{{Message: errNotBuilt.Error()}} }

// MayTag reports whether the user, or a node that has the given tags, may take
// on the wanted tag.
func (p *Policy) MayTag(t *Tailnet, user tailcfg.UserID, tags []string, want string) bool {
	return false
}
