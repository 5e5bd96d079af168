package acl

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tailscale/hujson"
)

const (
	defaultCheckPeriod = 12 * time.Hour
	maxCheckPeriod     = 168 * time.Hour
)

func (r *reader) sshRule(v *hujson.Value) {
	ru := &sshRule{at: v.StartOffset, end: v.EndOffset, period: defaultCheckPeriod}
	var action, period text
	var src, dst, env []text
	if !r.object(v, map[string]field{
		"action": r.textInto(&action), "src": r.textsInto(&src), "dst": r.textsInto(&dst),
		"users": r.textsInto(&ru.users), "checkperiod": r.textInto(&period), "acceptenv": r.textsInto(&env),
		"recorder": r.textsInto(&ru.recorders), "enforcerecorder": r.boolInto(&ru.enforce),
		"srcposture": func(v *hujson.Value) { ru.where = r.postureRefs(v) },
	}) {
		return
	}
	switch action.s {
	case "accept":
	case "check":
		ru.check = true
	case "":
		r.fail(orAt(action.at, ru.at), "action must be specified")
	default:
		r.fail(action.at, "%q is not a valid action", action.s)
	}
	r.sshUsers(ru)
	if period.at != 0 {
		r.checkPeriod(ru, period)
	}
	for _, t := range env {
		if t.s == "" {
			r.fail(t.at, "acceptEnv values cannot be empty")
		}
		ru.acceptEnv = append(ru.acceptEnv, t.s)
	}
	r.sshSides(ru, src, dst)
	for _, t := range ru.recorders {
		if s, err := r.selector(t); err != nil || s.kind != selTag {
			r.fail(t.at, "recorder %q must be a tag that tagOwners defines", t.s)
		}
	}
	r.p.ssh = append(r.p.ssh, ru)
}

func (r *reader) sshUsers(ru *sshRule) {
	if len(ru.users) == 0 {
		r.fail(ru.at, "users must be specified")
	}
	for _, t := range ru.users {
		switch {
		case t.s == "" || t.s == "*":
			r.fail(t.at, "user %q is not valid", t.s)
		case strings.HasPrefix(t.s, localpartPrefix):
			ru.localparts = append(ru.localparts, text{strings.TrimPrefix(t.s, localpartPrefix), t.at})
		}
	}
}

const localpartPrefix = "localpart:*@"

func (r *reader) checkPeriod(ru *sshRule, t text) {
	if !ru.check {
		r.fail(t.at, "checkPeriod is only valid with action check")
		return
	}
	if t.s == "always" {
		ru.always, ru.period = true, 0
		return
	}
	d, err := time.ParseDuration(t.s)
	switch {
	case err != nil:
		r.fail(t.at, "%v", err)
	case d < 0:
		r.fail(t.at, "checkPeriod %v must be a positive duration", d)
	case d > maxCheckPeriod:
		r.fail(t.at, "checkPeriod %v is above the max (168h)", d)
	}
	ru.period = d
}

// sshSides reads src and dst. A person's devices as destination need that same
// person as the only source.
func (r *reader) sshSides(ru *sshRule, src, dst []text) {
	for _, t := range src {
		s, err := r.selector(t)
		switch {
		case err != nil && s.kind != selNone:
			r.fail(t.at, "%v", err)
		case err == nil && (s.byUser() || s.kind == selTag || s.kind == selTagged || s.kind == selShared):
			ru.src = append(ru.src, s)
		default:
			r.fail(t.at, "invalid src %q", t.s)
		}
	}
	for _, t := range dst {
		s, err := r.selector(t)
		switch {
		case err != nil && s.kind == selTag:
			r.fail(t.at, "%v", err)
		case err != nil:
			r.fail(t.at, "invalid dst %q", t.s)
		case s.kind == selUser && !onlyUser(ru.src, s.name):
			r.fail(t.at, "dst %q: a user may only be the destination of that same user", t.s)
		case s.kind == selTag, s.kind == selSelf, s.kind == selMember, s.kind == selTagged, s.kind == selUser:
			ru.dst = append(ru.dst, s)
		default:
			r.fail(t.at, "invalid dst %q", t.s)
		}
		if err == nil && s.kind == selSelf {
			r.checkSSHSelf(ru, t)
		}
	}
}

