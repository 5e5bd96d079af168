package acl

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/tailscale/hujson"
	"tailscale.com/tailcfg"
)

// Parse reads a policy text: HuJSON with the members that the hosted service
// knows. It checks everything that can be checked without a tailnet. The error
// is of type [Errors]; src is not kept or changed by the caller's view of it:
// Parse works on a copy.
func Parse(src []byte) (*Policy, error) {
	p, errs := read(src)
	if len(errs) > 0 {
		return nil, errs
	}
	return p, nil
}

// read is Parse that returns also what it understood of a text with faults,
// unless the text is no HuJSON at all.
func read(src []byte) (*Policy, Errors) {
	p := &Policy{
		src:       bytes.Clone(src),
		groups:    map[string]*group{},
		hosts:     map[string]*host{},
		ipsets:    map[string]*ipset{},
		tagOwners: map[string]*tagOwner{},
		postures:  map[string]*posture{},
	}
	if len(src) > maxSize {
		p.src, p.lines = nil, []int{0}
		return nil, Errors{p.errorAt(0, fmt.Sprintf("the policy has %d bytes; the limit is %d", len(src), maxSize))}
	}
	p.lines = lineStarts(p.src)
	if at, err := scanDepth(src); err != nil {
		return nil, Errors{p.errorAt(at, err.Error())}
	}
	root, err := hujson.Parse(bytes.Clone(src))
	if err != nil {
		return nil, Errors{p.syntaxError(err)}
	}
	p.root = &root
	r := &reader{p: p, used: map[string]bool{}}
	p.used = r.used
	r.document(&root)
	return p, r.errs
}

// syntaxError moves the place that hujson puts into its message, counted in
// bytes, into the error.
func (p *Policy) syntaxError(err error) *Error {
	var line, column int
	if _, e := fmt.Sscanf(err.Error(), "hujson: line %d, column %d:", &line, &column); e != nil {
		return p.errorAt(0, err.Error())
	}
	if cause := errors.Unwrap(err); cause != nil {
		err = cause
	}
	return p.errorAt(p.lines[line-1]+column-1, err.Error())
}

// reader turns the syntax tree into a Policy and collects every fault on the
// way instead of stopping at the first.
type reader struct {
	p    *Policy
	errs Errors
	used map[string]bool // nil when only looking up
}

// maxErrors bounds the work on a text that is wrong everywhere.
const maxErrors = 100

func (r *reader) fail(at int, format string, args ...any) {
	if len(r.errs) < maxErrors {
		r.errs = append(r.errs, r.p.errorAt(at, fmt.Sprintf(format, args...)))
	}
}

// field is a member of an object that the reader understands.
type field func(v *hujson.Value)

// object reads the members of v. Names compare without regard to ASCII case,
// as old policies write "Src" and "Action". Members that start with # are
// remarks.
func (r *reader) object(v *hujson.Value, fields map[string]field) bool {
	o, ok := v.Value.(*hujson.Object)
	if !ok {
		r.fail(v.StartOffset, "expected an object, found %s", kindName(v))
		return false
	}
	seen := make(map[string]bool, len(o.Members))
	for i := range o.Members {
		m := &o.Members[i]
		name := memberName(m)
		key := fold(name)
		if strings.HasPrefix(name, "#") {
			continue
		}
		f, known := fields[key]
		switch {
		case !known:
			r.fail(m.Name.StartOffset, "unknown field %q", name)
		case seen[key]:
			r.fail(m.Name.StartOffset, "duplicate field %q", name)
		default:
			seen[key] = true
			if f != nil && !isNull(&m.Value) {
				f(&m.Value)
			}
		}
	}
	return true
}

// table reads an object whose names are the policy's own.
func (r *reader) table(v *hujson.Value, each func(name text, v *hujson.Value)) {
	o, ok := v.Value.(*hujson.Object)
	if !ok {
		r.fail(v.StartOffset, "expected an object, found %s", kindName(v))
		return
	}
	seen := make(map[string]bool, len(o.Members))
	for i := range o.Members {
		m := &o.Members[i]
		name := text{strings.TrimSpace(memberName(m)), m.Name.StartOffset}
		if strings.HasPrefix(name.s, "#") {
			continue
		}
		if seen[name.s] {
			r.fail(name.at, "duplicate name %q", name.s)
			continue
		}
		seen[name.s] = true
		each(name, &m.Value)
	}
}

func (r *reader) list(v *hujson.Value, each func(v *hujson.Value)) {
	if isNull(v) {
		return
	}
	a, ok := v.Value.(*hujson.Array)
	if !ok {
		r.fail(v.StartOffset, "expected a list, found %s", kindName(v))
		return
	}
	for i := range a.Elements {
		each(&a.Elements[i])
	}
}

func (r *reader) text(v *hujson.Value) (text, bool) {
	lit, ok := v.Value.(hujson.Literal)
	if !ok || lit.Kind() != '"' {
		r.fail(v.StartOffset, "expected a string, found %s", kindName(v))
		return text{}, false
	}
	return text{strings.TrimSpace(lit.String()), v.StartOffset}, true
}

// textInto is a field that stores a string.
func (r *reader) textInto(dst *text) field {
	return func(v *hujson.Value) {
		if t, ok := r.text(v); ok {
			*dst = t
		}
	}
}

