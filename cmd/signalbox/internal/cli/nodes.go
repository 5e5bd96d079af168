package cli

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"tailscale.com/types/key"
)

// node is what the command line reads of the API's nodes.
type node struct {
	ID              string     `json:"id"`
	MachineKey      string     `json:"machineKey"`
	NodeKey         string     `json:"nodeKey"`
	IPAddresses     []string   `json:"ipAddresses"`
	Name            string     `json:"name"`
	User            *user      `json:"user"`
	LastSeen        *time.Time `json:"lastSeen"`
	Expiry          *time.Time `json:"expiry"`
	GivenName       string     `json:"givenName"`
	Online          bool       `json:"online"`
	ApprovedRoutes  []string   `json:"approvedRoutes"`
	AvailableRoutes []string   `json:"availableRoutes"`
	SubnetRoutes    []string   `json:"subnetRoutes"`
	Tags            []string   `json:"tags"`
	PreAuthKey      *struct {
		Ephemeral bool `json:"ephemeral"`
	} `json:"preAuthKey"`
}

func (m *program) nodesCmd() *cobra.Command {
	g := m.group("nodes", "Manage the nodes", "node", "machine", "machines")
	g.AddCommand(m.nodesList(), m.nodesListRoutes(), m.nodesRegister(), m.nodesExpire(), m.nodesRename(), m.nodesSetIP(),
		m.nodesDelete(), m.nodesBackfillIPs(), m.nodesTag(), m.nodesApproveRoutes(), m.nodesPing())
	return g
}

func (m *program) nodesList() *cobra.Command {
	var userName string
	cmd := m.verb("list", "List the nodes", 0, func(cmd *cobra.Command, _ []string) error {
		c, err := m.client()
		if err != nil {
			return err
		}
		path := "/node"
		if userName != "" {
			path += "?" + url.Values{"user": {userName}}.Encode()
		}
		var nodes []node
		raw, err := c.get(cmd.Context(), "GET", path, nil, "nodes", &nodes)
		if err != nil {
			return err
		}
		var rows [][]string
		for i := range nodes {
			rows = append(rows, m.nodeRow(&nodes[i]))
		}
		return m.printTable(raw, []string{"ID", "Hostname", "Name", "MachineKey", "NodeKey", "User", "Tags", "IP addresses",
			"Ephemeral", "Last seen", "Expiration", "Connected", "Expired"}, rows)
	})
	cmd.Aliases = []string{"ls", "show"}
	cmd.Flags().StringVarP(&userName, "user", "u", "", "only the nodes of this user")
	return cmd
}

func (m *program) nodeRow(n *node) []string {
	owner := ""
	if n.User != nil {
		owner = n.User.Name
	}
	connected := "offline"
	if n.Online {
		connected = "online"
	}
	expired := n.Expiry != nil && !n.Expiry.IsZero() && !n.Expiry.After(m.Now())
	return []string{n.ID, n.Name, n.GivenName, shortMachine(n.MachineKey), shortNode(n.NodeKey), owner,
		strings.Join(n.Tags, ", "), strings.Join(v4First(n.IPAddresses), ", "),
		yesNo(n.PreAuthKey != nil && n.PreAuthKey.Ephemeral), showTime(n.LastSeen), showTime(n.Expiry), connected, yesNo(expired)}
}

func shortMachine(s string) string {
	var k key.MachinePublic
	if k.UnmarshalText([]byte(s)) != nil {
		return s
	}
	return k.ShortString()
}

func shortNode(s string) string {
	var k key.NodePublic
	if k.UnmarshalText([]byte(s)) != nil {
		return s
	}
	return k.ShortString()
}

func v4First(addrs []string) []string {
	var v4, v6 []string
	for _, s := range addrs {
		if a, err := netip.ParseAddr(s); err == nil && a.Is4() {
			v4 = append(v4, s)
		} else {
			v6 = append(v6, s)
		}
	}
	return append(v4, v6...)
}

// nodeID adds -i, which names the node that a verb works on.
func (m *program) nodeID(cmd *cobra.Command, id *string) {
	cmd.Flags().StringVarP(id, "identifier", "i", "", "the node's id")
	required(cmd, "identifier")
	must(cmd.RegisterFlagCompletionFunc("identifier", m.completeNodeIDs))
	pre := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkID("--identifier", *id); err != nil {
			return err
		}
		return pre(cmd, args)
	}
}

