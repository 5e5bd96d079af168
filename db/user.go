package db

import (
	"fmt"
	"strings"

	"tailscale.com/tailcfg"
)

type userRow struct {
	ID            int64 `gorm:"primaryKey"`
	TailnetID     int64
	Name          string
	NameKey       string
	DisplayName   string
	Email         string
	Role          string
	Provider      string
	ProviderID    *string
	ProfilePicURL string `gorm:"column:profile_pic_url"`
	Created       int64
}

func (userRow) TableName() string { return "users" }

// nameKey is what makes two login names the same.
func nameKey(name string) string { return strings.ToLower(name) }

func userToRow(u *User) (*userRow, error) {
	name := clean(u.Name)
	if name == "" || name != u.Name {
		return nil, &InvalidError{"Name", "is not a user name"}
	}
	return &userRow{
		ID: int64(u.ID), Name: name, NameKey: nameKey(name), DisplayName: clean(u.DisplayName), Email: clean(u.Email),
		Role: clean(u.Role), Provider: clean(u.Provider), ProviderID: optional(clean(u.ProviderID)),
		ProfilePicURL: clean(u.ProfilePicURL), Created: micros(u.Created),
	}, nil
}

func rowToUser(r *userRow) (*User, error) {
	u := &User{
		ID: tailcfg.UserID(r.ID), Tailnet: TailnetID(r.TailnetID), Name: r.Name, DisplayName: r.DisplayName, Email: r.Email,
		Role: r.Role, Provider: r.Provider, ProfilePicURL: r.ProfilePicURL, Created: fromMicros(r.Created),
	}
	if r.ProviderID != nil {
		u.ProviderID = *r.ProviderID
	}
	return u, nil
}

// User returns the user of that id.
func (r *Reader) User(id tailcfg.UserID) (*User, error) {
	return findOne(r, r.mine().Where("id = ?", id), rowToUser)
}

// UserByName returns the user of that login name, without regard to case.
func (r *Reader) UserByName(name string) (*User, error) {
	if name != clean(name) {
		return nil, ErrNotFound
	}
	return findOne(r, r.mine().Where("name_key = ?", nameKey(name)), rowToUser)
}

// UserByEmail returns the first user with that address. Addresses are not
// unique, and identity providers do not vouch for all of them: never take one
// for an identity.
func (r *Reader) UserByEmail(email string) (*User, error) {
	if email == "" || email != clean(email) {
		return nil, ErrNotFound
	}
	return findOne(r, r.mine().Where("email = ?", email).Order("id"), rowToUser)
}

// Users returns all users, by id.
func (r *Reader) Users() ([]*User, error) {
	return find(r, r.mine().Order("id"), rowToUser)
}

// CreateUser adds a user and sets u.ID, u.Tailnet and, when zero, u.Created.
// ErrExists when the name or the provider's id is taken.
func (tx *Tx) CreateUser(u *User) error {
	row, err := userToRow(u)
	if err != nil {
		return err
	}
	row.ID, row.TailnetID = 0, int64(tx.tailnet)
	if row.Created == 0 {
		row.Created = micros(tx.now)
	}
	if err := tx.guard(func() error { return tx.err(tx.g.Create(row).Error) }); err != nil {
		return fmt.Errorf("create user: %w", err)
	}
	u.ID, u.Tailnet, u.Created = tailcfg.UserID(row.ID), tx.tailnet, fromMicros(row.Created)
	tx.note(KindUser, row.ID)
	return nil
}

// PutUser writes the whole row of a user; ID and Created stay.
func (tx *Tx) PutUser(u *User) error {
	row, err := userToRow(u)
	if err != nil {
		return err
	}
	row.TailnetID = int64(tx.tailnet)
	err = tx.guard(func() error {
		g := tx.mine().Model(&userRow{}).Where("id = ?", row.ID).Select("*").Omit("id", "created").Updates(row)
		return tx.touched(g.RowsAffected, tx.err(g.Error))
	})
	if err != nil {
		return fmt.Errorf("put user %d: %w", u.ID, err)
	}
	tx.note(KindUser, row.ID)
	return nil
}

// touched makes a write that met no row ErrNotFound.
func (tx *Tx) touched(rows int64, err error) error {
	if err == nil && rows == 0 {
		return ErrNotFound
	}
	return err
}

// DeleteUser removes a user who owns no nodes, with the user's keys. ErrInUse
// when nodes are left.
func (tx *Tx) DeleteUser(id tailcfg.UserID) error {
	if err := tx.deleteUser(id); err != nil {
		return fmt.Errorf("delete user %d: %w", id, err)
	}
	return nil
}

func (tx *Tx) deleteUser(id tailcfg.UserID) error {
	if err := tx.requireUser(id); err != nil {
		return err
	}
	var nodes int
	if err := tx.one(&nodes, "SELECT count(*) FROM nodes WHERE user_id = ?", id); err != nil {
		return err
	}
	if nodes > 0 {
		return fmt.Errorf("%w: the user has %d nodes", ErrInUse, nodes)
	}
	for table, kind := range map[string]Kind{"auth_keys": KindAuthKey, "api_keys": KindAPIKey} {
		var keys []int64
		if err := tx.err(tx.g.Table(table).Where("user_id = ?", id).Order("id").Pluck("id", &keys).Error); err != nil {
			return err
		}
		if len(keys) == 0 {
			continue
		}
		if _, err := tx.exec("DELETE FROM "+table+" WHERE user_id = ?", id); err != nil {
			return err
		}
		for _, k := range keys {
			tx.note(kind, k)
		}
	}
	if _, err := tx.exec("DELETE FROM users WHERE id = ?", id); err != nil {
		return err
	}
	tx.note(KindUser, int64(id))
	return nil
}

// requireUser is ErrNotFound unless the tailnet has the user. The schema
// cannot say that a node's user is of the node's tailnet.
func (tx *Tx) requireUser(id tailcfg.UserID) error {
	var n int
	if err := tx.one(&n, "SELECT count(*) FROM users WHERE id = ? AND tailnet_id = ?", id, tx.tailnet); err != nil {
		return err
	}
	if n == 0 {
		return fmt.Errorf("user %d: %w", id, ErrNotFound)
	}
	return nil
}
