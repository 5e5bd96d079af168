package cli

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// callTime is how long a verb that calls a device waits for the server, which
// itself waits 8 s for the device.
const callTime = 12 * time.Second

// call has the server call a device.
func (m *program) call(cmd *cobra.Command, id, verb string, body, out any) (json.RawMessage, error) {
	if err := checkID("ID", id); err != nil {
		return nil, err
	}
	c, err := m.client()
	if err != nil {
		return nil, err
	}
	if m.timeout == "" {
		c.timeout = max(c.timeout, callTime)
	}
	var raw json.RawMessage
	if err := c.callOwn(cmd.Context(), "POST", "/node/"+id+"/"+verb, body, &raw); err != nil {
		return nil, err
	}
	return raw, json.Unmarshal(raw, out)
}

// pong is what the command line reads of the API's answer to a ping.
type pong struct {
	Type           string  `json:"type"`
	Seconds        float64 `json:"seconds"`
	IP             string  `json:"ip"`
	NodeName       string  `json:"nodeName"`
	Endpoint       string  `json:"endpoint"`
	PeerRelay      string  `json:"peerRelay"`
	DERPRegionCode string  `json:"derpRegionCode"`
	Error          string  `json:"error"`
}

func (p *pong) String() string {
	took := time.Duration(p.Seconds * float64(time.Second)).Round(10 * time.Microsecond)
	if p.IP == "" {
		return fmt.Sprintf("the node answers in %v", took)
	}
	way := ""
	switch {
	case p.PeerRelay != "":
		way = " via peer relay " + p.PeerRelay
	case p.Endpoint != "":
		way = " via " + p.Endpoint
	case p.DERPRegionCode != "":
		way = " via DERP(" + p.DERPRegionCode + ")"
	}
	return fmt.Sprintf("pong from %s (%s)%s by %s in %v", p.NodeName, p.IP, way, p.Type, took)
}

func (m *program) nodesPing() *cobra.Command {
	var peer, by string
	cmd := m.verb("ping ID", "Have a node answer, or ping a peer", 1, func(cmd *cobra.Command, args []string) error {
		body := map[string]string{}
		if by != "" {
			body["type"] = by
		}
		if peer != "" {
			ip, err := netip.ParseAddr(peer)
			if err != nil {
				return usagef("--peer: want an IP address, got %q", peer)
			}
			body["ip"] = ip.String()
		} else if by != "" {
			return usagef("--type needs --peer")
		}
		var p pong
		raw, err := m.call(cmd, args[0], "ping", body, &p)
		if err != nil {
			return err
		}
		if p.Error != "" {
			return fmt.Errorf("the node's ping of %s: %s", peer, printable(p.Error))
		}
		return m.print(raw, printable(p.String()))
	})
	cmd.Long = "Without --peer the server has the node answer over its control connection. With it the node pings a peer and says which way that went."
	cmd.Example = "  signalbox nodes ping 3\n  signalbox nodes ping 3 --peer 100.64.0.7 --type TSMP"
	cmd.Flags().StringVar(&peer, "peer", "", "address of a peer that the node pings")
	cmd.Flags().StringVar(&by, "type", "", "disco, TSMP, ICMP or peerapi (default disco)")
	must(cmd.RegisterFlagCompletionFunc("type", cobra.FixedCompletions([]string{"disco", "TSMP", "ICMP", "peerapi"}, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}

func (m *program) debugC2N() *cobra.Command {
	cmd := m.verb("c2n ID PATH", "Show what a node says of itself", 2, func(cmd *cobra.Command, args []string) error {
		var a struct {
			Status int    `json:"status"`
			Body   string `json:"body"`
		}
		raw, err := m.call(cmd, args[0], "c2n", map[string]string{"path": args[1]}, &a)
		if err != nil {
			return err
		}
		body := strings.TrimRight(a.Body, "\n")
		lines := strings.Split(body, "\n")
		for i := range lines {
			lines[i] = printable(lines[i])
		}
		if a.Status != 200 {
			return fmt.Errorf("the node answers with status %d: %s", a.Status, strings.Join(lines, " "))
		}
		return m.print(raw, strings.Join(lines, "\n"))
	})
	cmd.Long = "PATH is one of /echo, /debug/health and /debug/metrics. A node that is too old for a path answers with status 400."
	return cmd
}
