package cli

import (
	"bytes"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestAuthIDIsTheLastElementOfTheURL(t *testing.T) {
	const id = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
	for _, s := range []string{
		id, " " + id + "\n", "https://mesh.example.com/register/" + id, "http://127.0.0.1:8080/auth/" + id + "/",
		"https://mesh.example.com/register/" + id + "?a=b/c", "/register/" + id + "#x",
	} {
		if got := lastElement(s); got != id {
			t.Errorf("lastElement(%q) = %q", s, got)
		}
	}
}

func TestKeyPrefixTakesEveryFormPeoplePaste(t *testing.T) {
	const id = "kBHJkH09B5ceBOnJ"
	for _, s := range []string{id, "tskey-api-" + id, "tskey-api-" + id + "-***", "tskey-api-" + id + "-UbxumYtxfCHajJUean0x"} {
		if got := keyPrefix(s); got != id {
			t.Errorf("keyPrefix(%q) = %q", s, got)
		}
	}
}

func TestNamesCannotSteerTheTerminal(t *testing.T) {
	if got := printable("a\x1b[2Jb\tc\u202ed\u0085é"); got != "a\ufffd[2Jb\ufffdc\ufffdd\ufffdé" {
		t.Errorf("printable = %q", got)
	}
}

func TestOutputKeepsTheServersOrderAndTypes(t *testing.T) {
	raw := []byte(`[{"id":"7","zeta":null,"alpha":["a: b","<&>"],"time":"2026-01-02T03:04:05Z","none":[],"user":"no","name":"bob","n1":1}]`)
	for format, want := range map[string]string{
		"json-line": string(raw) + "\n",
		"json":      "[\n\t{\n\t\t\"id\": \"7\",\n\t\t\"zeta\": null,\n\t\t\"alpha\": [\n\t\t\t\"a: b\",\n\t\t\t\"<&>\"\n\t\t],\n\t\t\"time\": \"2026-01-02T03:04:05Z\",\n\t\t\"none\": [],\n\t\t\"user\": \"no\",\n\t\t\"name\": \"bob\",\n\t\t\"n1\": 1\n\t}\n]\n",
		"yaml":      "- id: \"7\"\n  zeta: null\n  alpha:\n    - \"a: b\"\n    - \"<&>\"\n  time: \"2026-01-02T03:04:05Z\"\n  none: []\n  user: \"no\"\n  name: bob\n  n1: 1\n",
	} {
		var out bytes.Buffer
		m := &program{Env: Env{Stdout: &out}, output: format}
		if err := m.encode(&out, rawJSON(raw)); err != nil {
			t.Fatal(err)
		}
		if out.String() != want {
			t.Errorf("%s:\ngot  %q\nwant %q", format, out.String(), want)
		}
	}
}

type rawJSON []byte

func (r rawJSON) MarshalJSON() ([]byte, error) { return r, nil }

// A server that accepts and then says nothing.
func TestSilentServerEndsWithTheTimeout(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var stdout, stderr bytes.Buffer
	env := Env{Stdin: strings.NewReader(""), Stdout: &stdout, Stderr: &stderr, Now: time.Now}
	code := Run(env, []string{"health", "--server", path, "--timeout", "50ms"})
	if code != exitNoReply || !strings.Contains(stderr.String(), path+": no answer within 50ms (--timeout)") {
		t.Errorf("code %d, want %d; stderr %q", code, exitNoReply, stderr.String())
	}
}

func TestCaretStandsUnderThePlace(t *testing.T) {
	text := []byte("{\n\t\"é\": bad,\r\n}\n")
	if got, want := withCaret("p", text, 2, 7, "no"), "p:2:7: no\n  \t\"é\": bad,\n  \t     ^"; got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	for _, at := range [][2]int{{0, 1}, {9, 1}, {2, 0}, {2, 99}} {
		if got := withCaret("p", text, at[0], at[1], "no"); strings.Contains(got, "\n") {
			t.Errorf("a place outside of the text got a mark: %q", got)
		}
	}
}
