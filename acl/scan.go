package acl

import (
	"bytes"
	"fmt"
)

const (
	maxSize  = 2 << 20 // bytes of policy text
	maxDepth = 64      // nesting of objects and arrays
)

// scanDepth refuses texts whose nesting would exhaust the stack of a recursive
// parser. It follows strings and comments just well enough not to be fooled
// by brackets inside them; everything else is the parser's business.
func scanDepth(src []byte) (at int, err error) {
	depth := 0
	for i := 0; i < len(src); i++ {
		switch src[i] {
		case '"':
			for i++; i < len(src) && src[i] != '"'; i++ {
				if src[i] == '\\' {
					i++
				}
			}
		case '/':
			i += commentLen(src[i:])
		case '{', '[':
			if depth++; depth > maxDepth {
				return i, fmt.Errorf("nested deeper than %d levels", maxDepth)
			}
		case '}', ']':
			depth--
		}
	}
	return 0, nil
}

// commentLen is the length of the comment at the start of b without its last
// byte; zero when b starts no comment.
func commentLen(b []byte) int {
	var end []byte
	switch {
	case bytes.HasPrefix(b, []byte("//")):
		end = []byte("\n")
	case bytes.HasPrefix(b, []byte("/*")):
		end = []byte("*/")
	default:
		return 0
	}
	n := bytes.Index(b[2:], end)
	if n < 0 {
		return len(b)
	}
	return 2 + n + len(end) - 1
}
