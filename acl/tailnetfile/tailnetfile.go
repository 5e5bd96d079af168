// Package tailnetfile reads and writes the "signalbox-tailnet" format: the
// facts of a tailnet, without secrets, as a JSON document. With it a policy can
// be compiled, explained and compared offline, away from any server.
//
// A file is read leniently, unknown members are ignored and even the format
// member may be missing, and written strictly: sorted by id, so that two
// exports of one tailnet are equal.
package tailnetfile

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/signalbox-net/signalbox/acl"
	"tailscale.com/tailcfg"
)

// Format is the value of the format member.
const Format = "signalbox-tailnet"

// Version is the version that this package writes; it reads no newer one.
const Version = 1

// File is the document.
type File struct {
	Format  string `json:"format,omitempty"`
	Version int    `json:"version,omitempty"`

	Users     []User    `json:"users"`
	Nodes     []Node    `json:"nodes"`
	Settings  Settings  `json:"settings"`
	Services  []Service `json:"services,omitempty"`
	Primaries []Primary `json:"primaries,omitempty"`
	Policy    string    `json:"policy,omitempty"`
	// PolicyVersion is that of Policy on the server that wrote the file.
	PolicyVersion int64           `json:"policy_version,omitempty"`
	DNS           json.RawMessage `json:"dns,omitempty"`
}

// User is a person.
type User struct {
	ID    int64  `json:"id"`
	Name  string `json:"name"`
	Email string `json:"email,omitempty"`
	Role  string `json:"role,omitempty"`
}

// Node is a device. User holds a user's name, or an id in decimal; it is empty
// for a tagged device.
type Node struct {
	ID         int64          `json:"id"`
	Hostname   string         `json:"hostname"`
	Name       string         `json:"name,omitempty"`
	StableID   string         `json:"stable_id,omitempty"`
	User       string         `json:"user,omitempty"`
	Tags       []string       `json:"tags,omitempty"`
	IPv4       string         `json:"ipv4,omitempty"`
	IPv6       string         `json:"ipv6,omitempty"`
	Routable   []netip.Prefix `json:"routable_ips,omitempty"`
	Approved   []netip.Prefix `json:"approved_routes,omitempty"`
	MachineKey string         `json:"machine_key,omitempty"`
	NodeKey    string         `json:"node_key,omitempty"`
	Online     *bool          `json:"online,omitempty"`
	Expired    bool           `json:"expired,omitempty"`
	Expiry     string         `json:"expiry,omitempty"`
	Created    string         `json:"created,omitempty"`
	OS         string         `json:"os,omitempty"`
	Cap        int            `json:"cap,omitempty"`
	Attributes map[string]any `json:"attributes,omitempty"`
	Services   []string       `json:"services,omitempty"` // that it hosts
}

// Service is a virtual service.
type Service struct {
	Name string `json:"name"`
	IPv4 string `json:"ipv4,omitempty"`
	IPv6 string `json:"ipv6,omitempty"`
}

// Primary is a stored route election.
type Primary struct {
	Prefix netip.Prefix `json:"prefix"`
	Node   int64        `json:"node"`
}

// Settings are those of the tailnet that a policy depends on.
type Settings struct {
	Domains     []string `json:"domains"`
	HTTPS       bool     `json:"https_enabled"`
	ControlURL  string   `json:"control_url,omitempty"`
	DisplayName string   `json:"display_name,omitempty"`
	MagicDNS    bool     `json:"magic_dns,omitempty"`
	AutoUpdates bool     `json:"devices_auto_updates_on,omitempty"`
}

// Parse reads a document.
func Parse(b []byte) (*File, error) {
	f := new(File)
	if err := json.Unmarshal(b, f); err != nil {
		return nil, fmt.Errorf("parse tailnet file: %w", err)
	}
	if f.Format != "" && f.Format != Format {
		return nil, fmt.Errorf("parse tailnet file: format %q is not %q", f.Format, Format)
	}
	if f.Version > Version {
		return nil, fmt.Errorf("parse tailnet file: version %d is newer than %d", f.Version, Version)
	}
	return f, nil
}

