package fault

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// An APIError is an answer of the API that is not a success.
type APIError struct {
	What   string
	Status int
	Retry  string // the Retry-After header
	Body   string
}

func (e *APIError) Error() string {
	return fmt.Sprintf("%s: status %d: %.300s", e.What, e.Status, e.Body)
}

// status is the status of an APIError, and 0 for other errors.
func status(err error) int {
	if e, ok := errors.AsType[*APIError](err); ok {
		return e.Status
	}
	return 0
}

// rawJSON is a body that is sent as it is.
type rawJSON string

// Call makes one request to the API through the unix socket. in and out may be
// nil.
func (s *Server) Call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if text, ok := in.(rawJSON); ok {
		body = strings.NewReader(string(text))
	} else if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://signalbox"+path, body)
	if err != nil {
		return err
	}
	res, err := s.api.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 16<<20))
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return &APIError{method + " " + path, res.StatusCode, res.Header.Get("Retry-After"), string(text)}
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(text, out)
}

// Must is Call that fails the test on an error.
func (s *Server) Must(method, path string, in, out any) {
	s.t.Helper()
	if err := s.Call(s.t.Context(), method, path, in, out); err != nil {
		s.t.Fatal(err)
	}
}

// The API's records, as far as tests look at them.
type (
	userRecord struct{ ID, Name string }
	keyRecord  struct {
		ID, Key    string
		Reusable   bool
		Used       bool
		Expiration time.Time
	}
	nodeRecord struct {
		ID          string
		MachineKey  string
		NodeKey     string
		GivenName   string
		IPAddresses []string
		User        *userRecord
		Online      bool
	}
	policyRecord struct{ Policy string }
)

func (s *Server) users(ctx context.Context) ([]userRecord, error) {
	var out struct{ Users []userRecord }
	return out.Users, s.Call(ctx, "GET", "/api/v1/user", nil, &out)
}

func (s *Server) nodes(ctx context.Context) ([]nodeRecord, error) {
	var out struct{ Nodes []nodeRecord }
	err := s.Call(ctx, "GET", "/api/v1/node", nil, &out)
	return out.Nodes, err
}

func (s *Server) createUser(ctx context.Context, name string) (userRecord, error) {
	var out struct{ User userRecord }
	err := s.Call(ctx, "POST", "/api/v1/user", map[string]string{"name": name}, &out)
	return out.User, err
}

func (s *Server) createKey(ctx context.Context, user string, reusable bool, expires time.Time) (keyRecord, error) {
	var out struct{ PreAuthKey keyRecord }
	err := s.Call(ctx, "POST", "/api/v1/preauthkey", map[string]any{
		"user": user, "reusable": reusable, "expiration": expires.UTC().Format(time.RFC3339),
	}, &out)
	return out.PreAuthKey, err
}

func (s *Server) setPolicy(ctx context.Context, text string) error {
	return s.Call(ctx, "PUT", "/api/v1/policy", map[string]string{"policy": text}, nil)
}

// NewUser creates a user and returns its id.
func (s *Server) NewUser(name string) string {
	s.t.Helper()
	u, err := s.createUser(s.t.Context(), name)
	if err != nil {
		s.t.Fatal(err)
	}
	return u.ID
}

// NewKey creates a reusable auth key of a new user.
func (s *Server) NewKey(user string) string {
	s.t.Helper()
	k, err := s.createKey(s.t.Context(), s.NewUser(user), true, time.Now().Add(time.Hour))
	if err != nil {
		s.t.Fatal(err)
	}
	return k.Key
}

// Get makes a request to the main listener, from a connection of its own.
func Get(ctx context.Context, url string) (status int, body string, err error) {
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		return 0, "", err
	}
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 4<<20))
	return res.StatusCode, string(text), err
}
