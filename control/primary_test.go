package control

import (
	"testing"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

func TestChoosePrimary(t *testing.T) {
	for name, c := range map[string]struct {
		online string   // by id, from 1: +, - or ? (unhealthy)
		groups []string // members by id; the first group is all routers
		row    tailcfg.NodeID
		want   tailcfg.NodeID // 0: nothing changes
	}{
		"default well":                   {"++", []string{"12"}, 0, 0},
		"default gone":                   {"-+", []string{"12"}, 0, 2},
		"default back":                   {"++", []string{"12"}, 2, 0},
		"stand-in gone":                  {"+-", []string{"12"}, 2, 1},
		"all gone":                       {"--", []string{"12"}, 0, 0},
		"row of a router that left":      {"-+", []string{"12"}, 7, 2},
		"group's first gone":             {"+-+", []string{"123", "23"}, 0, 3},
		"group's first back":             {"+++", []string{"123", "23"}, 3, 0},
		"group's stand-in gone":          {"++-", []string{"123", "23"}, 3, 1},
		"one for all and a group":        {"--++", []string{"1234", "24"}, 0, 4},
		"one row does not serve two":     {"-+-+", []string{"1234", "12", "34"}, 2, 0},
		"no group suffers for another":   {"--++-+", []string{"123456", "13", "24", "56"}, 3, 0},
		"a second group may be helped":   {"++-+-+", []string{"123456", "34", "56"}, 0, 4},
		"a group without anybody online": {"+--", []string{"123", "23"}, 0, 0},
		"default silent":                 {"?+", []string{"12"}, 0, 2},
		"default answers again":          {"++", []string{"12"}, 2, 0},
		"stand-in silent":                {"+?", []string{"12"}, 2, 1},
		"all silent":                     {"??", []string{"12"}, 0, 0},
		"all silent, a row":              {"??", []string{"12"}, 2, 0},
		"silent is better than gone":     {"-?", []string{"12"}, 0, 2},
		"well is better than silent":     {"-?+", []string{"123"}, 0, 3},
		"silent and the other gone":      {"?-", []string{"12"}, 0, 0},
		"silent in a group":              {"+?+", []string{"123", "23"}, 0, 3},
	} {
		t.Run(name, func(t *testing.T) {
			nodes := map[rune]*tailnet.Node{}
			for i, state := range c.online {
				id := tailcfg.NodeID(i + 1)
				nodes[rune('1'+i)] = &tailnet.Node{Node: &db.Node{ID: id, State: db.NodeState{Online: state != '-', Unhealthy: state == '?'}}, Slot: i}
			}
			var groups [][]*tailnet.Node
			for _, members := range c.groups {
				var g []*tailnet.Node
				for _, id := range members {
					g = append(g, nodes[id])
				}
				groups = append(groups, g)
			}
			got, ok := choose(groups, c.row)
			if got != c.want || ok != (c.want != 0) {
				t.Fatalf("chose %d %v, want %d", got, ok, c.want)
			}
			if !ok {
				return
			}
			if again, ok := choose(groups, got); ok && again == c.row {
				t.Errorf("taken back at once: %d", again)
			}
		})
	}
}
