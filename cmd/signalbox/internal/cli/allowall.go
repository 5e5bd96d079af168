package cli

import (
	"bytes"
	"strings"
)

// allowsAll reports whether the text is one HuJSON object with neither acls
// nor grants, which means that everything is allowed. What is not a whole
// object is left to the server to complain about. The scan keeps no stack, so
// no nesting can hurt it.
func allowsAll(text []byte) bool {
	depth, objects := 0, 0
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c == '"':
			end := stringEnd(text, i)
			if depth == 1 && isMember(text[end:]) {
				switch strings.ToLower(string(text[i+1 : max(i+1, end-1)])) {
				case "acls", "grants":
					return false
				}
			}
			i = end - 1
		case c == '/':
			i = commentEnd(text, i) - 1
		case c == '{' || c == '[':
			if depth == 0 {
				if c == '[' {
					return false
				}
				objects++
			}
			depth++
		case c == '}' || c == ']':
			depth--
		case depth == 0 && !strings.ContainsRune(" \t\r\n", rune(c)):
			return false
		}
	}
	return depth == 0 && objects == 1
}

// stringEnd is the index behind the string that begins at i.
func stringEnd(b []byte, i int) int {
	for i++; i < len(b); i++ {
		switch b[i] {
		case '\\':
			i++
		case '"':
			return i + 1
		}
	}
	return len(b)
}

// commentEnd is the index behind the comment that begins at i, or behind the
// slash if none does.
func commentEnd(b []byte, i int) int {
	rest := b[i:]
	end := -1
	switch {
	case bytes.HasPrefix(rest, []byte("//")):
		end = bytes.IndexByte(rest, '\n') + 1
	case bytes.HasPrefix(rest, []byte("/*")):
		if n := bytes.Index(rest[2:], []byte("*/")); n >= 0 {
			end = n + 4
		}
	default:
		return i + 1
	}
	if end <= 0 {
		return len(b)
	}
	return i + end
}

// isMember reports whether a colon comes next: the string before was a name.
func isMember(b []byte) bool {
	for i := 0; i < len(b); i++ {
		switch c := b[i]; c {
		case ' ', '\t', '\r', '\n':
		case '/':
			i = commentEnd(b, i) - 1
		default:
			return c == ':'
		}
	}
	return false
}
