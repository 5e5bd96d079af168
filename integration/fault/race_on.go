//go:build race

package fault

// raced says that the race detector watches the clients, which makes their
// cryptography some ten times slower, and the server not.
const raced = true
