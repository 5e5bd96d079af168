package apiv1

import (
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"unicode"

	"tailscale.com/tailcfg"

	"github.com/signalbox-net/signalbox/control/tailnet"
	"github.com/signalbox-net/signalbox/db"
)

func (s *server) createUser(w http.ResponseWriter, r *http.Request) (any, error) {
	var req CreateUserRequest
	if err := decode(w, r, &req, maxBody, false); err != nil {
		return nil, err
	}
	if err := errors.Join(userName("body.name", req.Name), text("body.displayName", req.DisplayName, 255), mail("body.email", req.Email), pictureURL("body.pictureUrl", req.PictureURL)); err != nil {
		return nil, err
	}
	u := &db.User{Name: req.Name, DisplayName: req.DisplayName, Email: req.Email, ProfilePicURL: req.PictureURL, Role: "member"}
	err := s.write(r, func(tx *db.Tx) error {
		u.ID, u.Tailnet, u.Created = 0, tx.Tailnet(), tx.Now()
		if err := tx.CreateUser(u); err != nil {
			return taken(err, "a user named %q exists", req.Name)
		}
		return tx.Audit("user.create", userTarget(u.ID), nil, userOf(u))
	})
	if err != nil {
		return nil, err
	}
	return UserResponse{userOf(u)}, nil
}

func (s *server) listUsers(r *http.Request) (any, error) {
	id, err := queryID(r, "id")
	if err != nil {
		return nil, err
	}
	name, email := r.URL.Query().Get("name"), r.URL.Query().Get("email")
	out := UsersResponse{Users: []*User{}}
	for _, u := range s.Replica.Current().Users() {
		if id != 0 && u.ID != tailcfg.UserID(id) || name != "" && u.Name != name || email != "" && !strings.EqualFold(u.Email, email) {
			continue
		}
		out.Users = append(out.Users, userOf(u))
	}
	return out, nil
}

func (s *server) renameUser(r *http.Request) (any, error) {
	id, err := pathID(r, "id")
	if err != nil {
		return nil, err
	}
	name, err := pathText(r, "name")
	if err != nil {
		return nil, err
	}
	if err := userName("path.name", name); err != nil {
		return nil, err
	}
	var u *db.User
	err = s.write(r, func(tx *db.Tx) error {
		if u, err = userByID(tx, id); err != nil {
			return err
		}
		before := userOf(u)
		if u.Name == name {
			return nil
		}
		u.Name = name
		if err := tx.PutUser(u); err != nil {
			return taken(err, "a user named %q exists", name)
		}
		return tx.Audit("user.rename", userTarget(u.ID), before, userOf(u))
	})
	if err != nil {
		return nil, err
	}
	return UserResponse{userOf(u)}, nil
}

func (s *server) deleteUser(r *http.Request) (any, error) {
	id, err := pathID(r, "id")
	if err != nil {
		return nil, err
	}
	err = s.write(r, func(tx *db.Tx) error {
		u, err := userByID(tx, id)
		if err != nil {
			return err
		}
		if err := tx.DeleteUser(u.ID); err != nil {
			if errors.Is(err, db.ErrInUse) {
				return conflict("user %q still has nodes: delete or tag them first", u.Name)
			}
			return err
		}
		return tx.Audit("user.delete", userTarget(u.ID), userOf(u), nil)
	})
	if err != nil {
		return nil, err
	}
	return EmptyResponse{}, nil
}

func userTarget(id tailcfg.UserID) string { return "user:" + strconv.FormatInt(int64(id), 10) }

// userByID finds a user for a write.
func userByID(tx *db.Tx, id int64) (*db.User, error) {
	u, err := tx.User(tailcfg.UserID(id))
	if errors.Is(err, db.ErrNotFound) {
		return nil, notFound("no user has the id %d", id)
	}
	return u, err
}

// taken gives ErrExists a text of its own.
func taken(err error, format string, args ...any) error {
	if errors.Is(err, db.ErrExists) {
		return conflict(format, args...)
	}
	return err
}

// findUser resolves a user that a caller named by name, e-mail address or id.
// Names do not begin with a digit, so the forms cannot be confused.
func findUser(snap *tailnet.Snapshot, location, ref string) (*db.User, error) {
	if ref == "" {
		return nil, badField(location, "is required")
	}
	if id, err := strconv.ParseInt(ref, 10, 64); err == nil {
		if u := snap.User(tailcfg.UserID(id)); u != nil {
			return u, nil
		}
	}
	if u := snap.UserByName(ref); u != nil {
		return u, nil
	}
	return nil, &statusError{http.StatusNotFound, "no such user", []ProblemField{{Message: "no such user", Location: location}}}
}

// userName checks a user name by Headscale's rules: what a policy can refer to
// as "name@".
func userName(location, name string) error {
	if len(name) < 2 || len(name) > 254 {
		return badField(location, "must have 2 to 254 characters")
	}
	if err := text(location, name, 254); err != nil {
		return err
	}
	ats := 0
	for i, c := range name {
		switch {
		case unicode.IsLetter(c), i > 0 && unicode.IsDigit(c), i > 0 && strings.ContainsRune("-._", c):
		case i > 0 && c == '@':
			ats++
		default:
			return badField(location, "must begin with a letter and contain only letters, digits, '-', '.', '_' and one '@'")
		}
	}
	if ats > 1 {
		return badField(location, "must not contain more than one '@'")
	}
	if strings.EqualFold(name, TaggedUserName) {
		return badField(location, "is reserved for tagged nodes")
	}
	return nil
}

// mail checks just enough that a policy can name the address.
func mail(location, s string) error {
	if s == "" {
		return nil
	}
	if err := text(location, s, 254); err != nil {
		return err
	}
	local, domain, ok := strings.Cut(s, "@")
	if !ok || local == "" || domain == "" || strings.ContainsAny(s, " \t\"") || strings.Contains(domain, "@") {
		return badField(location, "is not an e-mail address")
	}
	return nil
}

// pictureURL admits addresses that a browser may load. The server never does.
func pictureURL(location, s string) error {
	if s == "" {
		return nil
	}
	if err := text(location, s, 2048); err != nil {
		return err
	}
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return badField(location, "is not a web address")
	}
	return nil
}
