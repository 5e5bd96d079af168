package derp

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"reflect"
	"sync"
	"time"

	"tailscale.com/tailcfg"
)

const (
	defaultInterval = 3 * time.Hour
	defaultRetire   = 10 * time.Minute
	firstRetry      = time.Minute
)

// LoaderConfig says where regions come from.
type LoaderConfig struct {
	// Embedded is the region of the server's own relay; nil without one. It
	// must not be changed afterwards.
	Embedded *tailcfg.DERPRegion
	// URLs are fetched as JSON, over https (http only from a loopback host).
	// A later one replaces regions of earlier ones. None means that the
	// Loader never opens a connection.
	URLs []string
	// Paths are files for ParseMap; they replace regions of URLs and of
	// earlier files.
	Paths []string
	// AutoUpdate reads URLs and files again every Interval. Without it they
	// are read until each URL has answered once, and on Reload.
	AutoUpdate bool
	// Interval zero means three hours.
	Interval time.Duration
	// Retire is how long a region that left the map stays in it as
	// NoMeasureNoHome, so that peers which still call it home are reached
	// until they have moved. Zero means ten minutes, negative not at all.
	Retire time.Duration
	// Refuse reports addresses that a URL must not lead to besides the
	// refused ones of every host (link-local and the like): the tailnet's own
	// pools. Nil refuses no more.
	Refuse func(netip.Addr) bool
	// OnChange gets every new map, one at a time, from Run. The map must not
	// be changed. Nil is allowed.
	OnChange func(*tailcfg.DERPMap)
	// Now is the clock for Retire. Nil means time.Now.
	Now func() time.Time
	// Log receives failing sources. Nil discards.
	Log *slog.Logger
}

// Loader keeps the DERP map that clients get: the embedded region merged with
// files and URLs. A source that fails keeps its last good content; a failing
// URL never stops anything.
type Loader struct {
	cfg    LoaderConfig
	fetch  *fetcher
	reload chan struct{} // one slot

	// Owned by Load, then by Run.
	files   []layer
	urls    []layer // m is nil until the URL has answered
	retired map[int]retiredRegion

	mu      sync.Mutex // guards current
	current *tailcfg.DERPMap
}

type retiredRegion struct {
	region *tailcfg.DERPRegion
	until  time.Time
}

// NewLoader checks cfg. It reads nothing.
func NewLoader(cfg LoaderConfig) (*Loader, error) {
	cfg.Interval = cmp.Or(cfg.Interval, defaultInterval)
	if cfg.Interval < 0 {
		return nil, fmt.Errorf("derp.update_frequency: %v is negative", cfg.Interval)
	}
	cfg.Retire = cmp.Or(cfg.Retire, defaultRetire)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	l := &Loader{
		cfg:     cfg,
		fetch:   &fetcher{refuse: cfg.Refuse},
		reload:  make(chan struct{}, 1),
		retired: map[int]retiredRegion{},
		current: &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{}},
	}
	for _, u := range cfg.URLs {
		if err := CheckMapURL(u); err != nil {
			return nil, fmt.Errorf("derp.urls: %w", err)
		}
		l.urls = append(l.urls, layer{name: u, remote: true})
	}
	if cfg.Embedded != nil {
		if err := validateRegion(cfg.Embedded.RegionID, cfg.Embedded); err != nil {
			return nil, fmt.Errorf("embedded DERP region: %w", err)
		}
	}
	return l, nil
}

// Load reads the files and makes the first map, without any connection: URLs
// are left to Run. Call it once, before Run. A file that cannot be read or
// makes no sense is an error that names it.
func (l *Loader) Load() (*tailcfg.DERPMap, error) {
	files, err := l.readFiles()
	if err != nil {
		return nil, err
	}
	l.files = files
	m, _, err := merge(files, l.cfg.Embedded)
	if err != nil {
		return nil, fmt.Errorf("derp.paths: %w", err)
	}
	l.mu.Lock()
	l.current = m
	l.mu.Unlock()
	return m, nil
}

// Current is the latest map. It must not be changed.
func (l *Loader) Current() *tailcfg.DERPMap {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.current
}

// Reload makes Run read every source again now. It does not wait.
func (l *Loader) Reload() {
	select {
	case l.reload <- struct{}{}:
	default:
	}
}

