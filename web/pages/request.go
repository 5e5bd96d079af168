package pages

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/go-chi/chi/v5"
	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/limit"
	"github.com/signalbox-net/signalbox/control/register"
	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/web/listener"
)

// request is what a page shows of an auth request. All text of the device has
// gone through plain.
type request struct {
	ID       string
	Match    [2]string // the end of the address, in two groups
	Decided  string    // "approved", "rejected", or empty while it waits
	Hostname string
	System   string
	Source   string
	Age      string
	Facts    []fact
}

// fact is one line of what an SSH check is about.
type fact struct{ Name, Value string }

// waiting serves the page of an auth request of one kind.
func (s *server) waiting(kind, template string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
		defer cancel()
		now := s.now()
		source := listener.ClientIP(r)
		if wait := s.misses.Wait(limit.Addr(source), now); wait > 0 {
			w.Header().Set("Retry-After", fmt.Sprint(int(wait/time.Second)+1))
			s.render(w, r, http.StatusTooManyRequests, "message.html", message{"429", "Too many wrong addresses", "Wait a moment, then open the address from the device again."})
			return
		}
		id := chi.URLParam(r, "id")
		a, err := s.find(ctx, kind, id, now)
		switch {
		case errors.Is(err, db.ErrNotFound):
			s.misses.Debit(limit.Addr(source), now, 1)
			s.missing(w, r)
			return
		case err != nil:
			s.log.Error("look up an auth request", "err", err)
			w.Header().Set("Retry-After", "5")
			s.render(w, r, http.StatusServiceUnavailable, "message.html", message{"503", "This cannot be looked up now", "The database does not answer. The device keeps waiting; open the address again in a few seconds."})
			return
		}
		if r.Method == http.MethodGet && !a.Opened && a.State == db.AuthRequestPending {
			if err := s.open(ctx, a.ID, source); err != nil {
				s.log.Warn("mark an auth request as opened", "err", err)
			}
		}
		s.render(w, r, http.StatusOK, template, requestOf(a, id, now))
	}
}

// find looks an id up by its hash. Whatever is wrong with it is ErrNotFound.
func (s *server) find(ctx context.Context, kind, id string, now time.Time) (*db.AuthRequest, error) {
	if canonical, ok := register.ParseID(id); !ok || canonical != id {
		return nil, db.ErrNotFound
	}
	var a *db.AuthRequest
	err := s.Store.View(ctx, func(r *db.Reader) (err error) {
		a, err = r.In(s.Tailnet).AuthRequestByHash(register.HashID(id))
		return err
	})
	if err != nil {
		return nil, err
	}
	if a.Kind != kind || !now.Before(a.Expires) {
		return nil, db.ErrNotFound
	}
	return a, nil
}

// open notes that somebody looks at the request.
func (s *server) open(ctx context.Context, id int64, source netip.Addr) error {
	actor := db.Actor{Kind: "unauthenticated"}
	if source.IsValid() {
		actor.Source = source.String()
	}
	_, err := s.Ledger.Do(ctx, actor, func(tx *db.Tx) error {
		a, err := tx.AuthRequest(id)
		if err != nil || a.Opened {
			return err
		}
		a.Opened = true
		return tx.PutAuthRequest(a)
	})
	if errors.Is(err, db.ErrNotFound) {
		return nil // decided or swept meanwhile
	}
	return err
}

func requestOf(a *db.AuthRequest, id string, now time.Time) request {
	out := request{
		ID: id, Match: [2]string{id[24:28], id[28:]}, Hostname: "a device without a name", System: "system unknown",
		Source: plain(a.Source, 64), Age: age(now.Sub(a.Created)), Facts: facts(a.Detail),
	}
	if a.State != db.AuthRequestPending {
		out.Decided = a.State
	}
	if h := a.Hostinfo; h != nil {
		if name := plain(h.Hostname, 80); name != "" {
			out.Hostname = name
		}
		if sys := system(h); sys != "" {
			out.System = sys
		}
	}
	return out
}

// system describes a device as its owner knows it: "Debian 12, Tailscale 1.102.5".
func system(h *tailcfg.Hostinfo) string {
	name, version := h.OS, h.OSVersion
	if h.Distro != "" {
		name, version = strings.ToUpper(h.Distro[:1])+h.Distro[1:], h.DistroVersion
	}
	parts := []string{strings.TrimSpace(plain(name, 32) + " " + plain(version, 48))}
	if v, _, _ := strings.Cut(h.IPNVersion, "-"); v != "" {
		parts = append(parts, "Tailscale "+plain(v, 24))
	}
	return strings.Join(slices.DeleteFunc(parts, func(p string) bool { return p == "" }), ", ")
}

// facts lists the texts of a JSON object by name.
func facts(detail []byte) []fact {
	var m map[string]any
	if json.Unmarshal(detail, &m) != nil {
		return nil
	}
	var out []fact
	for _, name := range slices.Sorted(maps.Keys(m)) {
		if v, ok := m[name].(string); ok && v != "" && len(out) < 16 {
			out = append(out, fact{plain(name, 32), plain(v, 120)})
		}
	}
	return out
}

// plain makes a text of at most n characters of which every one is visible:
// control characters and those that reverse the direction of writing could make
// a device look like another one.
func plain(s string, n int) string {
	var b strings.Builder
	for _, c := range strings.TrimSpace(s) {
		if n == 0 {
			b.WriteRune('…')
			break
		}
		if !unicode.IsPrint(c) {
			c = unicode.ReplacementChar
		}
		b.WriteRune(c)
		n--
	}
	return b.String()
}

// age is a duration as people say it.
func age(d time.Duration) string {
	switch n := int(d / time.Minute); {
	case n < 1:
		return "less than a minute ago"
	case n == 1:
		return "1 minute ago"
	default:
		return fmt.Sprintf("%d minutes ago", n)
	}
}

// serverHost is the host of the server's address, for titles.
func serverHost(serverURL string) string {
	u, err := url.Parse(serverURL)
	if err != nil {
		return ""
	}
	return u.Hostname()
}

// failing names what is not well, sorted.
func (s *server) failing(ctx context.Context) []string {
	var out []string
	check := func(name string, f func(context.Context) error) {
		if err := f(ctx); err != nil {
			s.log.Warn("health check fails", "check", name, "err", err)
			out = append(out, name)
		}
	}
	check("database", s.Store.Healthy)
	for name, f := range s.Checks {
		check(name, f)
	}
	slices.Sort(out)
	return out
}
