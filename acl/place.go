package acl

import (
	"bytes"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/tailscale/hujson"
)

// lineStarts lists the offset of each line's first byte.
func lineStarts(src []byte) []int {
	starts := make([]int, 1, 1+bytes.Count(src, []byte("\n")))
	for i, c := range src {
		if c == '\n' {
			starts = append(starts, i+1)
		}
	}
	return starts
}

// place turns an offset into a line and a column in characters, both from 1.
func (p *Policy) place(at int) (line, column int) {
	at = min(max(at, 0), len(p.src))
	line = p.lineOf(at)
	return line, 1 + utf8.RuneCount(p.src[p.lines[line-1]:at])
}

// lineOf is the line of an offset.
func (p *Policy) lineOf(at int) int {
	i, found := slices.BinarySearch(p.lines, at)
	if found {
		i++
	}
	return i
}

// pathOf names the innermost value that contains the offset, or the member
// whose name starts there. Only errors need it, so nothing is kept for it.
func pathOf(v *hujson.Value, at int) string {
	var b strings.Builder
	for v != nil {
		switch x := v.Value.(type) {
		case *hujson.Object:
			v = nil
			for i := range x.Members {
				m := &x.Members[i]
				if m.Name.StartOffset <= at && at < m.Value.EndOffset {
					pathMember(&b, m)
					if at >= m.Value.StartOffset {
						v = &m.Value
					}
					break
				}
			}
		case *hujson.Array:
			v = nil
			for i := range x.Elements {
				e := &x.Elements[i]
				if e.StartOffset <= at && at < e.EndOffset {
					b.WriteString("[" + strconv.Itoa(i) + "]")
					v = e
					break
				}
			}
		default:
			v = nil
		}
	}
	return b.String()
}

func pathMember(b *strings.Builder, m *hujson.ObjectMember) {
	lit, _ := m.Name.Value.(hujson.Literal)
	name := lit.String()
	if strings.ContainsFunc(name, func(r rune) bool {
		return r != '_' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}) {
		b.WriteString("[" + strconv.Quote(name) + "]")
		return
	}
	if b.Len() > 0 {
		b.WriteByte('.')
	}
	b.WriteString(name)
}

func (p *Policy) errorAt(at int, message string) *Error {
	line, column := p.place(at)
	return &Error{Line: line, Column: column, Path: pathOf(p.root, at), Message: message}
}