// Marshal writes the document in its canonical form. It sorts f in place.
func (f *File) Marshal() ([]byte, error) {
	f.Format, f.Version = Format, Version
	slices.SortFunc(f.Users, func(a, b User) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortFunc(f.Nodes, func(a, b Node) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortFunc(f.Services, func(a, b Service) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(f.Primaries, func(a, b Primary) int { return cmp.Compare(a.Prefix.String(), b.Prefix.String()) })
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("write tailnet file: %w", err)
	}
	return append(b, '\n'), nil
}

// Tailnet is the document as the compiler takes it.
func (f *File) Tailnet() (*acl.Tailnet, error) {
	t := &acl.Tailnet{
		Domains: f.Settings.Domains, HTTPS: f.Settings.HTTPS, ControlURL: f.Settings.ControlURL,
		DisplayName: f.Settings.DisplayName, MagicDNS: f.Settings.MagicDNS, AutoUpdates: f.Settings.AutoUpdates,
	}
	users := map[string]tailcfg.UserID{}
	for _, u := range f.Users {
		t.Users = append(t.Users, acl.User{ID: tailcfg.UserID(u.ID), Name: u.Name, Email: u.Email, Role: u.Role})
		users[strconv.FormatInt(u.ID, 10)] = tailcfg.UserID(u.ID)
	}
	// Names win over ids, so that a user called "7" can be named.
	for _, u := range f.Users {
		users[u.Name] = tailcfg.UserID(u.ID)
	}
	slices.SortFunc(t.Users, func(a, b acl.User) int { return cmp.Compare(a.ID, b.ID) })
	hosts := map[string][]tailcfg.NodeID{}
	for i := range f.Nodes {
		n, err := f.Nodes[i].node(users)
		if err != nil {
			return nil, fmt.Errorf("node %d (%s): %w", f.Nodes[i].ID, f.Nodes[i].Hostname, err)
		}
		t.Nodes = append(t.Nodes, n)
		for _, s := range f.Nodes[i].Services {
			hosts[s] = append(hosts[s], n.ID)
		}
	}
	slices.SortFunc(t.Nodes, func(a, b acl.Node) int { return cmp.Compare(a.ID, b.ID) })
	for i := 1; i < len(t.Nodes); i++ {
		if t.Nodes[i].ID == t.Nodes[i-1].ID {
			return nil, fmt.Errorf("two nodes have id %d", t.Nodes[i].ID)
		}
	}
	for _, s := range f.Services {
		v4, v6, err := addrs(s.IPv4, s.IPv6)
		if err != nil {
			return nil, fmt.Errorf("service %s: %w", s.Name, err)
		}
		t.Services = append(t.Services, acl.Service{Name: s.Name, IPv4: v4, IPv6: v6, Hosts: hosts[s.Name]})
	}
	if len(f.Primaries) > 0 {
		t.Primaries = make(map[netip.Prefix]tailcfg.NodeID, len(f.Primaries))
		for _, p := range f.Primaries {
			t.Primaries[p.Prefix] = tailcfg.NodeID(p.Node)
		}
	}
	return t, nil
}

func (n *Node) node(users map[string]tailcfg.UserID) (acl.Node, error) {
	out := acl.Node{
		ID: tailcfg.NodeID(n.ID), Hostname: n.Hostname, FQDN: n.Name, Tags: n.Tags, OS: n.OS, Posture: n.Attributes,
		Cap: tailcfg.CapabilityVersion(n.Cap), Expired: n.Expired, Offline: n.Online != nil && !*n.Online,
		RoutableIPs: n.Routable,
	}
	if n.ID <= 0 {
		return out, fmt.Errorf("the id must be positive")
	}
	for _, p := range n.Approved {
		if slices.Contains(n.Routable, p) {
			out.ApprovedRoutes = append(out.ApprovedRoutes, p)
		}
	}
	if len(n.Tags) == 0 {
		id, ok := users[n.User]
		if !ok {
			return out, fmt.Errorf("no user %q", n.User)
		}
		out.User = id
	}
	var err error
	out.IPv4, out.IPv6, err = addrs(n.IPv4, n.IPv6)
	return out, err
}

func addrs(v4, v6 string) (a4, a6 netip.Addr, err error) {
	if v4 != "" {
		if a4, err = netip.ParseAddr(v4); err != nil || !a4.Is4() {
			return a4, a6, fmt.Errorf("ipv4 %q is no IPv4 address", v4)
		}
	}
	if v6 != "" {
		if a6, err = netip.ParseAddr(v6); err != nil || !a6.Is6() {
			return a4, a6, fmt.Errorf("ipv6 %q is no IPv6 address", v6)
		}
	}
	return a4, a6, nil
}
