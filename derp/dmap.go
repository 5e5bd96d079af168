package derp

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"
	"tailscale.com/tailcfg"
)

// The whole map goes to every client, and each client measures every region.
const (
	maxRegions     = 512
	maxRegionNodes = 64
	maxRegionID    = 1<<53 - 1 // tailcfg: guaranteed to fit a JavaScript number
	maxMapText     = 253       // bytes of any text in a map
)

// ParseMap reads a DERP map file: YAML with tailcfg's field names in any case
// (regions, regionid, hostname, …), or JSON. A region given as null takes the
// region of that number out of earlier sources. Unknown keys are errors: a
// misspelt one would silently cost a relay.
func ParseMap(data []byte) (*tailcfg.DERPMap, error) {
	doc := data
	if trimmed := bytes.TrimSpace(data); len(trimmed) == 0 || trimmed[0] != '{' {
		var v any
		if err := yaml.Unmarshal(data, &v); err != nil {
			return nil, fmt.Errorf("parse DERP map: %w", err)
		}
		if v == nil {
			return nil, fmt.Errorf("parse DERP map: it is empty")
		}
		v, err := jsonValue(v)
		if err != nil {
			return nil, fmt.Errorf("parse DERP map: %w", err)
		}
		if doc, err = json.Marshal(v); err != nil {
			return nil, fmt.Errorf("parse DERP map: %w", err)
		}
	}
	m := new(tailcfg.DERPMap)
	d := json.NewDecoder(bytes.NewReader(doc))
	d.DisallowUnknownFields()
	if err := d.Decode(m); err != nil {
		return nil, fmt.Errorf("parse DERP map: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, fmt.Errorf("parse DERP map: something follows the map")
	}
	if err := validateMap(m); err != nil {
		return nil, err
	}
	return m, nil
}

// jsonValue makes of a YAML value one that encoding/json can write: YAML has
// map keys that are numbers.
func jsonValue(v any) (any, error) {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			e, err := jsonValue(e)
			if err != nil {
				return nil, err
			}
			v[k] = e
		}
		return v, nil
	case map[any]any:
		out := make(map[string]any, len(v))
		for k, e := range v {
			name := fmt.Sprint(k)
			if _, dup := out[name]; dup {
				return nil, fmt.Errorf("key %s stands twice", name)
			}
			e, err := jsonValue(e)
			if err != nil {
				return nil, err
			}
			out[name] = e
		}
		return out, nil
	case []any:
		for i, e := range v {
			e, err := jsonValue(e)
			if err != nil {
				return nil, err
			}
			v[i] = e
		}
		return v, nil
	}
	return v, nil
}

// parseRemoteMap reads a map from a URL. Its publisher may know newer fields
// than we do, but has no business switching off our clients' checks.
func parseRemoteMap(data []byte) (*tailcfg.DERPMap, error) {
	m := new(tailcfg.DERPMap)
	if err := json.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("parse DERP map: %w", err)
	}
	if err := validateMap(m); err != nil {
		return nil, err
	}
	if len(m.Regions) == 0 {
		return nil, fmt.Errorf("DERP map: no regions")
	}
	for id, r := range m.Regions {
		if r == nil {
			return nil, fmt.Errorf("DERP map: region %d is null", id)
		}
		for _, n := range r.Nodes {
			if n.InsecureForTests || n.STUNTestIP != "" {
				return nil, fmt.Errorf("DERP map: node %q has settings for tests", n.Name)
			}
		}
	}
	return m, nil
}

