// Package apiv1 serves /api/v1, the REST interface that Headscale 0.30 has, so
// that its command line habits, dashboards and Terraform provider work here.
//
// It owns the JSON shapes, their validation and the mapping of errors to HTTP.
// It never decides who may call (web/auth does), never writes except through
// the ledger, and keeps no state.
//
// A request takes this way: web/auth names the actor; the handler parses path
// and body into plain values; one ledger transaction changes the rows and
// appends the audit row; the handler waits for the snapshot of that revision
// and renders from it, so an answer always shows what is stored.
package apiv1
