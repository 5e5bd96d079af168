package acl

import (
	"bytes"

	"github.com/tailscale/hujson"
)

// Format lays a policy out in the standard way: tabs, one entry a line where
// it does not fit on one, trailing commas, aligned values. Comments stay. It
// needs only correct HuJSON, not a correct policy; the error is of type
// [Errors].
func Format(src []byte) ([]byte, error) {
	p := &Policy{src: src, lines: lineStarts(src)}
	if at, err := scanDepth(src); err != nil {
		return nil, Errors{p.errorAt(at, err.Error())}
	}
	v, err := hujson.Parse(bytes.Clone(src))
	if err != nil {
		return nil, Errors{p.syntaxError(err)}
	}
	v.Format()
	return v.Pack(), nil
}
