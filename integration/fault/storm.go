package fault

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/integration/sim"
)

// A joiner is a machine with the auth key that it joins by.
type joiner struct {
	machine *sim.Machine
	key     string // the auth key
	keyFact string // of a one-time key, else empty
	owner   string // user's name
}

func (j *joiner) fact() string { return "node/" + j.machine.Machine.Public().String() }

func (j *joiner) value(label string) string { return nodeValue(j.owner, label) }

func nodeValue(owner, label string) string { return label + " of " + owner }

// A storm is writes of every kind that go on until the server dies.
type storm struct {
	server *Server
	book   *Book
	base   time.Time // keys are told apart by when they expire, seconds after base

	policies atomic.Int64 // acknowledged edits of the policy

	mu       sync.Mutex // guards the following fields
	rand     *rand.Rand
	next     int
	joiners  map[string]*joiner        // by fact
	ready    []*joiner                 // settled nodes that nobody is working on
	addrs    map[string]string         // by fact: id and addresses as first seen
	reports  map[string]netip.AddrPort // by fact: the acknowledged endpoint
	reusable map[string]string         // auth keys by owner
	owners   map[string]string         // user ids by name
	acks     int
	goal     int           // of acks, for busy
	busy     chan struct{} // closed once the goal is reached and a policy was stored; nil then, and when nobody waits
	wrong    []string
}

func newStorm(s *Server, seed uint64) *storm {
	return &storm{
		server: s, book: NewBook(), base: time.Now().Add(24 * time.Hour).Truncate(time.Second), rand: rand.New(rand.NewPCG(seed, seed)),
		joiners: map[string]*joiner{}, addrs: map[string]string{}, reports: map[string]netip.AddrPort{}, reusable: map[string]string{}, owners: map[string]string{},
	}
}

// number is one that was never given out before.
func (w *storm) number() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.next++
	return w.next
}

// after is closed when so many further writes were acknowledged, and at least one edit of the policy at any time.
func (w *storm) after(more int) <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.goal, w.busy = w.acks+more, make(chan struct{})
	return w.busy
}

func (w *storm) intN(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rand.IntN(n)
}

func (w *storm) complain(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wrong = append(w.wrong, fmt.Sprintf(format, args...))
}

// errGone ends a worker: the server no longer answers.
var errGone = errors.New("no answer")

// do makes one request that changes facts, and keeps the book.
func (w *storm) do(request func() error, facts ...[2]string) error {
	for _, f := range facts {
		w.book.Begin(f[0], f[1])
	}
	err := request()
	if err == nil {
		for _, f := range facts {
			w.book.Done(f[0])
		}
		w.mu.Lock()
		w.acks++
		if w.busy != nil && w.acks >= w.goal && w.policies.Load() > 0 {
			close(w.busy)
			w.busy = nil
		}
		w.mu.Unlock()
		return nil
	}
	if status(err) == 0 && sim.Status(err) == 0 {
		return fmt.Errorf("%w: %w", errGone, err)
	}
	for _, f := range facts {
		w.book.Refused(f[0])
	}
	if !again(err) {
		w.complain("%q: %v", facts, err)
	}
	return nil
}

// again reports whether an edit only lost a race: a policy is judged by the
// users it is stored for, and users come and go here all the time.
func again(err error) bool {
	e, ok := errors.AsType[*APIError](err)
	return ok && e.Status == http.StatusConflict && strings.Contains(e.Body, "try again")
}

// run keeps all workers busy until ctx ends or the server is gone.
func (w *storm) run(ctx context.Context, srv *sim.Server) {
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { w.repeat(ctx, func() error { return w.join(ctx, srv, false) }) })
		wg.Go(func() { w.repeat(ctx, func() error { return w.join(ctx, srv, true) }) })
	}
	for _, work := range []func(context.Context) error{w.editPolicy, w.rename, w.editUsers, w.editKeys, w.editAPIKeys, w.remove, w.list} {
		wg.Go(func() { w.repeat(ctx, func() error { return work(ctx) }) })
	}
	wg.Wait()
}

func (w *storm) repeat(ctx context.Context, work func() error) {
	for ctx.Err() == nil && work() == nil {
	}
}

// join has a new machine register, by a one-time key that is made for it or by
// its owner's reusable one.
func (w *storm) join(ctx context.Context, srv *sim.Server, once bool) error {
	n := w.number()
	owner := []string{"ann", "bob"}[n%2]
	j := &joiner{machine: sim.NewMachine(fmt.Sprintf("m-%d", n)), owner: owner, key: w.reusable[owner]}
	if once {
		expires := w.base.Add(time.Duration(n) * time.Second)
		j.keyFact = keyFact(expires)
		err := w.do(func() error {
			k, err := w.server.createKey(ctx, w.owners[owner], false, expires)
			j.key = k.Key
			return err
		}, [2]string{j.keyFact, "fresh"})
		if err != nil || j.key == "" {
			return err
		}
	}
	w.mu.Lock()
	w.joiners[j.fact()] = j
	w.mu.Unlock()
	if err := w.register(ctx, srv, j); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ready = append(w.ready, j)
	return nil
}

