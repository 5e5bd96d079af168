// Package netmap turns snapshots into the bytes of map responses.
//
// Its one trick is that a stock client decodes a map message as any number of zstd frames one after the other, so a message is put together
// from frames that were compressed once and are shared by every viewer they fit: up to 64 neighbouring nodes of which a viewer sees the same ones
// make one frame, a change that a thousand viewers may know of makes one frame, a packet filter that ten nodes share makes one frame.
// Nothing is marshalled or compressed for one viewer but its own node.
//
// The package is the only one that builds tailcfg.MapResponse. It has no clock (time is an argument), does no I/O and keeps nothing but
// caches, which hang on the snapshot, tile, node or delta that they were made from and go with it.
package netmap

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"iter"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/util/zstdframe"

	"github.com/signalbox-net/signalbox/control/tailnet"
)

// A Frame is one or more complete zstd frames. Frames are shared between sessions and never modified.
type Frame []byte

// A Message is one map response: its frames in order.
type Message struct {
	Frames []Frame
	// Full says that the message begins a session: it holds everything.
	Full bool
}

// Size is the number of bytes that follow the length prefix.
func (m Message) Size() int {
	n := 0
	for _, f := range m.Frames {
		n += len(f)
	}
	return n
}

// A Viewer is the reader of a session's messages.
type Viewer struct {
	Slot int
	// Raw says that the client asked for no compression (MapRequest.Compress is empty): tools do, tailscaled never.
	Raw bool
	// Now goes into MapResponse.ControlTime of a full message.
	Now time.Time
}

// KeepAlive is the frame that keeps a client's watchdog quiet. A client learns its bytes and skips the decoding of equal ones, and one of
// its versions compares only the length; so it never changes, and Wire lets no other message have its length.
var KeepAlive = rawFrame([]byte(`{"KeepAlive":true}`))

// keepAliveMessage is KeepAlive with its length.
var keepAliveMessage = prefixed([]Frame{KeepAlive})

// KeepAliveWire is the KeepAlive as it goes on the wire.
func KeepAliveWire(raw bool) []byte {
	if raw {
		return Wire(Message{Frames: []Frame{KeepAlive}}, true)
	}
	return keepAliveMessage
}

// Wire renders a message with its 4-byte little-endian length. For a raw viewer the JSON is sent as it is.
func Wire(m Message, raw bool) []byte { return prefixed(onWire(m, raw)) }

// Pieces is what Wire makes, in order and without a copy of what is shared: the length, then the frames. The pieces must not be modified.
func Pieces(m Message, raw bool) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		frames := onWire(m, raw)
		if !yield(binary.LittleEndian.AppendUint32(nil, uint32(Message{Frames: frames}.Size()))) {
			return
		}
		for _, f := range frames {
			if !yield(f) {
				return
			}
		}
	}
}

// onWire is what follows a message's length.
func onWire(m Message, raw bool) []Frame {
	if raw {
		var body []byte
		for _, f := range m.Frames {
			var err error
			if body, err = zstdframe.AppendDecode(body, f); err != nil {
				panic(fmt.Sprintf("netmap: own frame does not decode: %v", err))
			}
		}
		return []Frame{body}
	}
	if m.Size() == len(KeepAlive) {
		return append(m.Frames[:len(m.Frames):len(m.Frames)], emptyFrame)
	}
	return m.Frames
}

func prefixed(frames []Frame) []byte {
	n := 0
	for _, f := range frames {
		n += len(f)
	}
	out := make([]byte, 4, 4+n)
	binary.LittleEndian.PutUint32(out, uint32(n))
	for _, f := range frames {
		out = append(out, f...)
	}
	return out
}

var (
	emptyFrame = rawFrame(nil)
	commaFrame = rawFrame([]byte(","))
)

// smallFrame is the size up to which compression gains less than it costs: what is left after the field names is keys and addresses.
const smallFrame = 160

// frame compresses JSON text.
func frame(text []byte) Frame {
	if len(text) <= smallFrame {
		return rawFrame(text)
	}
	return zstdframe.AppendEncode(nil, text, zstdframe.FastestCompression, zstdframe.LowMemory(true))
}

// rawFrame wraps up to 65,791 bytes into a zstd frame (RFC 8878, 3.1.1) of one raw block: single segment, no checksum, size in one or two
// bytes.
func rawFrame(text []byte) Frame {
	out := make([]byte, 0, len(text)+10)
	out = append(out, 0x28, 0xb5, 0x2f, 0xfd)
	if n := len(text); n < 256 {
		out = append(out, 0x20, byte(n))
	} else {
		out = append(out, 0x60)
		out = binary.LittleEndian.AppendUint16(out, uint16(n-256))
	}
	head := uint32(len(text))<<3 | 1 // last block, type raw
	out = append(out, byte(head), byte(head>>8), byte(head>>16))
	return append(out, text...)
}

// must marshals values whose types always marshal.
func must(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("netmap: marshal %T: %v", v, err))
	}
	return b
}

// Farewell tells a client whose node was deleted that its key is no longer good, so that it asks its user to log in again instead of
// polling for ever. A first map without relays would switch them off in the client for good, so relays go with it; nil is for a client that has
// them already.
func Farewell(n *tailnet.Node, domain string, relays *tailcfg.DERPMap) Message {
	self := &tailcfg.Node{
		ID: n.ID, StableID: n.StableID, Name: n.FQDN, User: n.SelfUser(), Key: n.NodeKey, KeyExpiry: longAgo, Expired: true, MachineAuthorized: true,
		Addresses: prefixes(n), AllowedIPs: prefixes(n),
	}
	return Message{Frames: []Frame{frame(must(&tailcfg.MapResponse{
		Node: self, Domain: domain, PacketFilters: map[string][]tailcfg.FilterRule{"base": {}}, DERPMap: relays,
	}))}}
}

// Ping has a client call back, by the address in p. Clients pass over a ping whose address is that of the one before.
func Ping(p *tailcfg.PingRequest) Message {
	return Message{Frames: []Frame{frame(must(&tailcfg.MapResponse{PingRequest: p}))}}
}

// longAgo is a key expiry that every clock agrees on.
var longAgo = time.Unix(123, 0).UTC()