func (m *program) nodesListRoutes() *cobra.Command {
	var id string
	cmd := m.verb("list-routes", "List the routes that nodes offer and serve", 0, func(cmd *cobra.Command, _ []string) error {
		if id != "" {
			if err := checkID("--identifier", id); err != nil {
				return err
			}
		}
		c, err := m.client()
		if err != nil {
			return err
		}
		var raws []json.RawMessage
		if _, err := c.get(cmd.Context(), "GET", "/node", nil, "nodes", &raws); err != nil {
			return err
		}
		kept, rows := []json.RawMessage{}, [][]string(nil)
		for _, raw := range raws {
			var n node
			if err := json.Unmarshal(raw, &n); err != nil {
				return err
			}
			if id != "" && n.ID != id || len(n.AvailableRoutes)+len(n.ApprovedRoutes)+len(n.SubnetRoutes) == 0 {
				continue
			}
			kept = append(kept, raw)
			rows = append(rows, []string{n.ID, n.GivenName, strings.Join(n.ApprovedRoutes, ", "),
				strings.Join(n.AvailableRoutes, ", "), strings.Join(n.SubnetRoutes, ", ")})
		}
		return m.printTable(kept, []string{"ID", "Hostname", "Approved", "Available", "Serving (Primary)"}, rows)
	})
	cmd.Aliases = []string{"lsr", "routes"}
	cmd.Flags().StringVarP(&id, "identifier", "i", "", "only the node with this id")
	return cmd
}

// nodeVerb is a verb that changes a node and shows it.
func (m *program) nodeVerb(cmd *cobra.Command, method, path string, body any, text string) error {
	c, err := m.client()
	if err != nil {
		return err
	}
	var n node
	raw, err := c.get(cmd.Context(), method, path, body, "node", &n)
	if err != nil {
		return err
	}
	return m.print(raw, strings.ReplaceAll(text, "NAME", printable(n.GivenName)))
}

func (m *program) nodesRegister() *cobra.Command {
	var userName, authID string
	cmd := m.verb("register", "Register a waiting node (deprecated: use auth register)", 0, func(cmd *cobra.Command, _ []string) error {
		fmt.Fprintln(m.Stderr, "signalbox: this verb is deprecated, use 'signalbox auth register --user USER --auth-id ID'")
		q := url.Values{"user": {userName}, "key": {lastElement(authID)}}
		return m.nodeVerb(cmd, "POST", "/node/register?"+q.Encode(), nil, "Node NAME registered")
	})
	cmd.Flags().StringVarP(&userName, "user", "u", "", "name of the user who gets the node")
	cmd.Flags().StringVarP(&authID, "key", "k", "", "the id at the end of the URL that the device shows")
	required(cmd, "user", "key")
	return cmd
}

func (m *program) nodesExpire() *cobra.Command {
	var id, expiry string
	var disable bool
	cmd := m.verb("expire", "Make a node log in again, now or later, or never", 0, func(cmd *cobra.Command, _ []string) error {
		body, text := map[string]any{}, "Node NAME expired"
		switch {
		case disable && expiry != "":
			return usagef("--disable contradicts --expiry")
		case disable:
			body["disableExpiry"], text = true, "Node NAME never expires"
		case expiry != "":
			t, err := time.Parse(time.RFC3339, expiry)
			if err != nil {
				return usagef("--expiry: want a time such as 2030-01-31T12:00:00Z, got %q", expiry)
			}
			body["expiry"], text = t, "Node NAME expires at "+t.Local().Format(timeFormat)
		}
		return m.nodeVerb(cmd, "POST", "/node/"+id+"/expire", body, text)
	})
	cmd.Long = "The node stays in the database. An expired node has to log in again before it reaches others."
	cmd.Aliases = []string{"logout", "exp", "e"}
	m.nodeID(cmd, &id)
	cmd.Flags().StringVarP(&expiry, "expiry", "e", "", "when (RFC 3339); default now")
	cmd.Flags().BoolVarP(&disable, "disable", "d", false, "let the node never expire")
	return cmd
}

func (m *program) nodesRename() *cobra.Command {
	var id string
	cmd := m.verb("rename NEW_NAME", "Rename a node", 1, func(cmd *cobra.Command, args []string) error {
		path := "/node/" + id + "/rename/" + url.PathEscape(args[0])
		if m.force {
			path += "?force=true"
		}
		return m.nodeVerb(cmd, "POST", path, nil, "Node renamed to NAME")
	})
	cmd.Long = "A name that a node gave up in the last 24 h is held for its former owner; --force takes it nevertheless. A name that a node has stays its own."
	m.nodeID(cmd, &id)
	return cmd
}

