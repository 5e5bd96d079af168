package noise

import (
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"hash"
	"strconv"

	"go4.org/mem"
	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"
	"tailscale.com/types/key"
)

// The messages of the handshake. Integers are big-endian.
//
//	client: version 2, type 1, length 2 | ephemeral key 32, sealed machine key 48, tag 16
//	server: type 1, length 2 | ephemeral key 32, tag 16
const (
	initiationSize   = 101
	initiationType   = 1
	initiationHeader = 5

	responseSize = 51
	responseType = 2

	keySize = 32
	tagSize = chacha20poly1305.Overhead
)

// An agreement is what a handshake came to.
type agreement struct {
	machine  key.MachinePublic // the client's
	version  int               // tailcfg.CapabilityVersion that it claims
	response []byte            // to be sent to the client
	in, out  cipher.AEAD       // of the records from the client, and to it
}

// respond is the responder's side of Noise_IK_25519_ChaChaPoly_BLAKE2s (The Noise Protocol Framework, revision 34, sections 5 and 7.5), with
// Tailscale's prologue. initiation has the shape of one (decodeInitiation); own is this server's key.
//
// It is not the library's (tailscale.com/control/controlbase), which derives a public key anew from each private key that it uses: ten
// multiplications on the curve where the pattern has five, and they are most of what a connection costs. Tests hold it to the library's other
// side.
func respond(own *ecdh.PrivateKey, initiation []byte) (*agreement, error) {
	version := binary.BigEndian.Uint16(initiation)
	ephemeral, sealedMachine, tag := initiation[5:37], initiation[37:85], initiation[85:]

	st := newState(version)
	st.mixHash(own.PublicKey().Bytes()) // <- s, known before

	// -> e, es, s, ss
	st.mixHash(ephemeral)
	clientEphemeral, err := st.mixKey(own, ephemeral)
	if err != nil {
		return nil, fmt.Errorf("es: %w", err)
	}
	machine, err := st.open(sealedMachine)
	if err != nil {
		return nil, fmt.Errorf("machine key: %w", err)
	}
	clientMachine, err := st.mixKey(own, machine)
	if err != nil {
		return nil, fmt.Errorf("ss: %w", err)
	}
	if _, err := st.open(tag); err != nil {
		return nil, fmt.Errorf("tag: %w", err)
	}

	// <- e, ee, se
	e, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	response := make([]byte, 0, responseSize)
	response = append(response, responseType)
	response = binary.BigEndian.AppendUint16(response, keySize+tagSize)
	response = append(response, e.PublicKey().Bytes()...)
	st.mixHash(e.PublicKey().Bytes())
	if err := st.mixShared(e, clientEphemeral); err != nil {
		return nil, fmt.Errorf("ee: %w", err)
	}
	if err := st.mixShared(e, clientMachine); err != nil {
		return nil, fmt.Errorf("se: %w", err)
	}
	response = st.seal(response, nil)

	in, out := st.split()
	return &agreement{machine: key.MachinePublicFromRaw32(mem.B(machine)), version: int(version), response: response, in: in, out: out}, nil
}

// A state is Noise's SymmetricState. Each key that it derives seals or opens one message, with nonce 0.
type state struct {
	hash     [blake2s.Size]byte // h
	chaining [blake2s.Size]byte // ck
	key      [chacha20poly1305.KeySize]byte
}

func newState(version uint16) *state {
	st := &state{hash: blake2s.Sum256([]byte("Noise_IK_25519_ChaChaPoly_BLAKE2s"))}
	st.chaining = st.hash
	st.mixHash(strconv.AppendUint([]byte("Tailscale Control Protocol v"), uint64(version), 10))
	return st
}

func (st *state) mixHash(data []byte) {
	st.hash = blake2s.Sum256(append(st.hash[:len(st.hash):len(st.hash)], data...))
}

// mixKey takes in what the key agrees on with the client's, which it returns.
func (st *state) mixKey(private *ecdh.PrivateKey, client []byte) (*ecdh.PublicKey, error) {
	public, err := ecdh.X25519().NewPublicKey(client)
	if err != nil {
		return nil, err
	}
	return public, st.mixShared(private, public)
}

// mixShared takes in what the two keys agree on. It fails for a public key of low order, with which they agree on zero (RFC 7748, 6.1).
func (st *state) mixShared(private *ecdh.PrivateKey, public *ecdh.PublicKey) error {
	shared, err := private.ECDH(public)
	if err != nil {
		return err
	}
	copy(st.key[:], st.derive(st.chaining[:], shared))
	return nil
}

// derive is Noise's HKDF with two outputs, which is that of RFC 5869 without info. It writes the first into first and returns the second.
func (st *state) derive(first, input []byte) []byte {
	out, err := hkdf.Key(newHash, input, st.chaining[:], "", 2*blake2s.Size)
	if err != nil {
		panic(fmt.Sprintf("noise: HKDF: %v", err)) // only for a length that it cannot have
	}
	copy(first, out)
	return out[blake2s.Size:]
}

func newHash() hash.Hash {
	h, err := blake2s.New256(nil)
	if err != nil {
		panic(fmt.Sprintf("noise: BLAKE2s: %v", err)) // only for a key that is too long
	}
	return h
}

func newCipher(k []byte) cipher.AEAD {
	c, err := chacha20poly1305.New(k)
	if err != nil {
		panic(fmt.Sprintf("noise: ChaCha20-Poly1305: %v", err)) // only for a key of another length
	}
	return c
}

var zeroNonce [chacha20poly1305.NonceSize]byte

func (st *state) open(sealed []byte) ([]byte, error) {
	text, err := newCipher(st.key[:]).Open(nil, zeroNonce[:], sealed, st.hash[:])
	if err != nil {
		return nil, err
	}
	st.mixHash(sealed)
	return text, nil
}

// seal appends the sealed text to dst.
func (st *state) seal(dst, text []byte) []byte {
	n := len(dst)
	dst = newCipher(st.key[:]).Seal(dst, zeroNonce[:], text, st.hash[:])
	st.mixHash(dst[n:])
	return dst
}

// split makes the ciphers of both directions: of what the initiator sends, and of what it gets.
func (st *state) split() (initiator, responder cipher.AEAD) {
	var first [chacha20poly1305.KeySize]byte
	second := st.derive(first[:], nil)
	return newCipher(first[:]), newCipher(second)
}