func onlyUser(src []selector, name string) bool {
	for i := range src {
		if src[i].kind != selUser || src[i].name != name {
			return false
		}
	}
	return true
}

func (r *reader) checkSSHSelf(ru *sshRule, t text) {
	for i := range ru.src {
		if !ru.src[i].byUser() {
			r.fail(t.at, "%v", errSelfSource)
			return
		}
	}
}

func (r *reader) sshTest(v *hujson.Value) {
	t := &sshTest{at: v.StartOffset}
	if !r.object(v, map[string]field{
		"src": r.textInto(&t.src), "dst": r.textsInto(&t.dst), "accept": r.textsInto(&t.accept),
		"deny": r.textsInto(&t.deny), "check": r.textsInto(&t.check),
		"srcpostureattrs": func(v *hujson.Value) { t.posture = r.attrs(v) },
	}) {
		return
	}
	r.use(t.src.s)
	for _, d := range t.dst {
		r.use(d.s)
		if err := r.checkSSHTestDst(d.s); err != nil {
			r.fail(d.at, "%v", err)
		}
	}
	r.p.sshTests = append(r.p.sshTests, t)
}

// checkSSHTestDst refuses what no SSH test may name. Other mistakes make the
// test fail instead.
func (r *reader) checkSSHTestDst(s string) error {
	if strings.HasPrefix(s, "tag:") {
		if r.p.tagOwners[s] == nil {
			return fmt.Errorf("SSH tests dst contains unknown tag %q", s)
		}
		return nil
	}
	prefix, single, isPrefix := parsePrefix(s)
	switch {
	case s == "*", s == "autogroup:internet", s == "autogroup:danger-all", isPrefix && (!single || !prefix.IsSingleIP()):
		return fmt.Errorf("SSH tests dst contains disallowed element %q", s)
	}
	return nil
}

// attrs reads posture attributes of a test.
func (r *reader) attrs(v *hujson.Value) map[string]any {
	out := map[string]any{}
	r.table(v, func(name text, v *hujson.Value) {
		lit, ok := v.Value.(hujson.Literal)
		switch {
		case ok && lit.Kind() == '"':
			out[name.s] = lit.String()
		case ok && lit.Kind() == '0':
			out[name.s] = lit.Float()
		case ok && (lit.Kind() == 't' || lit.Kind() == 'f'):
			out[name.s] = lit.Bool()
		default:
			r.fail(v.StartOffset, "attribute %q must be a string, a number or a boolean", name.s)
		}
	})
	return out
}

func (r *reader) test(v *hujson.Value) {
	t := &test{at: v.StartOffset}
	proto := func(v *hujson.Value) {
		if lit, ok := v.Value.(hujson.Literal); ok && lit.Kind() == '0' {
			t.proto = text{string(lit), v.StartOffset}
			return
		}
		r.textInto(&t.proto)(v)
	}
	if !r.object(v, map[string]field{
		"src": r.textInto(&t.src), "user": r.textInto(&t.src), "proto": proto,
		"accept": r.textsInto(&t.accept), "allow": r.textsInto(&t.accept), "deny": r.textsInto(&t.deny),
		"srcpostureattrs": func(v *hujson.Value) { t.posture = r.attrs(v) },
	}) {
		return
	}
	r.use(t.src.s)
	for _, d := range slices.Concat(t.accept, t.deny) {
		if host, _, ok := cutPort(d.s); ok {
			r.use(host)
		}
	}
	r.p.tests = append(r.p.tests, t)
}
