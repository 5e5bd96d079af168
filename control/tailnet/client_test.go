package tailnet

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"tailscale.com/tailcfg"
)

func TestLabelsOfHostNames(t *testing.T) {
	for in, want := range map[string]string{
		"": "node", "Kitchen Pi": "kitchen-pi", "HOST.example.com": "host-example-com", "host.local": "host", "--": "node", "日本": "node", "münchen": "m-nchen",
		"a_b": "a-b", "192.168.1.1": "192-168-1-1", "\x00\x01": "node", "..": "node", "-a-": "a", "xn--mnchen-3ya": "xn--mnchen-3ya",
	} {
		if got := Label(in, 0); got != want {
			t.Errorf("Label(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzLabel(f *testing.F) {
	for _, s := range []string{"", "laptop", strings.Repeat("a", 300), strings.Repeat("a-", 40), "a.b.c", "ü", "\xff", "-.-", "localhost", strings.Repeat("é", 100) + "a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		l := Label(s, 7)
		if l == "" || len(l) > 63 || strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || l[0] == '-' || l[len(l)-1] == '-' {
			t.Errorf("Label(%q) = %q", s, l)
		}
	})
}

func TestAutoNamed(t *testing.T) {
	for _, c := range []struct {
		given, hostname string
		want            bool
	}{
		{"laptop", "Laptop", true}, {"laptop-3", "laptop", true}, {"node", "", true}, {"node-7", "日本", true},
		{"nodejs-prod", "web1", false}, {"node-7", "web1", false}, {"laptop-x", "laptop", false}, {"db", "laptop", false},
	} {
		if got := AutoNamed(c.given, c.hostname); got != c.want {
			t.Errorf("AutoNamed(%q, %q) = %t", c.given, c.hostname, got)
		}
	}
}

func TestRefusedRoutes(t *testing.T) {
	for s, allowed := range map[string]bool{
		"0.0.0.0/0": true, "::/0": true, "10.0.0.0/8": true, "192.168.1.0/24": true, "fd00::/8": false, "2001:db8::/32": true, "fd7a:115c:a1e0:b1a:0:7:a00:0/104": true,
		"0.0.0.0/8": false, "127.0.0.0/8": false, "127.0.0.1/32": false, "169.254.1.0/24": false, "224.0.0.0/4": false, "255.255.255.255/32": false,
		"100.64.0.0/10": false, "100.100.100.100/32": false, "100.64.0.1/32": false, "96.0.0.0/4": false, "0.0.0.0/1": false,
		"::1/128": false, "fe80::/64": false, "ff02::/16": false, "fd7a:115c:a1e0::/48": false, "fd7a:115c:a1e0::1/128": false, "::ffff:10.0.0.0/104": false, "::ffff:127.0.0.1/128": false,
	} {
		if why := RefusedRoute(netip.MustParsePrefix(s)); (why == "") != allowed {
			t.Errorf("%s: %q, allowed should be %t", s, why, allowed)
		}
	}
}

func TestHostinfoIsCutToItsCaps(t *testing.T) {
	big := strings.Repeat("ä\x00\u202e", 2000)
	h := &tailcfg.Hostinfo{Hostname: big, OS: big, PushDeviceToken: big, Distro: "\xff\xfe", NetInfo: &tailcfg.NetInfo{LinkType: big, PreferredDERP: -5}}
	for i := range 10000 {
		h.RoutableIPs = append(h.RoutableIPs, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24))
		h.Services = append(h.Services, tailcfg.Service{Proto: tailcfg.PeerAPI4, Port: uint16(i), Description: big})
		h.RequestTags = append(h.RequestTags, "tag:"+big[:400])
		h.SSH_HostKeys = append(h.SSH_HostKeys, big[:2000])
		h.WoLMACs = append(h.WoLMACs, big)
	}
	c := CleanHostinfo(h)
	text, err := json.Marshal(c)
	if err != nil || len(text) > maxHostinfo {
		t.Errorf("%d bytes are kept, %v", len(text), err)
	}
	if strings.Contains(string(text), `\u0000`) || len(c.Hostname) > maxHostname || len(c.OS) > maxString || c.NetInfo.PreferredDERP != 0 {
		t.Errorf("strings are kept as they are: %.200s", text)
	}
	if len(c.RoutableIPs) == 0 || len(c.RoutableIPs) > maxRoutes || c.RoutableIPs[0] != h.RoutableIPs[0] {
		t.Errorf("%d routes are kept", len(c.RoutableIPs))
	}
	peer, err := json.Marshal(PeerHostinfo(c))
	if err != nil || len(peer) > 2048 {
		t.Errorf("peers are told %d bytes, %v", len(peer), err)
	}
	if len(h.RoutableIPs) != 10000 || h.Hostname != big {
		t.Error("the argument was modified")
	}
}

func TestUsualHostinfoStaysWhole(t *testing.T) {
	h := &tailcfg.Hostinfo{
		Hostname: "laptop", OS: "linux", Services: []tailcfg.Service{{Proto: tailcfg.TCP, Port: 22, Description: "sshd"}, {Proto: tailcfg.PeerAPI4, Port: 1}},
		SSH_HostKeys: []string{"ssh-ed25519 AAAA"}, RoutableIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, RequestTags: []string{"tag:x"},
	}
	if got, want := asJSON(t, CleanHostinfo(h)), asJSON(t, h); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestEndpointsAreCut(t *testing.T) {
	var list []netip.AddrPort
	for _, s := range []string{"0.0.0.0:1", "[::]:1", "192.0.2.1:0", "224.0.0.1:5", "[ff02::1]:5"} {
		list = append(list, netip.MustParseAddrPort(s))
	}
	list = append(list, netip.AddrPort{})
	for i := range 10000 {
		list = append(list, netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), 41641))
	}
	got := CleanEndpoints(list, nil)
	if len(got) != maxEndpoints || got[0].Addr != list[6] {
		t.Errorf("%d endpoints are kept, the first is %v", len(got), got[0])
	}
	if zoned := CleanEndpoints([]netip.AddrPort{netip.MustParseAddrPort("[fe80::1%eth0]:1")}, nil); zoned[0].Addr.String() != "[fe80::1]:1" {
		t.Errorf("zone kept: %v", zoned)
	}
}

// TestReportsKeepWhatTheyLeaveOut: clients leave their Hostinfo out when it has not changed, and send no home relay before they have measured.
func TestReportsKeepWhatTheyLeaveOut(t *testing.T) {
	info := &tailcfg.Hostinfo{Hostname: "a"}
	old := Update{Hostinfo: info, HomeDERP: 5, Cap: 1}
	if u := (Update{Cap: 2}).After(&old); u.Hostinfo != info || u.HomeDERP != 5 || u.Cap != 2 {
		t.Errorf("got %+v", u)
	}
	other := &tailcfg.Hostinfo{Hostname: "b"}
	if u := (Update{Hostinfo: other}).After(&old); u.Hostinfo != other || u.HomeDERP != 5 {
		t.Errorf("got %+v", u)
	}
	if u := (Update{Hostinfo: other, HomeDERP: 6}).After(&old); u.HomeDERP != 6 {
		t.Errorf("got %+v", u)
	}
}
