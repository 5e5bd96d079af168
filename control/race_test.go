//go:build race

package control_test

// slow tells floods to be small: cryptography takes twenty times as long under the race detector.
const slow = true
