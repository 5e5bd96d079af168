package netmap_test

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"

	"tailscale.com/tailcfg"
	"tailscale.com/types/dnstype"

	"github.com/signalbox-net/signalbox/control/tailnet"
)

// dnsText is a DNS configuration in short: what stands on the left of "=" is a field of tailcfg.DNSConfig.
func dnsText(c *tailcfg.DNSConfig) string {
	addrs := func(list []*dnstype.Resolver) string {
		var out []string
		for _, r := range list {
			out = append(out, r.Addr)
		}
		return strings.Join(out, " ")
	}
	var lines []string
	add := func(name, text string) {
		if text != "" {
			lines = append(lines, name+"="+text)
		}
	}
	if c.Proxied {
		add("proxied", "yes")
	}
	add("domains", strings.Join(c.Domains, " "))
	add("resolvers", addrs(c.Resolvers))
	add("fallback", addrs(c.FallbackResolvers))
	for _, suffix := range slices.Sorted(maps.Keys(c.Routes)) {
		add("route "+suffix, addrs(c.Routes[suffix])+";")
	}
	for _, r := range c.ExtraRecords {
		add("record "+r.Name, strings.TrimPrefix(r.Type+" "+r.Value, " "))
	}
	return strings.Join(lines, "\n")
}

// What is configured about names reaches a client that begins, and one that is connected.
func TestDNSSettingsReachClients(t *testing.T) {
	magic := tailnet.DNS{MagicDNS: true, BaseDomain: "mesh.test"}
	with := func(change func(*tailnet.DNS)) tailnet.DNS {
		d := magic
		change(&d)
		return d
	}
	records := []tailcfg.DNSRecord{
		{Name: "grafana.mesh.test", Value: "100.64.0.9"}, {Name: "grafana.mesh.test", Type: "AAAA", Value: "fd7a:115c:a1e0::9"},
		{Name: "wiki.corp.example", Type: "A", Value: "100.64.0.8"}, {Name: "alone.example", Type: "A", Value: "100.64.0.7"},
	}
	recordLines := "\nrecord grafana.mesh.test=100.64.0.9\nrecord grafana.mesh.test=AAAA fd7a:115c:a1e0::9\nrecord wiki.corp.example=A 100.64.0.8\nrecord alone.example=A 100.64.0.7"
	for _, c := range []struct {
		name    string
		dns     tailnet.DNS
		records []tailcfg.DNSRecord
		want    string
	}{
		{"names only", magic, nil, "proxied=yes\ndomains=mesh.test\nroute mesh.test=;"},
		{"nothing", tailnet.DNS{BaseDomain: "mesh.test"}, nil, ""},
		{"search domains come after the base domain", with(func(d *tailnet.DNS) { d.SearchDomains = []string{"corp.example", "example"} }), nil,
			"proxied=yes\ndomains=mesh.test corp.example example\nroute mesh.test=;"},
		{"global resolvers without override are a fallback", with(func(d *tailnet.DNS) { d.Global = []string{"9.9.9.9", "https://dns.example/q"} }), nil,
			"proxied=yes\ndomains=mesh.test\nfallback=9.9.9.9 https://dns.example/q\nroute mesh.test=;"},
		{"global resolvers with override", with(func(d *tailnet.DNS) { d.Global, d.OverrideLocal = []string{"9.9.9.9", "2620:fe::fe"}, true }), nil,
			"proxied=yes\ndomains=mesh.test\nresolvers=9.9.9.9 2620:fe::fe\nroute mesh.test=;"},
		{"split resolvers", with(func(d *tailnet.DNS) {
			d.Split = map[string][]string{"corp.example": {"10.0.0.53", "10.0.0.54:5353"}, "lab.example": {"10.1.0.53"}}
		}), nil, "proxied=yes\ndomains=mesh.test\nroute corp.example=10.0.0.53 10.0.0.54:5353;\nroute lab.example=10.1.0.53;\nroute mesh.test=;"},
		// A name that no route leads to the client's own resolver would be asked of the system's.
		{"records get routes where nothing else leads to them", with(func(d *tailnet.DNS) { d.Split = map[string][]string{"corp.example": {"10.0.0.53"}} }), records,
			"proxied=yes\ndomains=mesh.test\nroute alone.example=;\nroute corp.example=10.0.0.53;\nroute mesh.test=;" + recordLines},
		{"records need no routes when all names are asked of us", with(func(d *tailnet.DNS) { d.Global, d.OverrideLocal = []string{"9.9.9.9"}, true }), records,
			"proxied=yes\ndomains=mesh.test\nresolvers=9.9.9.9\nroute mesh.test=;" + recordLines},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := fleet(t, policies[0], 2)
			connected := viewer{id: 1}
			connected.catchUp(w)
			w.begin()
			dns, err := json.Marshal(c.dns)
			if err != nil {
				t.Fatal(err)
			}
			list, err := json.Marshal(c.records)
			if err != nil {
				t.Fatal(err)
			}
			w.set(tailnet.SettingDNS, string(dns))
			w.set(tailnet.SettingExtraRecords, string(list))
			w.publish()
			if got := dnsText(first(t, w.now, 1).DNSConfig); got != c.want {
				t.Errorf("a client that begins is told\n%s\nwant\n%s", got, c.want)
			}
			connected.catchUp(w)
			if got := dnsText(connected.view.DNS); got != c.want {
				t.Errorf("a connected client knows\n%s\nwant\n%s", got, c.want)
			}
		})
	}
}
