package tailnet_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/tailnet"
)

// Whatever a client says of itself, no more than 64 KiB of JSON are kept, and what peers and the policy need goes last.
func TestHostinfoIsNeverStoredAboveItsCap(t *testing.T) {
	const most = 64 << 10
	wide := strings.Repeat("<", 10_000) // six bytes each in JSON
	tags := func(h *tailcfg.Hostinfo) {
		for range 64 {
			h.RequestTags = append(h.RequestTags, "tag:"+strings.Repeat("<", 508))
		}
	}
	texts := func(h *tailcfg.Hostinfo) {
		v := reflect.ValueOf(h).Elem()
		for i := range v.NumField() {
			if f := v.Field(i); f.Kind() == reflect.String && v.Type().Field(i).Type.Name() != "Bool" {
				f.SetString(wide)
			}
		}
	}
	lists := func(h *tailcfg.Hostinfo) {
		for i := range 3000 {
			h.RoutableIPs = append(h.RoutableIPs, netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 13: byte(i >> 8), 14: byte(i), 15: 1}), 128))
			h.Services = append(h.Services, tailcfg.Service{Proto: tailcfg.TCP, Port: uint16(i), Description: wide[:512]})
		}
		h.NetInfo = &tailcfg.NetInfo{PreferredDERP: 7, DERPLatency: map[string]float64{}}
		for i := range 256 {
			h.NetInfo.DERPLatency[fmt.Sprintf("%s%d", strings.Repeat("<", 28), i)] = 0.123456789012345678
		}
		h.SSH_HostKeys, h.WoLMACs = []string{wide[:2048]}, []string{wide[:512]}
	}
	place := func(h *tailcfg.Hostinfo) {
		h.Location = &tailcfg.Location{Country: wide, CountryCode: wide, City: wide, CityCode: wide}
		h.TPM = &tailcfg.TPMInfo{Manufacturer: wide, Vendor: wide, FamilyIndicator: wide}
	}
	for name, fill := range map[string][]func(*tailcfg.Hostinfo){
		"tags": {tags}, "strings": {texts}, "lists": {lists}, "everything": {tags, texts, lists, place},
	} {
		h := new(tailcfg.Hostinfo)
		for _, f := range fill {
			f(h)
		}
		got := tailnet.CleanHostinfo(h)
		text, err := json.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		if len(text) > most {
			t.Errorf("%s: %d bytes are kept, want at most %d", name, len(text), most)
		}
		if name == "lists" && (len(got.RoutableIPs) == 0 || got.NetInfo.PreferredDERP != 7) {
			t.Errorf("%s: %d routes and relay %d are kept", name, len(got.RoutableIPs), got.NetInfo.PreferredDERP)
		}
	}
	honest := &tailcfg.Hostinfo{Hostname: "h", OS: "linux", RequestTags: []string{"tag:a"}, SSH_HostKeys: []string{"ssh-ed25519 AAAA"}}
	if got := tailnet.CleanHostinfo(honest); got.OS != "linux" || len(got.RequestTags) != 1 || len(got.SSH_HostKeys) != 1 {
		t.Errorf("an ordinary Hostinfo became %+v", got)
	}
}