// validateMap refuses what stock clients would trip over or misread.
func validateMap(m *tailcfg.DERPMap) error {
	if len(m.Regions) > maxRegions {
		return fmt.Errorf("DERP map: %d regions, at most %d are allowed", len(m.Regions), maxRegions)
	}
	names := map[string]int{}
	for _, id := range slices.Sorted(maps.Keys(m.Regions)) {
		if id <= 0 || id > maxRegionID {
			return fmt.Errorf("DERP map: region number %d is out of range", id)
		}
		r := m.Regions[id]
		if r == nil {
			continue
		}
		if err := validateRegion(id, r); err != nil {
			return fmt.Errorf("DERP map: region %d: %w", id, err)
		}
		for _, n := range r.Nodes {
			if other, dup := names[n.Name]; dup {
				return fmt.Errorf("DERP map: node name %q stands in regions %d and %d", n.Name, other, id)
			}
			names[n.Name] = id
		}
	}
	if m.HomeParams != nil {
		for id, score := range m.HomeParams.RegionScore {
			if !(score > 0) || math.IsInf(score, 0) {
				return fmt.Errorf("DERP map: score %v of region %d is not a positive number", score, id)
			}
		}
	}
	return nil
}

func validateRegion(id int, r *tailcfg.DERPRegion) error {
	if r.RegionID != id {
		return fmt.Errorf("RegionID is %d", r.RegionID)
	}
	if err := CheckText("RegionCode", r.RegionCode); err != nil {
		return err
	}
	if err := CheckText("RegionName", r.RegionName); err != nil {
		return err
	}
	if len(r.Nodes) == 0 {
		return fmt.Errorf("it has no nodes")
	}
	if len(r.Nodes) > maxRegionNodes {
		return fmt.Errorf("%d nodes, at most %d are allowed", len(r.Nodes), maxRegionNodes)
	}
	for i, n := range r.Nodes {
		if n == nil {
			return fmt.Errorf("node %d is null", i+1)
		}
		if err := validateNode(id, n); err != nil {
			return fmt.Errorf("node %q: %w", n.Name, err)
		}
	}
	return nil
}

func validateNode(region int, n *tailcfg.DERPNode) error {
	if n.Name == "" {
		return fmt.Errorf("it has no Name")
	}
	if err := CheckText("Name", n.Name); err != nil {
		return err
	}
	if n.RegionID != region {
		return fmt.Errorf("RegionID is %d", n.RegionID)
	}
	if err := CheckHostName(n.HostName); err != nil {
		return fmt.Errorf("HostName: %w", err)
	}
	if pin, ok := strings.CutPrefix(n.CertName, "sha256-raw:"); ok {
		// Clients compare the text with lower-case hex.
		if b, err := hex.DecodeString(pin); err != nil || len(b) != 32 || pin != strings.ToLower(pin) {
			return fmt.Errorf("CertName: want sha256-raw: and 64 lower-case hex digits")
		}
	} else if n.CertName != "" {
		if err := CheckHostName(n.CertName); err != nil {
			return fmt.Errorf("CertName: %w", err)
		}
	}
	for _, a := range []struct {
		field, text string
		family      func(netip.Addr) bool
	}{{"IPv4", n.IPv4, netip.Addr.Is4}, {"IPv6", n.IPv6, netip.Addr.Is6}, {"STUNTestIP", n.STUNTestIP, netip.Addr.IsValid}} {
		if a.text == "" || a.text == "none" {
			continue
		}
		ip, err := netip.ParseAddr(a.text)
		if err != nil || !a.family(ip) || ip.Zone() != "" {
			return fmt.Errorf("%s: %q is no such address, nor \"none\"", a.field, a.text)
		}
	}
	if n.STUNPort < -1 || n.STUNPort > 65535 {
		return fmt.Errorf("STUNPort %d is out of range", n.STUNPort)
	}
	if n.DERPPort < 0 || n.DERPPort > 65535 {
		return fmt.Errorf("DERPPort %d is out of range", n.DERPPort)
	}
	return nil
}

// CheckText refuses what has no place in a name that is shown to people. The
// error names the field.
func CheckText(field, s string) error {
	if len(s) > maxMapText {
		return fmt.Errorf("%s is longer than %d bytes", field, maxMapText)
	}
	if strings.ContainsFunc(s, unicode.IsControl) || strings.ToValidUTF8(s, "") != s {
		return fmt.Errorf("%s has control characters", field)
	}
	return nil
}