func (m *program) nodesSetIP() *cobra.Command {
	var id, addr string
	cmd := m.verb("set-ip", "Give a node another address", 0, func(cmd *cobra.Command, _ []string) error {
		a, err := netip.ParseAddr(addr)
		if err != nil {
			return usagef("--ip: want an address such as 100.64.0.7, got %q", addr)
		}
		return m.nodeVerb(cmd, "POST", own+"/node/"+id+"/ip", map[string]any{"ipAddress": a.String()}, "Node NAME has the address "+a.String())
	})
	cmd.Long = "The address replaces the node's address of that family. It has to be in prefixes.v4 or prefixes.v6, and no other node may have it."
	m.nodeID(cmd, &id)
	cmd.Flags().StringVar(&addr, "ip", "", "the address")
	required(cmd, "ip")
	return cmd
}

func (m *program) nodesDelete() *cobra.Command {
	var id string
	cmd := m.verb("delete", "Delete a node", 0, func(cmd *cobra.Command, _ []string) error {
		c, err := m.client()
		if err != nil {
			return err
		}
		var n node
		if _, err := c.get(cmd.Context(), "GET", "/node/"+id, nil, "node", &n); err != nil {
			return err
		}
		ok, err := m.confirm("Do you want to remove the node %s?", n.GivenName)
		if err != nil {
			return err
		}
		if !ok {
			return m.print(result("Node not deleted"), "Node not deleted")
		}
		if err := c.call(cmd.Context(), "DELETE", "/node/"+id, nil, nil); err != nil {
			return err
		}
		return m.print(result("Node deleted"), "Node deleted")
	})
	cmd.Aliases = []string{"del"}
	m.nodeID(cmd, &id)
	return cmd
}

func (m *program) nodesBackfillIPs() *cobra.Command {
	cmd := m.verb("backfillips", "Give nodes the addresses that the configured prefixes ask for", 0, func(cmd *cobra.Command, _ []string) error {
		ok, err := m.confirm("Are you sure that you want to assign and remove IPs to and from nodes?")
		if err != nil {
			return err
		}
		if !ok {
			return m.print(result("Nothing changed"), "Nothing changed")
		}
		c, err := m.client()
		if err != nil {
			return err
		}
		var raw json.RawMessage
		if err := c.call(cmd.Context(), "POST", "/node/backfillips?confirmed=true", nil, &raw); err != nil {
			return err
		}
		var answer struct{ Changes []string }
		if err := json.Unmarshal(raw, &answer); err != nil {
			return err
		}
		return m.print(raw, strings.Join(append(answer.Changes, "Node IPs backfilled successfully"), "\n"))
	})
	cmd.Long = "Nodes without an address of a configured family get one; addresses of a family that is not configured any more are taken away."
	return cmd
}

func (m *program) nodesTag() *cobra.Command {
	var id string
	var tags []string
	cmd := m.verb("tag", "Set the tags of a node", 0, func(cmd *cobra.Command, _ []string) error {
		return m.nodeVerb(cmd, "POST", "/node/"+id+"/tags", map[string]any{"tags": tags}, "Node NAME updated")
	})
	cmd.Long = "The tags replace those that the node has. A tagged node belongs to its tags and to no user."
	cmd.Aliases = []string{"tags", "t"}
	m.nodeID(cmd, &id)
	cmd.Flags().StringSliceVarP(&tags, "tags", "t", nil, "the tags, as in tag:web,tag:prod")
	required(cmd, "tags")
	return cmd
}

func (m *program) nodesApproveRoutes() *cobra.Command {
	var id string
	var routes []string
	cmd := m.verb("approve-routes", "Set which routes of a node are approved", 0, func(cmd *cobra.Command, _ []string) error {
		list := []string{}
		for _, r := range routes {
			p, err := netip.ParsePrefix(r)
			if err != nil {
				return usagef("--routes: want prefixes such as 10.0.0.0/24, got %q", r)
			}
			list = append(list, p.String())
		}
		return m.nodeVerb(cmd, "POST", "/node/"+id+"/approve_routes", map[string]any{"routes": list}, "Node NAME updated")
	})
	cmd.Long = `The routes replace those approved before; --routes "" takes all back. One of 0.0.0.0/0 and ::/0 stands for both.`
	m.nodeID(cmd, &id)
	cmd.Flags().StringSliceVarP(&routes, "routes", "r", nil, "the routes, as in 10.0.0.0/24,192.168.0.0/24")
	required(cmd, "routes")
	return cmd
}