// Run fetches the URLs, then keeps the map up to date until ctx ends. It
// returns nil.
func (l *Loader) Run(ctx context.Context) error {
	retry := firstRetry
	due := l.cfg.Now() // of the next reading; zero means none
	for {
		if !due.IsZero() && !l.cfg.Now().Before(due) {
			ok := l.refresh(ctx)
			now := l.cfg.Now()
			switch {
			case !ok:
				due = now.Add(min(retry, l.cfg.Interval))
				retry *= 2
			case l.cfg.AutoUpdate:
				due, retry = now.Add(l.cfg.Interval), firstRetry
			default:
				due, retry = time.Time{}, firstRetry
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		l.publish()
		wake := l.nextRetirement()
		if !due.IsZero() && (wake.IsZero() || due.Before(wake)) {
			wake = due
		}
		var timer <-chan time.Time
		if !wake.IsZero() {
			timer = time.After(wake.Sub(l.cfg.Now()))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-l.reload:
			due = l.cfg.Now()
		case <-timer:
		}
	}
}

// refresh reads every source and reports whether all of them answered.
func (l *Loader) refresh(ctx context.Context) (ok bool) {
	ok = true
	if files, err := l.readFiles(); err != nil {
		l.cfg.Log.Warn("DERP map file keeps its last good content", "err", err)
	} else if _, _, err := merge(files, l.cfg.Embedded); err != nil {
		l.cfg.Log.Warn("DERP map files keep their last good content", "err", err)
	} else {
		l.files = files
	}
	for i := range l.urls {
		u := &l.urls[i]
		m, err := l.fetch.get(ctx, u.name)
		if ctx.Err() != nil {
			return false
		}
		if err != nil {
			ok = false
			l.cfg.Log.Warn("DERP map URL keeps its last good content", "url", u.name, "known", u.m != nil, "err", err)
			continue
		}
		u.m = m
	}
	return ok
}

// publish merges what is known and hands it on when it differs.
func (l *Loader) publish() {
	var layers []layer
	for _, u := range l.urls {
		if u.m != nil {
			layers = append(layers, u)
		}
	}
	layers = append(layers, l.files...)
	m, dropped, err := merge(layers, l.cfg.Embedded)
	if err != nil {
		l.cfg.Log.Warn("DERP map stays as it is", "err", err)
		return
	}
	for _, d := range dropped {
		l.cfg.Log.Warn("DERP region from a URL left out", "reason", d)
	}
	before := l.Current()
	l.retire(before, m)
	if reflect.DeepEqual(before, m) {
		return
	}
	l.mu.Lock()
	l.current = m
	l.mu.Unlock()
	l.cfg.Log.Info("DERP map changed", "regions", len(m.Regions))
	if l.cfg.OnChange != nil {
		l.cfg.OnChange(m)
	}
}

// retire adds to m the regions that left since before and are still homes of
// somebody, and drops those whose time is over.
func (l *Loader) retire(before, m *tailcfg.DERPMap) {
	if l.cfg.Retire < 0 {
		return
	}
	now := l.cfg.Now()
	for id, r := range before.Regions {
		if _, known := l.retired[id]; !known && m.Regions[id] == nil {
			r = r.Clone()
			r.NoMeasureNoHome = true
			l.retired[id] = retiredRegion{r, now.Add(l.cfg.Retire)}
		}
	}
	names := map[string]bool{}
	for _, r := range m.Regions {
		for _, n := range r.Nodes {
			names[n.Name] = true
		}
	}
	for id, old := range l.retired {
		clash := m.Regions[id] != nil || !now.Before(old.until)
		for _, n := range old.region.Nodes {
			clash = clash || names[n.Name]
		}
		if clash {
			delete(l.retired, id)
			continue
		}
		m.Regions[id] = old.region
	}
}

func (l *Loader) nextRetirement() (next time.Time) {
	for _, r := range l.retired {
		if next.IsZero() || r.until.Before(next) {
			next = r.until
		}
	}
	return next
}

func (l *Loader) readFiles() ([]layer, error) {
	var layers []layer
	for _, p := range l.cfg.Paths {
		data, err := readBounded(p)
		if err != nil {
			return nil, fmt.Errorf("derp.paths: %w", err)
		}
		m, err := ParseMap(data)
		if err != nil {
			return nil, fmt.Errorf("derp.paths: %s: %w", p, err)
		}
		layers = append(layers, layer{name: p, m: m})
	}
	return layers, nil
}

// readBounded reads a file of at most maxMapBytes.
func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxMapBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxMapBytes {
		return nil, fmt.Errorf("%s: more than %d bytes", path, maxMapBytes)
	}
	return data, nil
}