func (r *reader) texts(v *hujson.Value) []text {
	var out []text
	r.list(v, func(v *hujson.Value) {
		if t, ok := r.text(v); ok {
			out = append(out, t)
		}
	})
	return out
}

func (r *reader) textsInto(dst *[]text) field {
	return func(v *hujson.Value) { *dst = r.texts(v) }
}

func (r *reader) boolInto(dst *bool) field {
	return func(v *hujson.Value) {
		lit, ok := v.Value.(hujson.Literal)
		if !ok || lit.Kind() != 't' && lit.Kind() != 'f' {
			r.fail(v.StartOffset, "expected true or false, found %s", kindName(v))
			return
		}
		*dst = lit.Bool()
	}
}

// raw is the value as plain JSON.
func raw(v *hujson.Value) tailcfg.RawMessage {
	c := v.Clone()
	c.Minimize()
	c.BeforeExtra, c.AfterExtra = nil, nil
	return tailcfg.RawMessage(c.Pack())
}

func memberName(m *hujson.ObjectMember) string {
	lit, _ := m.Name.Value.(hujson.Literal)
	return lit.String()
}

func isNull(v *hujson.Value) bool {
	lit, ok := v.Value.(hujson.Literal)
	return ok && lit.Kind() == 'n'
}

func kindName(v *hujson.Value) string {
	switch v.Value.Kind() {
	case '{':
		return "an object"
	case '[':
		return "a list"
	case '"':
		return "a string"
	case 'n':
		return "null"
	case 't', 'f':
		return "a boolean"
	}
	return "a number"
}

// document reads the definitions before the rules that use them, whatever
// their order in the text.
func (r *reader) document(v *hujson.Value) {
	m := map[string]*hujson.Value{}
	keep := func(name string) field { return func(v *hujson.Value) { m[name] = v } }
	fields := map[string]field{}
	for _, name := range []string{"acls", "grants", "groups", "hosts", "ipsets", "tagowners", "autoapprovers", "ssh",
		"nodeattrs", "postures", "defaultsrcposture", "tests", "sshtests", "disableipv4", "onecgnatroute",
		"randomizeclientport", "derpmap"} {
		fields[name] = keep(name)
	}
	if !r.object(v, fields) {
		return
	}
	section := func(name string, read func(v *hujson.Value)) {
		if v := m[name]; v != nil {
			read(v)
		}
	}
	section("groups", r.groups)
	section("hosts", r.hosts)
	section("tagowners", r.tagOwners)
	section("ipsets", r.ipsets)
	section("postures", r.postures)
	section("defaultsrcposture", func(v *hujson.Value) { r.p.defaultPosture = r.postureRefs(v) })
	section("grants", func(v *hujson.Value) { r.list(v, r.grant) })
	section("acls", func(v *hujson.Value) { r.list(v, r.acl) })
	r.p.declared = hasMember(v, "acls") || hasMember(v, "grants")
	section("ssh", func(v *hujson.Value) { r.list(v, r.sshRule) })
	section("nodeattrs", func(v *hujson.Value) { r.list(v, r.nodeAttr) })
	section("autoapprovers", r.autoApprovers)
	section("disableipv4", r.boolInto(&r.p.disableIPv4))
	section("randomizeclientport", r.boolInto(&r.p.randomizePort))
	section("onecgnatroute", r.oneCGNAT)
	section("derpmap", r.derpMap)
	section("tests", func(v *hujson.Value) { r.list(v, r.test) })
	section("sshtests", func(v *hujson.Value) { r.list(v, r.sshTest) })
}

// hasMember reports whether the object has the member, even as null.
func hasMember(v *hujson.Value, key string) bool {
	o, ok := v.Value.(*hujson.Object)
	return ok && slices.ContainsFunc(o.Members, func(m hujson.ObjectMember) bool {
		return fold(memberName(&m)) == key
	})
}

func (r *reader) oneCGNAT(v *hujson.Value) {
	t, ok := r.text(v)
	switch {
	case !ok:
	case t.s == "" || t.s == "mac-always" || t.s == "mac-never":
		r.p.oneCGNAT = t.s
	default:
		r.fail(t.at, `OneCGNATRoute must be "", "mac-always" or "mac-never", not %q`, t.s)
	}
}

func (r *reader) derpMap(v *hujson.Value) {
	dm := new(tailcfg.DERPMap)
	if err := json.Unmarshal([]byte(raw(v)), dm); err != nil {
		r.fail(v.StartOffset, "derpMap: %v", err)
		return
	}
	for id, region := range dm.Regions {
		if region != nil && region.RegionID == 0 {
			region.RegionID = id
		}
		if region != nil && region.RegionID != id {
			r.fail(v.StartOffset, "derpMap: region %d has RegionID %d", id, region.RegionID)
			return
		}
	}
	r.p.derpMap = dm
}

// parsePrefix reads an address or a CIDR. A prefix with host bits is refused
// by the hosted service only in some places; here its bits are cut.
func parsePrefix(s string) (p netip.Prefix, single, ok bool) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), true, true
	}
	if p, err := netip.ParsePrefix(s); err == nil {
		return p.Masked(), false, true
	}
	return netip.Prefix{}, false, false
}
