package acl

// Examination is what there is to say about a policy text that somebody wants
// to put in force. The policy is good when Faults has none.
type Examination struct {
	Policy *Policy // nil when Errors has faults of the text itself
	Access *Access // nil as well when the policy cannot be compiled
	Errors Errors  // of Parse and Compile, the decisive one first
	Failed []Failure
}

// Examine parses, compiles and tests a text, and finds in one go what Parse,
// Compile and Check would find one after the other: names are looked at in
// what can be read of a faulty text, and tests run when names are all that is
// wrong, as if those names denoted nobody.
func Examine(src []byte, t *Tailnet) *Examination {
	x := &Examination{}
	p, errs := read(src)
	if p == nil {
		x.Errors = errs
		return x
	}
	c := newCompiler(p, t)
	names := c.checkNames(p)
	x.Errors = append(errs, names...)
	if len(errs) > 0 {
		return x
	}
	x.Policy = p
	a, err := c.compile()
	if err != nil {
		x.Errors = append(x.Errors, err.(Errors)...)
		return x
	}
	x.Failed = Check(p, t, a)
	if len(names) == 0 {
		x.Access = a
	}
	return x
}

// Faults are all errors and failed tests, the decisive one first.
func (x *Examination) Faults() Errors {
	out := x.Errors[:len(x.Errors):len(x.Errors)]
	for _, f := range x.Failed {
		out = append(out, &Error{f.Line, f.Column, f.Path, f.Message})
	}
	return out
}
