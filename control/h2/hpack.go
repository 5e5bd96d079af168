package h2

import (
	"errors"
	"strconv"

	"golang.org/x/net/http2"
)

var errHead = errors.New("h2: the response's header fields are larger than a frame")

// appendStatus encodes :status (RFC 7541: indexes 8 to 14 of the static table).
func appendStatus(b []byte, status int) []byte {
	switch status {
	case 200:
		return append(b, 0x88)
	case 204:
		return append(b, 0x89)
	case 304:
		return append(b, 0x8b)
	case 400:
		return append(b, 0x8c)
	case 404:
		return append(b, 0x8d)
	case 500:
		return append(b, 0x8e)
	}
	return appendString(append(b, 0x08), strconv.Itoa(status)) // name by index, not added to the table
}

// appendField encodes a field whose name and value are spelt out and which no table remembers (RFC 7541, 6.2.2).
func appendField(b []byte, name, value string) []byte {
	return appendString(appendString(append(b, 0), name), value)
}

func appendString(b []byte, s string) []byte {
	n := len(s)
	if n < 127 {
		b = append(b, byte(n))
	} else {
		b = append(b, 127)
		for n -= 127; n >= 128; n >>= 7 {
			b = append(b, byte(n)|0x80)
		}
		b = append(b, byte(n))
	}
	return append(b, s...)
}

// continueHead is the HEADERS frame that lets a waiting peer send its body.
func continueHead(id uint32) []byte {
	block := appendStatus(nil, 100)
	return append(appendFrame(nil, len(block), http2.FrameHeaders, http2.FlagHeadersEndHeaders, id), block...)
}