func (w *storm) register(ctx context.Context, srv *sim.Server, j *joiner) error {
	facts := [][2]string{{j.fact(), j.value(j.machine.Hostname)}}
	if j.keyFact != "" {
		facts = append(facts, [2]string{j.keyFact, "used"})
	}
	var c *sim.Conn
	err := w.do(func() (err error) {
		if c, err = srv.Dial(ctx, j.machine); err != nil {
			return err
		}
		res, err := c.Register(ctx, j.key)
		if err != nil && res != nil {
			w.complain("%s: %v", j.machine.Hostname, err)
			return nil
		}
		return err
	}, facts...)
	if c == nil {
		return err
	}
	defer c.Close()
	if err != nil {
		return err
	}
	// Its peers see a node once it has reported.
	endpoint := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(1024+w.number()))
	if err := c.Report(ctx, endpoint); err != nil {
		return fmt.Errorf("%w: %w", errGone, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reports[j.fact()] = endpoint
	return nil
}

// lostReports names the nodes whose acknowledged report is not in the database.
func (w *storm) lostReports(ctx context.Context) (lost []string, err error) {
	db, err := readDatabase(w.server.Database())
	if err != nil {
		return nil, err
	}
	defer db.Close()
	rows, err := db.QueryContext(ctx, "SELECT n.machine_key, s.endpoints FROM nodes n JOIN node_states s ON s.node_id = n.id")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var machine, endpoints string
		if err := rows.Scan(&machine, &endpoints); err != nil {
			return nil, err
		}
		want, ok := w.reports["node/"+machine]
		if ok && !strings.Contains(endpoints, want.String()) {
			lost = append(lost, fmt.Sprintf("%s has the endpoints %s, its report of %v was acknowledged", machine, endpoints, want))
		}
	}
	return lost, rows.Err()
}

func keyFact(expires time.Time) string { return fmt.Sprintf("key/%d", expires.Unix()) }

// policyText is a policy that lets everybody reach everybody; n tells it from
// others.
func policyText(n int) string {
	return fmt.Sprintf("// edit %d\n{\"acls\": [{\"action\": \"accept\", \"src\": [\"*\"], \"dst\": [\"*:*\"]}]}\n", n)
}

func (w *storm) editPolicy(ctx context.Context) error {
	text := policyText(w.number())
	return w.do(func() error {
		err := w.server.setPolicy(ctx, text)
		if err == nil {
			w.policies.Add(1)
		}
		return err
	}, [2]string{"policy", text})
}

// take picks a node that nobody works on; nil when there are at most spare.
func (w *storm) take(spare int) *joiner {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.ready) <= spare {
		return nil
	}
	i := w.rand.IntN(len(w.ready))
	j := w.ready[i]
	w.ready[i] = w.ready[len(w.ready)-1]
	w.ready = w.ready[:len(w.ready)-1]
	return j
}

func (w *storm) rename(ctx context.Context) error {
	j := w.take(0)
	if j == nil {
		return w.list(ctx)
	}
	id, err := w.idOf(ctx, j)
	if err != nil || id == "" {
		return err
	}
	label := fmt.Sprintf("r-%d", w.number())
	err = w.do(func() error {
		return w.server.Call(ctx, "POST", "/api/v1/node/"+id+"/rename/"+label, nil, nil)
	}, [2]string{j.fact(), j.value(label)})
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ready = append(w.ready, j)
	return err
}

func (w *storm) remove(ctx context.Context) error {
	j := w.take(20)
	if j == nil {
		return w.list(ctx)
	}
	id, err := w.idOf(ctx, j)
	if err != nil || id == "" {
		return err
	}
	return w.do(func() error { return w.server.Call(ctx, "DELETE", "/api/v1/node/"+id, nil, nil) }, [2]string{j.fact(), ""})
}

// idOf is the id of an acknowledged node, which every list must have.
func (w *storm) idOf(ctx context.Context, j *joiner) (string, error) {
	nodes, err := w.server.nodes(ctx)
	if err != nil {
		return "", fmt.Errorf("%w: %w", errGone, err)
	}
	for _, n := range nodes {
		if n.MachineKey == j.machine.Machine.Public().String() {
			return n.ID, nil
		}
	}
	w.complain("%s was acknowledged and is not in the list of nodes", j.machine.Hostname)
	return "", nil
}

