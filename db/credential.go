package db

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"hash/crc32"
	"strings"
)

// Kinds of credential.
const (
	KeyAuth = "auth"
	KeyAPI  = "api"
)

// ErrKeyShape is a string that cannot be one of our keys: wrong prefix, length,
// alphabet or check digits. The database need not be asked.
var ErrKeyShape = errors.New("malformed key")

const (
	base62       = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	keyIDLen     = 16 // "k" and 15 characters
	keySecretLen = 43 // 43 of 62 characters hold 256 bits
	keyCheckLen  = 6  // CRC-32 in base 62
)

// NewKey makes a credential of kind KeyAuth or KeyAPI:
//
//	tskey-<kind>-k<15 characters>-<43 characters><6 check characters>
//
// The prefix, the alphabet and the three hyphens are what stock clients and
// secret scanners expect; clients redact a key at its hyphens. The secret is
// shown once; only keyID and hash are to be stored.
func NewKey(kind string) (secret, keyID string, hash [32]byte) {
	if kind != KeyAuth && kind != KeyAPI {
		panic("db.NewKey: unknown kind " + kind)
	}
	keyID = "k" + randomText(base62, keyIDLen-1)
	body := "tskey-" + kind + "-" + keyID + "-" + randomText(base62, keySecretLen)
	secret = body + keyCheck(body)
	return secret, keyID, sha256.Sum256([]byte(secret))
}

// ParseKey takes a credential apart. It checks the shape and the check digits,
// which costs a microsecond and no database call, and returns ErrKeyShape when
// they are wrong. The hash is to be compared by KeyHashEqual with the stored one.
func ParseKey(s string) (kind, keyID string, hash [32]byte, err error) {
	rest, ok := strings.CutPrefix(s, "tskey-")
	if !ok {
		return "", "", hash, ErrKeyShape
	}
	kind, rest, _ = strings.Cut(rest, "-")
	keyID, rest, _ = strings.Cut(rest, "-")
	if kind != KeyAuth && kind != KeyAPI ||
		len(keyID) != keyIDLen || keyID[0] != 'k' || !isBase62(keyID) ||
		len(rest) != keySecretLen+keyCheckLen || !isBase62(rest) ||
		keyCheck(s[:len(s)-keyCheckLen]) != s[len(s)-keyCheckLen:] {
		return "", "", hash, ErrKeyShape
	}
	return kind, keyID, sha256.Sum256([]byte(s)), nil
}

// KeyHashEqual compares two hashes in constant time.
func KeyHashEqual(a, b [32]byte) bool { return subtle.ConstantTimeCompare(a[:], b[:]) == 1 }

func keyCheck(body string) string {
	n := crc32.ChecksumIEEE([]byte(body))
	var out [keyCheckLen]byte
	for i := range out {
		out[keyCheckLen-1-i] = base62[n%62]
		n /= 62
	}
	return string(out[:])
}

func isBase62(s string) bool {
	for _, c := range []byte(s) {
		if c-'0' > 9 && c-'A' > 25 && c-'a' > 25 {
			return false
		}
	}
	return true
}

// randomText draws n characters of the alphabet, each equally likely.
func randomText(alphabet string, n int) string {
	// Bytes at or above the largest multiple of the alphabet's size are drawn
	// again, else its first characters would come up more often.
	limit := byte(256/len(alphabet)*len(alphabet) - 1)
	out := make([]byte, 0, n)
	var buf [64]byte
	for len(out) < n {
		rand.Read(buf[:])
		for _, b := range buf {
			if b <= limit && len(out) < n {
				out = append(out, alphabet[int(b)%len(alphabet)])
			}
		}
	}
	return string(out)
}
