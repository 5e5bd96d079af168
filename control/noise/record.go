package noise

import (
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"

	"golang.org/x/crypto/chacha20poly1305"
)

// A record is what travels after the handshake: type 4, length of the rest (2 bytes, big-endian), sealed text. Its nonce is its number in its
// direction, big-endian, where Noise has little-endian (tailscale.com/control/controlbase).
const (
	recordType   = 4
	recordHeader = 3
	maxRecord    = 4096

	// maxPlaintext is what fits into one record.
	maxPlaintext = maxRecord - recordHeader - tagSize
)

// counter is a nonce.
type counter [chacha20poly1305.NonceSize]byte

var errExhausted = errors.New("noise: the connection has used up its nonces")

// next moves on, and is false when all numbers were used. The greatest is reserved by Noise (section 5.1).
func (n *counter) next() bool {
	v := binary.BigEndian.Uint64(n[4:])
	if v == math.MaxUint64-1 {
		return false
	}
	binary.BigEndian.PutUint64(n[4:], v+1)
	return true
}

var recordPool = sync.Pool{New: func() any { return new([maxRecord]byte) }}

// A recordReader reads the text out of records. It has one reader at a time. While it waits for a record it holds no buffer.
type recordReader struct {
	w     *wire
	aead  cipher.AEAD
	nonce counter
	err   error // of an earlier record: what comes after it cannot be trusted

	head [recordHeader]byte // takes the first bytes of a record, without a buffer
	buf  *[maxRecord]byte   // nil between records
	n    int                // bytes in buf, 0 without one
	done int                // of them, those of records that were opened
	text []byte             // in buf: opened and not yet read
}

func (r *recordReader) Read(p []byte) (int, error) {
	for len(r.text) == 0 {
		if err := r.record(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.text)
	r.text = r.text[n:]
	return n, nil
}

// record opens the next one.
func (r *recordReader) record() error {
	if r.err != nil {
		return r.err
	}
	if r.buf != nil {
		r.n = copy(r.buf[:], r.buf[r.done:r.n])
		r.done = 0
		if r.n == 0 {
			recordPool.Put(r.buf)
			r.buf = nil
		}
	}
	if err := r.fill(recordHeader); err != nil {
		return err
	}
	size := recordHeader + int(binary.BigEndian.Uint16(r.buf[1:]))
	if r.buf[0] != recordType || size > maxRecord {
		r.err = fmt.Errorf("noise: a record of type %d and %d bytes", r.buf[0], size)
		return r.err
	}
	if err := r.fill(size); err != nil {
		return err
	}
	sealed := r.buf[recordHeader:size]
	text, err := r.aead.Open(sealed[:0], r.nonce[:], sealed, nil)
	if err != nil {
		r.err = fmt.Errorf("noise: record %d: %w", binary.BigEndian.Uint64(r.nonce[4:]), err)
		return r.err
	}
	if !r.nonce.next() {
		r.err = errExhausted
	}
	r.done, r.text = size, text
	return nil
}

// fill reads until there are n bytes in the buffer, at least.
func (r *recordReader) fill(n int) error {
	for r.buf == nil || r.n < n {
		into := r.head[:]
		if r.buf != nil {
			into = r.buf[r.n:]
		}
		k, err := r.w.Read(into)
		if k > 0 && r.buf == nil {
			r.buf = recordPool.Get().(*[maxRecord]byte)
			copy(r.buf[:], r.head[:k])
		}
		r.n += k
		if err != nil && r.n < n {
			return err
		}
	}
	return nil
}

// batchSize holds a full HTTP/2 DATA frame and the head of its response as
// records. It stays below 32 KiB, the largest WebSocket message that clients
// read.
const batchSize = 17 << 10

var batchPool = sync.Pool{New: func() any { return new([batchSize]byte) }}

// A recordWriter writes text as records, several in one write below. It has one writer at a time (h2.Conn.wmu). A small text takes a small buffer:
// a writer that is stuck holds it for as long.
type recordWriter struct {
	w     *wire
	aead  cipher.AEAD
	nonce counter
	err   error // of an earlier write: the peer may lack a part of it
}

func (r *recordWriter) Write(p []byte) (sent int, err error) {
	if r.err != nil {
		return 0, r.err
	}
	var space []byte
	if len(p) <= maxPlaintext {
		one := recordPool.Get().(*[maxRecord]byte)
		defer recordPool.Put(one)
		space = one[:0]
	} else {
		batch := batchPool.Get().(*[batchSize]byte)
		defer batchPool.Put(batch)
		space = batch[:0]
	}
	for len(p) > 0 {
		b, n := space, 0
		for len(p) > n {
			text := p[n:min(len(p), n+maxPlaintext)]
			if len(b)+recordHeader+len(text)+tagSize > cap(space) {
				break
			}
			b = append(b, recordType)
			b = binary.BigEndian.AppendUint16(b, uint16(len(text)+tagSize))
			b = r.aead.Seal(b, r.nonce[:], text, nil)
			n += len(text)
			if !r.nonce.next() {
				r.err = errExhausted
				return sent, r.err
			}
		}
		if _, r.err = r.w.send(b); r.err != nil {
			return sent, r.err
		}
		p, sent = p[n:], sent+n
	}
	return sent, nil
}
