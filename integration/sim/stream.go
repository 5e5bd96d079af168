package sim

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"strings"
	"sync"

	"tailscale.com/tailcfg"
	"tailscale.com/util/zstdframe"
)

// maxMessage bounds what a stream may send at once.
const maxMessage = 64 << 20

// View is what a machine knows of its tailnet.
type View struct {
	Self       *tailcfg.Node
	Peers      map[tailcfg.NodeID]*tailcfg.Node
	KeepAlives int
	Messages   int
}

// Peer finds a peer by the first label of its name, nil when there is none.
func (v *View) Peer(label string) *tailcfg.Node {
	for _, n := range v.Peers {
		if strings.HasPrefix(n.Name, label+".") {
			return n
		}
	}
	return nil
}

// apply takes one message into the view as stock clients do.
func (v *View) apply(m *tailcfg.MapResponse) error {
	v.Messages++
	if m.KeepAlive {
		v.KeepAlives++
		return nil
	}
	if m.Node != nil {
		v.Self = m.Node
	}
	if v.Self == nil {
		return fmt.Errorf("the first map lacks the machine's own node")
	}
	if len(m.Peers) > 0 {
		v.Peers = map[tailcfg.NodeID]*tailcfg.Node{}
	}
	for _, n := range append(m.Peers, m.PeersChanged...) {
		v.Peers[n.ID] = n
	}
	for _, id := range m.PeersRemoved {
		delete(v.Peers, id)
	}
	for _, p := range m.PeersChangedPatch {
		old := v.Peers[p.NodeID]
		if old == nil {
			return fmt.Errorf("patch for the unknown peer %d", p.NodeID)
		}
		n := *old // nodes are shared with copies of the view
		if p.Online != nil {
			n.Online = p.Online
		}
		if p.Endpoints != nil {
			n.Endpoints = p.Endpoints
		}
		if p.DERPRegion != 0 {
			n.HomeDERP = int(p.DERPRegion)
		}
		v.Peers[p.NodeID] = &n
	}
	return nil
}

// Stream is an open map stream. A goroutine reads it until it ends.
type Stream struct {
	body io.Closer
	done chan struct{}

	mu    sync.Mutex    // guards the following fields
	moved chan struct{} // closed by the next message
	view  View
	err   error
}

// Poll opens the map stream. It lasts until ctx ends, Close, or the server
// or the network ends it.
func (c *Conn) Poll(ctx context.Context) (*Stream, error) {
	req := c.mapRequest()
	req.Stream = true
	res, err := c.Send(ctx, "/machine/map", req)
	if err != nil {
		return nil, fmt.Errorf("map: %w", err)
	}
	if err := refused("map", res); err != nil {
		res.Body.Close()
		return nil, err
	}
	st := &Stream{body: res.Body, done: make(chan struct{}), moved: make(chan struct{})}
	st.view.Peers = map[tailcfg.NodeID]*tailcfg.Node{}
	go st.read(res.Body)
	return st, nil
}

func (st *Stream) read(r io.Reader) {
	defer close(st.done)
	for {
		m, err := next(r)
		st.mu.Lock()
		if err == nil {
			err = st.view.apply(m)
		}
		st.err = err
		close(st.moved)
		st.moved = make(chan struct{})
		st.mu.Unlock()
		if err != nil {
			st.body.Close()
			return
		}
	}
}

func next(r io.Reader) (*tailcfg.MapResponse, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n > maxMessage {
		return nil, fmt.Errorf("message of %d bytes", n)
	}
	z := make([]byte, n)
	if _, err := io.ReadFull(r, z); err != nil {
		return nil, err
	}
	text, err := zstdframe.AppendDecode(nil, z)
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	m := new(tailcfg.MapResponse)
	if err := json.Unmarshal(text, m); err != nil {
		return nil, fmt.Errorf("map response: %w", err)
	}
	return m, nil
}

// Close ends the stream from the client's side.
func (st *Stream) Close() { st.body.Close() }

// Done is closed when the stream has ended.
func (st *Stream) Done() <-chan struct{} { return st.done }

// Err says why the stream ended, nil as long as it goes on.
func (st *Stream) Err() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.err
}

// View is what the machine knows now. The nodes in it must not be changed.
func (st *Stream) View() View {
	st.mu.Lock()
	defer st.mu.Unlock()
	v := st.view
	v.Peers = maps.Clone(v.Peers)
	return v
}

// Wait waits until cond likes the view, or until ctx or the stream ends.
// cond must not keep the view.
func (st *Stream) Wait(ctx context.Context, cond func(*View) bool) error {
	for {
		st.mu.Lock()
		ok, moved, err := cond(&st.view), st.moved, st.err
		st.mu.Unlock()
		if ok {
			return nil
		}
		if err != nil {
			return fmt.Errorf("stream ended: %w", err)
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Watch calls f with each state of the view, beginning with the present one,
// until ctx or the stream ends. States that follow each other quickly may be
// seen as one.
func (st *Stream) Watch(ctx context.Context, f func(*View)) {
	_ = st.Wait(ctx, func(v *View) bool { f(v); return false })
}
