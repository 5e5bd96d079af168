package cli

import (
	"slices"
	"strings"
	"testing"

	"github.com/signalbox-net/signalbox/acl"
)

func flow(opened bool, from, to, allow string) acl.FlowChange {
	return acl.FlowChange{Opened: opened, From: strings.Split(from, ", "), To: strings.Split(to, ", "), Allow: allow}
}

func TestChangesThatAreAlikeShareALine(t *testing.T) {
	for name, c := range map[string]struct {
		flows []acl.FlowChange
		want  []string
	}{
		"both families": {
			[]acl.FlowChange{flow(true, "a (IPv4)", "b (IPv4)", "tcp:22"), flow(true, "a (IPv6)", "b (IPv6)", "tcp:22")},
			[]string{"+ a -> b: tcp:22"},
		},
		"one family of two": {
			[]acl.FlowChange{flow(true, "a (IPv4)", "b (IPv4)", "tcp:22")},
			[]string{"+ a (IPv4) -> b (IPv4): tcp:22"},
		},
		"an end with one family": {
			[]acl.FlowChange{flow(true, "a (IPv4)", "10.0.0.0/24, old", "tcp:22")},
			[]string{"+ a -> 10.0.0.0/24, old: tcp:22"},
		},
		"a bystander with one family": {
			[]acl.FlowChange{flow(true, "a (IPv4), old", "b (IPv4)", "tcp:22"), flow(true, "a (IPv6), new", "b (IPv6)", "tcp:22")},
			[]string{"+ a, old, new -> b: tcp:22"},
		},
		"families that differ": {
			[]acl.FlowChange{flow(true, "a (IPv4)", "b (IPv4)", "tcp:22"), flow(true, "a (IPv6), c (IPv6)", "b (IPv6)", "tcp:22")},
			[]string{"+ a (IPv4) -> b (IPv4): tcp:22", "+ a (IPv6), c (IPv6) -> b (IPv6): tcp:22"},
		},
		"opened and closed": {
			[]acl.FlowChange{flow(true, "a (IPv4)", "b (IPv4)", "tcp:22"), flow(false, "a (IPv6)", "b (IPv6)", "tcp:22")},
			[]string{"+ a (IPv4) -> b (IPv4): tcp:22", "- a (IPv6) -> b (IPv6): tcp:22"},
		},
		"nodes without the other family are kept apart": {
			[]acl.FlowChange{flow(true, "a", "b", "tcp:22"), flow(true, "c", "d", "tcp:22")},
			[]string{"+ a -> b: tcp:22", "+ c -> d: tcp:22"},
		},
		"the sender among the receivers": {
			[]acl.FlowChange{flow(true, "a", "a, b", "icmp"), flow(true, "a", "b", "tcp:22"), flow(true, "a, b", "a, b", "tcp:80")},
			[]string{"+ a -> b: tcp:22 icmp", "+ a, b -> a, b: tcp:80"},
		},
		"protocols and ports": {
			[]acl.FlowChange{
				flow(true, "a", "b", "icmp"), flow(true, "a", "b", "tcp:443"), flow(true, "a", "b", "tcp:80"), flow(true, "a", "b", "tcp:8000-8080"),
				flow(true, "a", "b", "udp:443"), flow(true, "a", "b", "udp:80"), flow(true, "a", "c", "tcp:80"), flow(true, "a", "b", "app:x=[{}]"),
			},
			[]string{"+ a -> b: tcp+udp:80,443 tcp:8000-8080 icmp", "+ a -> b: app:x=[{}]", "+ a -> c: tcp:80"},
		},
	} {
		if got := flowLines(c.flows); !slices.Equal(got, c.want) {
			t.Errorf("%s:\ngot  %q\nwant %q", name, got, c.want)
		}
	}
}

func TestDirectionsThatAreAlikeShareALine(t *testing.T) {
	got := peerLines([]acl.PeerChange{
		{Appear: true, Viewers: []string{"a"}, Peers: []string{"b", "c"}},
		{Appear: true, Viewers: []string{"b", "c"}, Peers: []string{"a"}},
		{Appear: true, Viewers: []string{"d", "e"}, Peers: []string{"d", "e"}},
		{Viewers: []string{"a"}, Peers: []string{"f"}},
	})
	if want := []string{"+ a <-> b, c", "+ d, e see each other", "- a -> f"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	got = loginLines([]acl.LoginChange{
		{From: []string{"a"}, To: []string{"b"}, User: "*", Was: "deny", Now: "check"},
		{From: []string{"a"}, To: []string{"b"}, User: "root", Was: "deny", Now: "check"},
		{From: []string{"a"}, To: []string{"b"}, User: "db", Was: "accept", Now: "check"},
	})
	if want := []string{"+ a -> b as root, other users: check, was deny", "- a -> b as db: check, was accept"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
