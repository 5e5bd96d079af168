package tailnet

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/db"
)

// Names of the stored settings. What comes from configuration, a file or a URL is stored under one of them, so that it becomes a revision
// which every server follows in the same order.
const (
	SettingDNS          = "dns"           // DNS
	SettingExtraRecords = "extra_records" // []tailcfg.DNSRecord
	SettingDERPMap      = "derp_map"      // tailcfg.DERPMap; servers beside the first store theirs under this name, a slash and their number
	SettingOptions      = "options"       // Options
	SettingDialPlan     = "dial_plan"     // tailcfg.ControlDialPlan; absent in a tailnet that never had one
)

// DNS is what the tailnet's devices are told about names.
type DNS struct {
	MagicDNS      bool                `json:"magicDNS"`
	BaseDomain    string              `json:"baseDomain"` // without dots at its ends; device names hang below it
	OverrideLocal bool                `json:"overrideLocal"`
	Global        []string            `json:"global,omitempty"` // resolvers: IP addresses or https URLs
	Split         map[string][]string `json:"split,omitempty"`  // suffix to resolvers
	SearchDomains []string            `json:"searchDomains,omitempty"`
}

// Options are facts of the whole tailnet that are neither DNS nor relays.
type Options struct {
	DisplayName     string   `json:"displayName,omitempty"`
	Domains         []string `json:"domains,omitempty"` // e-mail domains that belong to the tailnet, for the policy
	Taildrop        bool     `json:"taildrop"`
	LogTail         bool     `json:"logtail"` // whether clients may send logs to Tailscale
	AutoUpdate      bool     `json:"autoUpdate"`
	RandomizePort   bool     `json:"randomizePort,omitempty"`
	ControlURL      string   `json:"controlURL,omitempty"`
	CollectServices bool     `json:"collectServices,omitempty"`
}

// Settings are the parsed settings of one Snapshot. They are read-only.
type Settings struct {
	DNS     DNS
	Records []tailcfg.DNSRecord
	DERPMap *tailcfg.DERPMap // the servers' maps together
	Options Options

	// DialPlan says at which addresses clients look for the servers. Nil when there never was one; without candidates when there is none any
	// more, which clients have to be told.
	DialPlan *tailcfg.ControlDialPlan

	labels []string                    // see RecordLabels
	maps   map[string]*tailcfg.DERPMap // by setting
	raw    map[string]string           // name to hash, to see what moved
}

// Suffix is the MagicDNS suffix with the trailing dot.
func (s *Settings) Suffix() string { return s.DNS.BaseDomain + "." }

// RecordLabels are the labels that extra records have directly below the base domain: a device of such a name would answer for the record.
func (s *Settings) RecordLabels() []string { return s.labels }

func recordLabels(base string, records []tailcfg.DNSRecord) (out []string) {
	for _, r := range records {
		label, ok := strings.CutSuffix(strings.ToLower(strings.Trim(r.Name, ".")), "."+strings.ToLower(base))
		if ok && !strings.Contains(label, ".") {
			out = append(out, label)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// parseSettings reads the stored documents. A document that does not parse keeps what prev says: an older server may meet a newer one's.
func parseSettings(prev *Settings, rows map[string]*db.Setting) (*Settings, error) {
	s := &Settings{DERPMap: &tailcfg.DERPMap{}, raw: map[string]string{}, maps: map[string]*tailcfg.DERPMap{}}
	if prev != nil {
		*s = *prev
		s.raw, s.maps = maps.Clone(prev.raw), maps.Clone(prev.maps)
	}
	var first error
	for name, row := range rows {
		if row == nil {
			continue
		}
		if err := s.read(name, row.Value); err != nil {
			if first == nil {
				first = fmt.Errorf("setting %s: %w", name, err)
			}
			continue
		}
		s.raw[name] = row.Hash
		if strings.HasPrefix(name, SettingDERPMap) {
			s.mergeMaps()
		}
	}
	s.labels = recordLabels(s.DNS.BaseDomain, s.Records)
	return s, first
}

// mergeMaps joins the servers' relay maps: regions side by side, nodes of one region in the order of the servers. What a later map repeats is
// left out.
func (s *Settings) mergeMaps() {
	out := &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{}}
	var key strings.Builder
	for _, name := range slices.Sorted(maps.Keys(s.maps)) {
		m := s.maps[name]
		key.WriteString(s.raw[name] + " ")
		if m.HomeParams != nil {
			out.HomeParams = m.HomeParams
		}
		for id, r := range m.Regions {
			have := out.Regions[id]
			if have == nil {
				c := *r
				c.Nodes = slices.Clone(r.Nodes)
				out.Regions[id] = &c
				continue
			}
			for _, n := range r.Nodes {
				if !slices.ContainsFunc(have.Nodes, func(o *tailcfg.DERPNode) bool { return o.Name == n.Name }) {
					have.Nodes = append(have.Nodes, n)
				}
			}
		}
	}
	s.DERPMap = out
	s.raw[mergedMaps] = key.String()
}

// mergedMaps stands in raw for all relay maps together.
const mergedMaps = "*" + SettingDERPMap

func (s *Settings) read(name string, value json.RawMessage) error {
	if name == SettingDERPMap || strings.HasPrefix(name, SettingDERPMap+"/") {
		v := new(tailcfg.DERPMap)
		if err := json.Unmarshal(value, v); err != nil {
			return err
		}
		s.maps[name] = v
		return nil
	}
	switch name {
	case SettingDNS:
		var v DNS
		if err := json.Unmarshal(value, &v); err != nil {
			return err
		}
		s.DNS = v
	case SettingExtraRecords:
		var v []tailcfg.DNSRecord
		if err := json.Unmarshal(value, &v); err != nil {
			return err
		}
		s.Records = v
	case SettingOptions:
		var v Options
		if err := json.Unmarshal(value, &v); err != nil {
			return err
		}
		s.Options = v
	case SettingDialPlan:
		v := new(tailcfg.ControlDialPlan)
		if err := json.Unmarshal(value, v); err != nil {
			return err
		}
		s.DialPlan = v
	}
	return nil
}

// effectiveRoutes are the approved routes that the node still advertises, in the order of approval.
func effectiveRoutes(n *db.Node) []netip.Prefix {
	if len(n.ApprovedRoutes) == 0 || n.State.Hostinfo == nil || len(n.State.Hostinfo.RoutableIPs) == 0 {
		return nil
	}
	var out []netip.Prefix
	for _, r := range n.ApprovedRoutes {
		for _, a := range n.State.Hostinfo.RoutableIPs {
			if a == r {
				out = append(out, r)
				break
			}
		}
	}
	return out
}

// SelfKey stands for the settings that show in a node's own capabilities: equal keys, equal capabilities.
func (s *Settings) SelfKey() string { return s.raw[SettingOptions] + "/" + s.DNS.BaseDomain }

// Key stands for the content of a stored setting; that of SettingDERPMap for all relay maps together.
func (s *Settings) Key(name string) string {
	if name == SettingDERPMap {
		name = mergedMaps
	}
	return s.raw[name]
}

// MapNames are the settings that hold relay maps, in order.
func (s *Settings) MapNames() []string { return slices.Sorted(maps.Keys(s.maps)) }

// MapOf is the relay map of one setting, an empty one when there is none.
func (s *Settings) MapOf(name string) *tailcfg.DERPMap {
	if m := s.maps[name]; m != nil {
		return m
	}
	return new(tailcfg.DERPMap)
}
