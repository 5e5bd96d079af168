package acl

// Default is the policy text of a fresh tailnet: people reach their own
// devices and nothing else.
func Default() []byte { return []byte(defaultText) }

const defaultText = `// The policy of this tailnet. It is HuJSON: JSON with comments and trailing
// commas. Whatever no rule allows is denied.
//
//   signalbox policy check FILE      look for mistakes
//   signalbox policy diff OLD NEW    see what an edit would change
//   signalbox policy set -f FILE     make it live
{
	// Name sets of people here to use them in rules as "group:ops".
	"groups": {
		// "group:ops": ["alice@example.com", "bob@example.com"],
	},

	// Who may give a device a tag. A tagged device belongs to its tags and to
	// no person any more.
	"tagOwners": {
		// "tag:server": ["group:ops"],
	},

	"acls": [
		// Everyone reaches their own devices, on every port.
		{
			"action": "accept",
			"src":    ["autogroup:member"],
			"dst":    ["autogroup:self:*"],
		},

		// Operators reach the servers by SSH and HTTPS.
		// {
		// 	"action": "accept",
		// 	"src":    ["group:ops"],
		// 	"dst":    ["tag:server:22,443"],
		// },
	],

	// Who may log in with Tailscale SSH, and as which user.
	"ssh": [
		// {
		// 	"action": "check",
		// 	"src":    ["autogroup:member"],
		// 	"dst":    ["autogroup:self"],
		// 	"users":  ["autogroup:nonroot", "root"],
		// },
	],

	// Routes and exit nodes that need no approval by hand.
	"autoApprovers": {
		// "routes":   {"10.0.0.0/8": ["tag:server"]},
		// "exitNode": ["tag:server"],
	},

	// Expectations that must hold before an edit of this file goes live.
	"tests": [
		// {"src": "alice@example.com", "accept": ["tag:server:22"]},
	],
}
`
