package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"tailscale.com/control/controlbase"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// capability is what the simulated clients say they are: v1.102.
const capability tailcfg.CapabilityVersion = 142

const upgradeProtocol = "tailscale-control-protocol"

// traffic counts bytes at the TCP connection: everything above it, HTTP, Noise
// and HTTP/2 framing too, is in the count.
type traffic struct{ in, out atomic.Int64 }

type countedConn struct {
	net.Conn
	traffic *traffic
	pending []byte // read beyond the upgrade response
}

func (c *countedConn) Read(p []byte) (int, error) {
	if len(c.pending) > 0 {
		n := copy(p, c.pending)
		c.pending = c.pending[n:]
		if len(c.pending) == 0 {
			c.pending = nil
		}
		return n, nil
	}
	n, err := c.Conn.Read(p)
	c.traffic.in.Add(int64(n))
	return n, err
}

func (c *countedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.traffic.out.Add(int64(n))
	return n, err
}

// earlyConn is a Noise connection whose first bytes from the server may be the
// early payload: "\xff\xff\xffTS", a big-endian length and a JSON
// tailcfg.EarlyNoise. It is as long a header as HTTP/2's first frame has, so
// that nine bytes tell which of the two it is. No client uses what it says.
type earlyConn struct {
	net.Conn
	started bool
	pending []byte
}

const (
	earlyMagic   = "\xff\xff\xffTS"
	maxEarlySize = 10 << 20
)

func (c *earlyConn) Read(p []byte) (int, error) {
	if !c.started {
		c.started = true
		var head [9]byte
		if _, err := io.ReadFull(c.Conn, head[:]); err != nil {
			return 0, err
		}
		if string(head[:5]) != earlyMagic {
			c.pending = head[:]
		} else if n := binary.BigEndian.Uint32(head[5:]); n > maxEarlySize {
			return 0, fmt.Errorf("early payload of %d bytes", n)
		} else if _, err := io.CopyN(io.Discard, c.Conn, int64(n)); err != nil {
			return 0, err
		}
	}
	if len(c.pending) > 0 {
		n := copy(p, c.pending)
		c.pending = c.pending[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// link is one Noise connection with HTTP/2 inside.
type link struct {
	tcp *countedConn
	h2  *http2.ClientConn
}

func (l *link) close() {
	l.tcp.Close()
	l.h2.Close()
}

// refusal is an answer by which the server turned a client away.
type refusal struct {
	what   string
	status int
	body   string
}

func (r *refusal) Error() string {
	return fmt.Sprintf("%s: status %d: %s", r.what, r.status, r.body)
}

// dialer makes links to one server as the stock client does: the first Noise
// message travels in the header of the upgrade request.
type dialer struct {
	addr      string // host:port
	serverKey key.MachinePublic
	transport *http2.Transport // shared; holds no connection itself
}

func (d *dialer) dial(ctx context.Context, machine key.MachinePrivate, local net.Addr, t *traffic) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	initial, finish, err := controlbase.ClientDeferred(machine, d.serverKey, uint16(capability))
	if err != nil {
		return nil, fmt.Errorf("noise: %w", err)
	}
	raw, err := (&net.Dialer{LocalAddr: local}).DialContext(ctx, "tcp", d.addr)
	if err != nil {
		return nil, err
	}
	tcp := &countedConn{Conn: raw, traffic: t}
	stop := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	l, err := d.open(ctx, tcp, initial, finish)
	if err != nil {
		raw.Close()
		return nil, err
	}
	return l, nil
}

func (d *dialer) open(ctx context.Context, tcp *countedConn, initial []byte, finish controlbase.HandshakeContinuation) (*link, error) {
	if err := d.upgrade(tcp, initial); err != nil {
		return nil, err
	}
	noise, err := finish(ctx, tcp)
	if err != nil {
		return nil, fmt.Errorf("noise handshake: %w", err)
	}
	h2, err := d.transport.NewClientConn(&earlyConn{Conn: noise})
	if err != nil {
		return nil, fmt.Errorf("http2: %w", err)
	}
	return &link{tcp: tcp, h2: h2}, nil
}

func (d *dialer) upgrade(tcp *countedConn, initial []byte) error {
	request := "POST /ts2021 HTTP/1.1\r\nHost: " + d.addr +
		"\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 0\r\nConnection: upgrade\r\nUpgrade: " + upgradeProtocol +
		"\r\nX-Tailscale-Handshake: " + base64.StdEncoding.EncodeToString(initial) + "\r\n\r\n"
	if _, err := io.WriteString(tcp, request); err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	head := make([]byte, 0, 512)
	end := -1
	for end < 0 {
		if len(head) > 4<<10 {
			return errors.New("upgrade: answer too long")
		}
		head = append(head, make([]byte, 256)...)
		n, err := tcp.Read(head[len(head)-256:])
		head = head[:len(head)-256+n]
		end = bytes.Index(head, []byte("\r\n\r\n"))
		if err != nil && end < 0 {
			return fmt.Errorf("upgrade: %w", err)
		}
	}
	rest := bytes.Clone(head[end+4:])
	if len(rest) > 0 {
		tcp.pending = rest
	}
	err := checkUpgrade(string(head[:end]))
	if r := (*refusal)(nil); errors.As(err, &r) {
		// The server says why and closes.
		text, _ := io.ReadAll(io.LimitReader(tcp, 200))
		r.body = strings.TrimSpace(string(text))
	}
	return err
}

func checkUpgrade(head string) error {
	lines := strings.Split(head, "\r\n")
	var status int
	if _, err := fmt.Sscanf(lines[0], "HTTP/1.1 %d", &status); err != nil {
		return fmt.Errorf("upgrade: answer %q", lines[0])
	}
	if status != 101 {
		return &refusal{what: "upgrade", status: status}
	}
	for _, line := range lines[1:] {
		name, value, _ := strings.Cut(line, ":")
		if strings.EqualFold(name, "Upgrade") && strings.TrimSpace(value) == upgradeProtocol {
			return nil
		}
	}
	return errors.New("upgrade: no Upgrade header in the answer")
}
