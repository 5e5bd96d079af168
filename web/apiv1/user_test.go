package apiv1

import (
	"strings"
	"testing"
)

func TestUserLifeCycle(t *testing.T) {
	w := newWorld(t)
	rec := w.send("POST", "/api/v1/user", `{"name":"bob","displayName":"Bob B.","email":"bob@example.com","pictureUrl":"https://example.com/b.png"}`)
	const want = `{"user":{"id":"2","name":"bob","createdAt":"2030-01-02T03:04:05Z","displayName":"Bob B.","email":"bob@example.com","providerId":"","provider":"","profilePicUrl":"https://example.com/b.png"}}`
	if got := strings.TrimSpace(rec.Body.String()); rec.Code != 200 || got != want {
		t.Errorf("create = %d\n got %s\nwant %s", rec.Code, got, want)
	}
	w.refused(409, `"bob" exists`, "POST", "/api/v1/user", `{"name":"bob"}`)

	if u := get[UsersResponse](w, "GET", "/api/v1/user?name=bob", nil).Users; len(u) != 1 || u[0].ID != 2 {
		t.Errorf("list by name = %+v", u)
	}
	if u := get[UsersResponse](w, "GET", "/api/v1/user?email=ALICE@example.com", nil).Users; len(u) != 1 || u[0].Name != "alice" {
		t.Errorf("list by e-mail = %+v", u)
	}
	if u := get[UsersResponse](w, "GET", "/api/v1/user?id=2", nil).Users; len(u) != 1 {
		t.Errorf("list by id = %+v", u)
	}
	if body := w.send("GET", "/api/v1/user?name=nobody", nil).Body.String(); strings.TrimSpace(body) != `{"users":[]}` {
		t.Errorf("empty list = %s", body)
	}

	if u := get[UserResponse](w, "POST", "/api/v1/user/2/rename/rob@example.com", nil).User; u.Name != "rob@example.com" {
		t.Errorf("rename = %+v", u)
	}
	if u := get[UserResponse](w, "POST", "/api/v1/user/2/rename/j%C3%BCrgen", nil).User; u.Name != "jürgen" {
		t.Errorf("rename with an escape = %+v", u)
	}
	w.refused(409, "exists", "POST", "/api/v1/user/2/rename/alice", nil)
	w.refused(400, "path.name", "POST", "/api/v1/user/2/rename/5tar", nil)
	w.refused(404, "77", "POST", "/api/v1/user/77/rename/carol", nil)
	if a := w.lastAudit(); a.Action != "user.rename" || a.Target != "user:2" || a.Actor.Kind != "apikey" || !strings.Contains(string(a.Before), "rob@") || !strings.Contains(string(a.After), "jürgen") {
		t.Errorf("audit = %+v %s %s", a, a.Before, a.After)
	}

	if body := w.send("DELETE", "/api/v1/user/2", nil).Body.String(); strings.TrimSpace(body) != "{}" {
		t.Errorf("delete = %s", body)
	}
	w.refused(404, "no user", "DELETE", "/api/v1/user/2", nil)
}

func TestUserWithNodesStays(t *testing.T) {
	w := newWorld(t)
	w.addNode("laptop", w.alice, nil)
	w.refused(409, "still has nodes", "DELETE", "/api/v1/user/1", nil)
	if u := get[UsersResponse](w, "GET", "/api/v1/user", nil).Users; len(u) != 1 {
		t.Errorf("users = %+v", u)
	}
}
