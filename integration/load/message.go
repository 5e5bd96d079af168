package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"tailscale.com/tailcfg"
	"tailscale.com/util/zstdframe"
)

// message is a tailcfg.MapResponse as far as a view needs it. It is immutable
// and, when small, shared by all viewers that got the same bytes.
type message struct {
	keepAlive bool   // nothing else in it
	node      []byte // JSON of the viewer's own node; nil = unchanged
	peers     []*peer
	changed   []*peer
	removed   []tailcfg.NodeID
	seen      map[tailcfg.NodeID]bool
	online    map[tailcfg.NodeID]bool
	patches   []*patch
	profiles  [][]tailcfg.UserID
	filters   map[string]*filter // nil value = delete; nil map = unchanged
	domain    string
	derpMap   bool
	decoded   int // bytes of JSON
}

// maxShared is the longest compressed message that is looked up as a whole,
// maxSharedSum how much of these is kept.
const (
	maxShared    = 64 << 10
	maxSharedSum = 64 << 20
)

// maxDecoded bounds one decoded message, as clients from v1.104 do.
const maxDecoded = 1 << 30

// message decodes one map message. Z may be several zstd frames one after the
// other, as in the stock client.
func (b *book) message(z []byte) (*message, error) {
	if len(z) > maxShared {
		return b.decode(z)
	}
	b.mu.RLock()
	m := b.messages[string(z)]
	b.mu.RUnlock()
	if m != nil {
		return m, nil
	}
	m, err := b.decode(z)
	if err != nil {
		return nil, err
	}
	for _, p := range m.patches {
		if p.slot < 0 {
			return m, nil // the node may become known later
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.messageBytes += len(z); b.messageBytes > maxSharedSum {
		b.messages, b.messageBytes = map[string]*message{}, len(z)
	}
	b.messages[string(z)] = m
	return m, nil
}

func (b *book) decode(z []byte) (*message, error) {
	buf := buffers.get()
	defer buffers.put(buf)
	text, err := zstdframe.AppendDecode((*buf)[:0], z, zstdframe.MaxDecodedSize(maxDecoded))
	*buf = text
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	return b.parse(text)
}

// parse keeps nothing of text.
func (b *book) parse(text []byte) (*message, error) {
	if string(text) == `{"KeepAlive":true}` {
		return &message{keepAlive: true, decoded: len(text)}, nil
	}
	m := &message{decoded: len(text)}
	var fields [32]string
	n := 0
	err := eachField(text, func(key, value []byte) error {
		for _, f := range fields[:min(n, len(fields))] {
			if f == string(key) {
				return fmt.Errorf("field appears twice: encoding/json would merge them")
			}
		}
		if n < len(fields) {
			fields[n] = string(key)
		}
		n++
		return m.field(b, string(key), value)
	})
	if err != nil {
		return nil, err
	}
	if n == 1 && fields[0] == "KeepAlive" {
		m.keepAlive = true
	}
	return m, nil
}

func (m *message) field(b *book, key string, value []byte) (err error) {
	switch key {
	case "Node":
		if string(value) != "null" {
			m.node = append([]byte(nil), value...)
		}
	case "Peers":
		m.peers, err = b.peerList(value)
	case "PeersChanged":
		m.changed, err = b.peerList(value)
	case "PeersRemoved":
		err = eachElement(value, func(v []byte) error {
			id, err := strconv.ParseInt(string(v), 10, 64)
			m.removed = append(m.removed, tailcfg.NodeID(id))
			return err
		})
	case "PeerSeenChange":
		err = json.Unmarshal(value, &m.seen)
	case "OnlineChange":
		err = json.Unmarshal(value, &m.online)
	case "PeersChangedPatch":
		err = eachElement(value, func(v []byte) error {
			p, err := b.patch(v)
			m.patches = append(m.patches, p)
			return err
		})
	case "UserProfiles":
		var ids []tailcfg.UserID
		if string(value) == "null" {
			return nil
		}
		ids, err = b.profileIDs(value)
		m.profiles = append(m.profiles, ids)
	case "PacketFilter":
		if string(value) == "null" {
			return nil
		}
		f, err := b.filter(value)
		if err != nil {
			return err
		}
		if m.filters == nil {
			m.filters = map[string]*filter{}
		}
		m.filters["base"] = f
	case "PacketFilters":
		err = m.namedFilters(b, value)
	case "Domain":
		err = json.Unmarshal(value, &m.domain)
	case "DERPMap":
		m.derpMap = string(value) != "null"
	}
	return err
}

func (m *message) namedFilters(b *book, value []byte) error {
	if string(value) == "null" {
		return nil
	}
	if m.filters == nil {
		m.filters = map[string]*filter{}
	}
	return eachField(value, func(name, rules []byte) error {
		if string(rules) == "null" {
			m.filters[string(name)] = nil
			return nil
		}
		f, err := b.filter(rules)
		m.filters[string(name)] = f
		return err
	})
}

func (b *book) peerList(value []byte) ([]*peer, error) {
	var list []*peer
	err := eachElement(value, func(v []byte) error {
		p, err := b.peer(v)
		list = append(list, p)
		return err
	})
	return list, err
}

// strict decodes z by encoding/json and reports where m differs.
func strict(z []byte, m *message) error {
	text, err := zstdframe.AppendDecode(nil, z, zstdframe.MaxDecodedSize(maxDecoded))
	if err != nil {
		return err
	}
	var r tailcfg.MapResponse
	if err := json.Unmarshal(text, &r); err != nil {
		return err
	}
	got := [...]int{len(m.peers), len(m.changed), len(m.removed), len(m.patches), len(m.seen), len(m.online)}
	want := [...]int{len(r.Peers), len(r.PeersChanged), len(r.PeersRemoved), len(r.PeersChangedPatch), len(r.PeerSeenChange), len(r.OnlineChange)}
	if got != want || m.keepAlive != r.KeepAlive || (m.node != nil) != (r.Node != nil) {
		return fmt.Errorf("scanned %v, encoding/json has %v", got, want)
	}
	for i, p := range m.peers {
		if p.node.ID != r.Peers[i].ID || p.node.Key != r.Peers[i].Key {
			return fmt.Errorf("peer %d: scanned %v, encoding/json has %v", i, p.node.ID, r.Peers[i].ID)
		}
	}
	if !slices.IsSortedFunc(r.Peers, func(a, b *tailcfg.Node) int { return cmp.Compare(a.ID, b.ID) }) {
		return errors.New("list of peers is not sorted by ID")
	}
	return nil
}
