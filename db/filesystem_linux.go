package db

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// checkFileSystem refuses network file systems: SQLite's log needs memory that
// all its processes share, and locks that work.
func checkFileSystem(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return nil
	}
	switch uint32(st.Type) {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.AFS_SUPER_MAGIC:
		return fmt.Errorf("%s is on a network file system, where SQLite is not safe: use a local disk or PostgreSQL", dir)
	}
	return nil
}