func (w *storm) editUsers(ctx context.Context) error {
	name := fmt.Sprintf("u-%d", w.number())
	var id string
	err := w.do(func() error {
		u, err := w.server.createUser(ctx, name)
		id = u.ID
		return err
	}, [2]string{"user/" + name, "user"})
	if err != nil || w.intN(2) == 0 {
		return err
	}
	return w.do(func() error { return w.server.Call(ctx, "DELETE", "/api/v1/user/"+id, nil, nil) }, [2]string{"user/" + name, ""})
}

func (w *storm) editKeys(ctx context.Context) error {
	expires := w.base.Add(time.Duration(w.number()) * time.Second)
	var id string
	err := w.do(func() error {
		k, err := w.server.createKey(ctx, w.owners["bob"], true, expires)
		id = k.ID
		return err
	}, [2]string{keyFact(expires), "reusable"})
	if err != nil || w.intN(2) == 0 {
		return err
	}
	return w.do(func() error { return w.server.Call(ctx, "DELETE", "/api/v1/preauthkey?id="+id, nil, nil) }, [2]string{keyFact(expires), ""})
}

func (w *storm) editAPIKeys(ctx context.Context) error {
	expires := w.base.Add(time.Duration(w.number()) * time.Second)
	return w.do(func() error {
		return w.server.Call(ctx, "POST", "/api/v1/apikey", map[string]any{"expiration": expires.UTC().Format(time.RFC3339)}, nil)
	}, [2]string{fmt.Sprintf("apikey/%d", expires.Unix()), "key"})
}

// list reads what the server shows meanwhile: all of it must stay true.
func (w *storm) list(ctx context.Context) error {
	nodes, err := w.server.nodes(ctx)
	if err != nil {
		return errGone
	}
	for _, n := range nodes {
		w.see(n)
	}
	return nil
}

// see notes a node that the server showed: it exists, and its id and addresses
// never change.
func (w *storm) see(n nodeRecord) {
	name := "node/" + n.MachineKey
	w.book.Seen(name, nodeValue(n.User.Name, n.GivenName))
	got := fmt.Sprintf("id %s, addresses %v, key %s", n.ID, n.IPAddresses, n.NodeKey)
	w.mu.Lock()
	defer w.mu.Unlock()
	if was, ok := w.addrs[name]; !ok {
		w.addrs[name] = got
	} else if was != got {
		w.wrong = append(w.wrong, fmt.Sprintf("%s (%s) has %s, had %s", name, n.GivenName, got, was))
	}
}

// watch notes what a client is shown of its peers.
func (w *storm) watch(v *sim.View) {
	for _, n := range v.Peers {
		w.mu.Lock()
		j := w.joiners["node/"+n.Machine.String()]
		w.mu.Unlock()
		if j != nil && n.Key == j.machine.Node.Public() {
			label, _, _ := cutLabel(n)
			w.book.Seen(j.fact(), j.value(label))
		}
	}
}

// cutLabel cuts a node's name after its first label.
func cutLabel(n *tailcfg.Node) (label, rest string, ok bool) { return strings.Cut(n.Name, ".") }

// shown is everything that the server shows, in the book's terms.
func (w *storm) shown(ctx context.Context) (map[string]string, error) {
	out := map[string]string{}
	users, err := w.server.users(ctx)
	if err != nil {
		return nil, err
	}
	for _, u := range users {
		out["user/"+u.Name] = "user"
	}
	nodes, err := w.server.nodes(ctx)
	if err != nil {
		return nil, err
	}
	for _, n := range nodes {
		out["node/"+n.MachineKey] = nodeValue(n.User.Name, n.GivenName)
		w.see(n)
	}
	var keys struct{ PreAuthKeys []keyRecord }
	if err := w.server.Call(ctx, "GET", "/api/v1/preauthkey", nil, &keys); err != nil {
		return nil, err
	}
	for _, k := range keys.PreAuthKeys {
		value := "fresh"
		if k.Reusable {
			value = "reusable"
		} else if k.Used {
			value = "used"
		}
		out[keyFact(k.Expiration)] = value
	}
	var apiKeys struct{ APIKeys []keyRecord }
	if err := w.server.Call(ctx, "GET", "/api/v1/apikey", nil, &apiKeys); err != nil {
		return nil, err
	}
	for _, k := range apiKeys.APIKeys {
		out[fmt.Sprintf("apikey/%d", k.Expiration.Unix())] = "key"
	}
	var policy policyRecord
	if err := w.server.Call(ctx, "GET", "/api/v1/policy", nil, &policy); err != nil {
		return nil, err
	}
	out["policy"] = policy.Policy
	return out, nil
}
