//go:build !linux

package db

func checkFileSystem(string) error { return nil }
