package apiv1

import (
	"strings"
	"testing"
	"time"

	"github.com/signalbox-net/signalbox/db"
)

func TestPreAuthKeyIsShownOnce(t *testing.T) {
	w := newWorld(t)
	k := get[PreAuthKeyResponse](w, "POST", "/api/v1/preauthkey", `{"user":"1","reusable":true,"aclTags":["tag:b","tag:a","tag:b"]}`).PreAuthKey
	kind, keyID, _, err := db.ParseKey(k.Key)
	if err != nil || kind != db.KeyAuth {
		t.Fatalf("key %q: %v", k.Key, err)
	}
	if k.User == nil || k.User.Name != "alice" || !k.Reusable || k.Ephemeral || k.Used || strings.Join(k.ACLTags, " ") != "tag:a tag:b" {
		t.Errorf("created key = %+v", k)
	}
	if k.Expiration == nil || !k.Expiration.Equal(w.now().Add(time.Hour)) {
		t.Errorf("expiration = %v, want one hour from now", k.Expiration)
	}
	list := get[PreAuthKeysResponse](w, "GET", "/api/v1/preauthkey", nil).PreAuthKeys
	if len(list) != 1 || list[0].Key != "tskey-auth-"+keyID+"-***" {
		t.Errorf("list = %+v", list)
	}
	a := w.lastAudit()
	if a.Action != "authkey.create" || strings.Contains(string(a.After), k.Key) {
		t.Errorf("audit = %s %s", a.Action, a.After)
	}
}

func TestPreAuthKeyOfTagsOnly(t *testing.T) {
	w := newWorld(t)
	rec := w.send("POST", "/api/v1/preauthkey", `{"user":"","ephemeral":true,"aclTags":["tag:ci"],"expiration":"2031-01-01T00:00:00+02:00"}`)
	if rec.Code != 200 || !strings.Contains(rec.Body.String(), `"user":null`) || !strings.Contains(rec.Body.String(), `"expiration":"2030-12-31T22:00:00Z"`) {
		t.Errorf("create = %d %s", rec.Code, rec.Body)
	}
	w.refused(400, "no user has the id 99", "POST", "/api/v1/preauthkey", `{"user":"99"}`)
}

func TestPreAuthKeyExpireAndDelete(t *testing.T) {
	w := newWorld(t)
	k := get[PreAuthKeyResponse](w, "POST", "/api/v1/preauthkey", `{"user":"1"}`).PreAuthKey
	w.clock.Add(int64(time.Minute))
	get[EmptyResponse](w, "POST", "/api/v1/preauthkey/expire", ExpirePreAuthKeyRequest{ID: k.ID})
	list := get[PreAuthKeysResponse](w, "GET", "/api/v1/preauthkey?user=alice", nil).PreAuthKeys
	if len(list) != 1 || !list[0].Expiration.Equal(w.now()) {
		t.Errorf("expired key = %+v at %v", list, w.now())
	}
	w.refused(404, "no such", "POST", "/api/v1/preauthkey/expire", `{"id":"55"}`)
	w.refused(400, "required", "DELETE", "/api/v1/preauthkey", nil)
	get[EmptyResponse](w, "DELETE", "/api/v1/preauthkey?id="+k.ID.String(), nil)
	w.refused(404, "no such", "DELETE", "/api/v1/preauthkey?id="+k.ID.String(), nil)
}

// The masked key, which old tools send back, names the key as well as its id.
func TestPreAuthKeyExpireByMaskedKey(t *testing.T) {
	w := newWorld(t)
	get[PreAuthKeyResponse](w, "POST", "/api/v1/preauthkey", `{"user":"1"}`)
	masked := get[PreAuthKeysResponse](w, "GET", "/api/v1/preauthkey", nil).PreAuthKeys[0].Key
	w.clock.Add(int64(time.Minute))
	get[EmptyResponse](w, "POST", "/api/v1/preauthkey/expire", map[string]string{"user": "1", "key": masked})
	if k := get[PreAuthKeysResponse](w, "GET", "/api/v1/preauthkey", nil).PreAuthKeys[0]; !k.Expiration.Equal(w.now()) {
		t.Errorf("expiration = %v, want %v", k.Expiration, w.now())
	}
}

func TestAPIKeyLifeCycle(t *testing.T) {
	w := newWorld(t)
	secret := get[CreateAPIKeyResponse](w, "POST", "/api/v1/apikey", nil).APIKey
	list := get[APIKeysResponse](w, "GET", "/api/v1/apikey", nil).APIKeys
	k := list[len(list)-1]
	if !strings.HasPrefix(secret, k.Prefix+"-") || !strings.HasPrefix(k.Prefix, "tskey-api-k") {
		t.Errorf("key %q does not begin with its prefix %q", secret, k.Prefix)
	}
	if !k.Expiration.Equal(w.now().Add(90*24*time.Hour)) || k.LastSeen != nil {
		t.Errorf("key = %+v", k)
	}
	try := func() int { return w.send("GET", "/api/v1/health", nil, "Authorization", "Bearer "+secret).Code }
	if got := try(); got != 200 {
		t.Errorf("new key = %d", got)
	}
	for _, form := range []string{k.Prefix, k.Prefix + "-***", strings.TrimPrefix(k.Prefix, "tskey-api-")} {
		get[EmptyResponse](w, "POST", "/api/v1/apikey/expire", ExpireAPIKeyRequest{Prefix: form})
	}
	if got := try(); got != 401 {
		t.Errorf("expired key = %d, want 401", got)
	}
	get[EmptyResponse](w, "DELETE", "/api/v1/apikey/"+k.Prefix, nil)
	w.refused(404, "no such API key", "DELETE", "/api/v1/apikey/"+k.Prefix, nil)

	secret = get[CreateAPIKeyResponse](w, "POST", "/api/v1/apikey", `{"expiration":"2030-01-02T04:00:00Z"}`).APIKey
	if got := try(); got != 200 {
		t.Errorf("new key = %d", got)
	}
	w.clock.Add(int64(time.Hour))
	if got := try(); got != 401 {
		t.Errorf("key past its time = %d, want 401", got)
	}
	list = get[APIKeysResponse](w, "GET", "/api/v1/apikey", nil).APIKeys
	get[EmptyResponse](w, "DELETE", "/api/v1/apikey/-?id="+list[len(list)-1].ID.String(), nil)
	if n := len(get[APIKeysResponse](w, "GET", "/api/v1/apikey", nil).APIKeys); n != 1 {
		t.Errorf("%d keys left, want 1", n)
	}
}
