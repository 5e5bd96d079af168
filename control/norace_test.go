//go:build !race

package control_test

const slow = false
