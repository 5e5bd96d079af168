package postgres

import (
	"net"
	"os"
	"path/filepath"
	"sync"
)

// A Line is one signalbox server's way to PostgreSQL. It can be cut, as a
// network is that carries nothing any more: nobody is told, and what was
// written waits.
type Line struct {
	dir    string
	server *Server
	l      net.Listener

	mu     sync.Mutex    // guards the following fields
	mended chan struct{} // closed while the line carries
	conns  map[net.Conn]bool
	closed bool
}

// Line makes a new line, which ends with the test.
func (s *Server) Line() *Line {
	s.t.Helper()
	dir, err := os.MkdirTemp(parent(), "sbln")
	if err != nil {
		s.t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, ".s.PGSQL.5432"))
	if err != nil {
		s.t.Fatal(err)
	}
	w := &Line{dir: dir, server: s, l: l, mended: make(chan struct{}), conns: map[net.Conn]bool{}}
	close(w.mended)
	var carriers sync.WaitGroup
	carriers.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			carriers.Go(func() { w.carry(c) })
		}
	})
	s.t.Cleanup(func() {
		l.Close()
		w.end()
		carriers.Wait()
		os.RemoveAll(dir)
	})
	return w
}

// Env is what makes a signalbox server use the database through this line.
func (w *Line) Env() []string {
	return []string{
		"SIGNALBOX_DATABASE_TYPE=postgres", "SIGNALBOX_DATABASE_POSTGRES_HOST=" + w.dir,
		"SIGNALBOX_DATABASE_POSTGRES_NAME=" + w.server.database, "SIGNALBOX_DATABASE_POSTGRES_USER=" + User,
	}
}

// Cut makes the line carry nothing until Mend.
func (w *Line) Cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mended = make(chan struct{})
}

// Mend makes the line carry again, what was held back first.
func (w *Line) Mend() {
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.mended)
}

func (w *Line) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	select {
	case <-w.mended:
	default:
		close(w.mended)
	}
	for c := range w.conns {
		c.Close()
	}
}

// pass waits until the line carries.
func (w *Line) pass() {
	w.mu.Lock()
	mended := w.mended
	w.mu.Unlock()
	<-mended
}

// own notes a connection, so that it ends with the line.
func (w *Line) own(c net.Conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		c.Close()
		return false
	}
	w.conns[c] = true
	return true
}

func (w *Line) disown(c net.Conn) {
	c.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.conns, c)
}

func (w *Line) carry(near net.Conn) {
	if !w.own(near) {
		return
	}
	defer w.disown(near)
	w.pass()
	far, err := net.Dial("unix", w.server.Socket())
	if err != nil || !w.own(far) {
		return
	}
	defer w.disown(far)
	done := make(chan struct{}, 2)
	for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
		go func() {
			w.copy(way[1], way[0])
			done <- struct{}{}
		}()
	}
	<-done // the other way ends with the connections
	near.Close()
	far.Close()
	<-done
}

// copy moves bytes from src to dst, but none while the line is cut: neither
// side learns then that the other has gone.
func (w *Line) copy(dst, src net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		w.pass()
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
