package acl

// Warnings lists remarks about a valid policy, in the order of the text.
func Warnings(p *Policy, t *Tailnet) []Warning {
	var out []Warning
	if !p.declared {
		e := p.errorAt(p.root.StartOffset, "no acls or grants: every device reaches every device")
		out = append(out, Warning(*e))
	}
	return out
}
