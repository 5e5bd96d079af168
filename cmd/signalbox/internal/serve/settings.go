package serve

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
	"github.com/signalbox-net/signalbox/derp"
	"github.com/signalbox-net/signalbox/web/listener"
)

// storeSettings writes what the configuration says of the tailnet into it. Documents that have not changed make no revision.
func (s *server) storeSettings(ctx context.Context) error {
	regions, err := s.regions.Load()
	if err != nil {
		return err
	}
	d := &s.cfg.DNS
	docs := map[string]any{
		tailnet.SettingDNS: tailnet.DNS{
			MagicDNS: d.MagicDNS, BaseDomain: strings.Trim(d.BaseDomain, "."), OverrideLocal: d.OverrideLocalDNS, Global: d.Nameservers.Global,
			Split: d.Nameservers.Split, SearchDomains: d.SearchDomains,
		},
		tailnet.SettingOptions: tailnet.Options{
			Domains: s.cfg.Policy.Domains, Taildrop: s.cfg.Taildrop.Enabled, LogTail: s.cfg.LogTail.Enabled, AutoUpdate: s.cfg.AutoUpdate.Enabled,
			ControlURL: noiseURL(s.cfg.ServerURL),
		},
		s.mapSetting(): s.withCompanion(regions),
	}
	if d.ExtraRecordsPath == "" {
		records := []tailcfg.DNSRecord{}
		for _, r := range d.ExtraRecords {
			records = append(records, tailcfg.DNSRecord{Name: r.Name, Type: r.Type, Value: r.Value})
		}
		docs[tailnet.SettingExtraRecords] = records
	}
	_, err = s.store.Update(ctx, s.tailnet, system, func(tx *db.Tx) error {
		if err := s.putDialPlan(tx); err != nil {
			return err
		}
		for _, name := range slices.Sorted(maps.Keys(docs)) {
			if err := putSetting(tx, name, docs[name]); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("store settings: %w", err)
	}
	return nil
}

// putDialPlan stores the configured dial plan. That there is none is stored only over an earlier plan, which clients then have to be told.
func (s *server) putDialPlan(tx *db.Tx) error {
	plan := new(tailcfg.ControlDialPlan)
	for _, c := range s.cfg.ControlDialPlan {
		plan.Candidates = append(plan.Candidates, tailcfg.ControlIPCandidate{
			IP: c.IP, DialStartDelaySec: c.StartDelay.Seconds(), DialTimeoutSec: c.Timeout.Seconds(), Priority: c.Priority,
		})
	}
	if len(plan.Candidates) == 0 {
		if _, err := tx.Setting(tailnet.SettingDialPlan); err != nil {
			if errors.Is(err, db.ErrNotFound) {
				return nil
			}
			return err
		}
	}
	return putSetting(tx, tailnet.SettingDialPlan, plan)
}

// putSetting stores a document and, if it is another one than before, the audit row of that.
func putSetting(tx *db.Tx, name string, doc any) error {
	b, err := json.Marshal(doc)
	if err != nil {
		return fmt.Errorf("setting %s: %w", name, err)
	}
	old, err := tx.Setting(name)
	if err != nil && !errors.Is(err, db.ErrNotFound) {
		return err
	}
	now, err := tx.PutSetting(name, b)
	if err != nil || old != nil && old.Hash == now.Hash {
		return err
	}
	return tx.Audit("setting.set", "setting:"+name, auditable(old), auditable(now))
}

// auditable is a setting as its audit row has it: the whole document, or what tells a large one from others.
func auditable(s *db.Setting) any {
	const largest = 16 << 10
	switch {
	case s == nil:
		return nil
	case len(s.Value) > largest:
		return map[string]any{"bytes": len(s.Value), "sha256": s.Hash}
	}
	return json.RawMessage(s.Value)
}

// putDERPMap stores a new relay map, which then reaches the clients like any other change.
func (s *server) putDERPMap(m *tailcfg.DERPMap) {
	m = s.withCompanion(m)
	_, err := s.ledger.Do(context.Background(), system, func(tx *db.Tx) error { return putSetting(tx, s.mapSetting(), m) })
	if err != nil {
		s.log.Error("store the relay map", "err", err)
	}
}

// withCompanion adds the region by which clients find out what their NAT is like.
func (s *server) withCompanion(m *tailcfg.DERPMap) *tailcfg.DERPMap {
	if s.relay == nil || !s.cfg.DERP.Server.AutomaticallyAddEmbeddedDERPRegion {
		return m
	}
	id := s.relay.Region().RegionID + 1
	for m.Regions[id] != nil {
		id++
	}
	second := s.relay.Companion(id)
	if second == nil {
		return m
	}
	out := &tailcfg.DERPMap{HomeParams: &tailcfg.DERPHomeParams{RegionScore: map[int]float64{}}, OmitDefaultRegions: m.OmitDefaultRegions, Regions: maps.Clone(m.Regions)}
	if m.HomeParams != nil {
		maps.Copy(out.HomeParams.RegionScore, m.HomeParams.RegionScore)
	}
	out.HomeParams.RegionScore[id] = derp.CompanionScore
	out.Regions[id] = second
	return out
}

// mapSetting is where this server's relay map is stored. Clients get the maps of all servers together.
func (s *server) mapSetting() string {
	if s.self.ID <= 1 {
		return tailnet.SettingDERPMap
	}
	return fmt.Sprintf("%s/%d", tailnet.SettingDERPMap, s.self.ID)
}

// relayConfig translates the configuration's part on the relay. While the control URL is http the relay has a TLS listener of its own, since
// clients speak only TLS to a relay.
func (s *server) relayConfig() (derp.Config, error) {
	c := &s.cfg.DERP.Server
	u, err := url.Parse(s.cfg.ServerURL)
	if err != nil {
		return derp.Config{}, fmt.Errorf("server_url: %w", err)
	}
	instance := s.self.ID
	if instance <= 1 {
		instance = 0
	}
	cfg := derp.Config{
		Instance:   instance,
		PrivateKey: s.secrets.derp, MeshKey: s.secrets.mesh, Admit: s.admit, RegionID: c.RegionID, RegionCode: c.RegionCode, RegionName: c.RegionName, HostName: c.HostName,
		IPv4: c.IPv4, IPv6: c.IPv6, STUNListen: c.STUNListenAddr, STUNSecondListen: c.STUNSecondListenAddr, BootstrapHosts: []string{u.Hostname()},
		Source: listener.ClientAddr, Identified: listener.Identify, WrapListener: s.guard.Wrap, ConnContext: listener.ConnContext, Log: s.log,
		OnDuplicate: func(d derp.Duplicate) {
			s.log.Warn("one node key on two relay connections: a copied key, or a reconnect", "key", d.Key.ShortString(), "new", d.New, "old", d.Old)
		},
	}
	if u.Scheme == "https" {
		cfg.CanPort80 = s.plainAt == 80
		cfg.PublicPort = 443
		if p := u.Port(); p != "" {
			if cfg.PublicPort, err = strconv.Atoi(p); err != nil {
				return cfg, fmt.Errorf("server_url: port %q", p)
			}
		}
		return cfg, nil
	}
	cfg.TLSListen = c.ListenAddr
	host := c.HostName
	if host == "" {
		host = "127.0.0.1"
	}
	cfg.CertPEM, cfg.KeyPEM, err = s.certificate(context.Background(), host)
	return cfg, err
}

func (s *server) pools() db.Pools {
	p := &s.cfg.Prefixes
	return db.Pools{IPv4: p.V4, IPv6: p.V6, Random: p.Allocation == "random"}
}

// reserved is the label that would hide the server's own name. Those of extra records are reserved by the records themselves, since a file or
// another server may change them.
func (s *server) reserved() []string {
	u, err := url.Parse(s.cfg.ServerURL)
	if err != nil {
		return nil
	}
	label, ok := strings.CutSuffix(u.Hostname(), "."+strings.Trim(s.cfg.DNS.BaseDomain, "."))
	if !ok || strings.Contains(label, ".") {
		return nil
	}
	return []string{label}
}

// machineAddrs are addresses by which other machines may reach this one over plain HTTP: private ones.
func machineAddrs() []netip.Addr {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var out []netip.Addr
	for _, a := range list {
		p, err := netip.ParsePrefix(a.String())
		if err == nil && p.Addr().IsPrivate() {
			out = append(out, p.Addr())
		}
	}
	return out
}

// noiseURL is the base of addresses that clients fetch over Noise. Clients reuse their connection only for the authority that they logged in
// to, and always take such addresses for https.
func noiseURL(serverURL string) string {
	u, err := url.Parse(serverURL)
	if err != nil {
		return serverURL
	}
	return "https://" + u.Host
}
