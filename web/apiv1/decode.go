package apiv1

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/go-chi/chi/v5"
)

// Largest bodies.
const (
	maxBody       = 256 << 10
	maxPolicyBody = 2 << 20
)

// decode reads a JSON object into v. Members that v does not know are ignored,
// as Headscale's gateway did, since tools written for other versions send
// them. With optional an empty body is an empty object.
func decode(w http.ResponseWriter, r *http.Request, v any, limit int64, optional bool) error {
	if enc := r.Header.Get("Content-Encoding"); enc != "" && !strings.EqualFold(enc, "identity") {
		return &statusError{status: http.StatusUnsupportedMediaType, detail: "the body must not be compressed"}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err != nil {
		var tooBig *http.MaxBytesError
		if errors.As(err, &tooBig) {
			return err
		}
		return badField("body", "could not be read")
	}
	body = bytes.TrimSpace(body)
	switch {
	case len(body) == 0 && optional:
		return nil
	case len(body) == 0 || body[0] != '{':
		return badField("body", "must be a JSON object")
	case !utf8.Valid(body):
		return badField("body", "is not UTF-8")
	}
	err = json.Unmarshal(body, v)
	var (
		wrongType *json.UnmarshalTypeError
		syntax    *json.SyntaxError
	)
	switch {
	case err == nil:
		return nil
	case errors.As(err, &wrongType):
		return badField("body."+wrongType.Field, "%s where %s is expected", wrongType.Value, expected(wrongType))
	case errors.As(err, &syntax):
		return badField("body", "is not JSON: byte %d: %s", syntax.Offset, strings.TrimPrefix(syntax.Error(), "json: "))
	default:
		return badField("body", "is not valid")
	}
}

// expected names a JSON type the way a caller thinks of it.
func expected(e *json.UnmarshalTypeError) string {
	switch e.Type.String() {
	case "apiv1.ID":
		return "an id (a decimal string)"
	case "time.Time", "apiv1.Timestamp":
		return "a time such as 2030-01-02T15:04:05Z"
	case "bool":
		return "true or false"
	case "[]string":
		return "a list of strings"
	case "string":
		return "a string"
	default:
		return "an object"
	}
}

// pathText is a path parameter with its escapes resolved.
func pathText(r *http.Request, name string) (string, error) {
	s := chi.URLParam(r, name)
	if r.URL.RawPath == "" {
		return s, nil // chi matched the path that net/url had already unescaped
	}
	s, err := url.PathUnescape(s)
	if err != nil {
		return "", badField("path."+name, "is badly escaped")
	}
	return s, nil
}

// pathID is a numeric path parameter.
func pathID(r *http.Request, name string) (int64, error) {
	s, err := pathText(r, name)
	if err != nil {
		return 0, err
	}
	return parseID("path."+name, s)
}

// queryID is a numeric query parameter, 0 when absent.
func queryID(r *http.Request, name string) (int64, error) {
	s := r.URL.Query().Get(name)
	if s == "" {
		return 0, nil
	}
	return parseID("query."+name, s)
}

func parseID(location, s string) (int64, error) {
	id, err := strconv.ParseInt(s, 10, 64)
	if err != nil || id <= 0 {
		return 0, badField(location, "must be a positive decimal number")
	}
	return id, nil
}

// queryBool is a boolean query parameter, false when absent.
func queryBool(r *http.Request, name string) (bool, error) {
	s := r.URL.Query().Get(name)
	if s == "" {
		return false, nil
	}
	b, err := strconv.ParseBool(s)
	if err != nil {
		return false, badField("query."+name, "must be true or false")
	}
	return b, nil
}

// text checks a value that people will read: valid characters, no controls, at
// most n bytes.
func text(location, s string, n int) error {
	if len(s) > n {
		return badField(location, "must not be longer than %d bytes", n)
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, func(c rune) bool { return unicode.IsControl(c) || c == utf8.RuneError || unicode.Is(unicode.Cf, c) }) {
		return badField(location, "must not contain control characters")
	}
	return nil
}

// lastTime is the latest moment that an expiry may name. It keeps every date
// representable, in any time zone and as nanoseconds.
var lastTime = time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)

// future is the moment that t names, or now+otherwise when it names none. A
// zero time is none too: tools send it for an empty field.
func future(location string, t *Timestamp, now time.Time, otherwise time.Duration) (time.Time, error) {
	switch {
	case t == nil || t.IsZero():
		return now.Add(otherwise), nil
	case !t.After(now):
		return time.Time{}, badField(location, "is in the past")
	case t.After(lastTime):
		return time.Time{}, badField(location, "must not be after the year 2199")
	}
	return t.UTC(), nil
}
