package apiv1

import (
	"encoding/json"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// ID is a numeric id. On the wire it is a decimal string; a JSON number is
// accepted as well, as Headscale's protobuf gateway did.
type ID int64

// MarshalJSON writes the decimal string.
func (id ID) MarshalJSON() ([]byte, error) {
	return strconv.AppendQuote(nil, strconv.FormatInt(int64(id), 10)), nil
}

// UnmarshalJSON accepts a decimal string or an integer. The empty string is 0,
// the id of nothing.
func (id *ID) UnmarshalJSON(b []byte) error {
	s := string(b)
	if s == "null" {
		return nil
	}
	if strings.HasPrefix(s, `"`) {
		if err := json.Unmarshal(b, &s); err != nil {
			return err
		}
		if s == "" {
			*id = 0
			return nil
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return &json.UnmarshalTypeError{Value: "value that is no id", Type: reflect.TypeFor[ID]()}
	}
	*id = ID(n)
	return nil
}

func (id ID) String() string { return strconv.FormatInt(int64(id), 10) }

// Timestamp is a moment in a request, RFC 3339.
type Timestamp struct{ time.Time }

// UnmarshalJSON reports a value that is not RFC 3339 together with its field,
// which time.Time does not.
func (t *Timestamp) UnmarshalJSON(b []byte) error {
	if err := t.Time.UnmarshalJSON(b); err != nil {
		return &json.UnmarshalTypeError{Value: "value that is no RFC 3339 time", Type: reflect.TypeFor[time.Time]()}
	}
	return nil
}

// User is a person or a service account.
type User struct {
	ID            ID         `json:"id"`
	Name          string     `json:"name"`
	CreatedAt     *time.Time `json:"createdAt"`
	DisplayName   string     `json:"displayName"`
	Email         string     `json:"email"`
	ProviderID    string     `json:"providerId"`
	Provider      string     `json:"provider"`
	ProfilePicURL string     `json:"profilePicUrl"`
}

// TaggedUserID and TaggedUserName stand in for the owner of a tagged node,
// which has none: old tools dereference a node's user without looking.
const (
	TaggedUserID   ID = 2147455555
	TaggedUserName    = "tagged-devices"
)

// How a node came in, as registerMethod names it.
const (
	RegisterUnspecified = "REGISTER_METHOD_UNSPECIFIED"
	RegisterAuthKey     = "REGISTER_METHOD_AUTH_KEY"
	RegisterCLI         = "REGISTER_METHOD_CLI"
	RegisterOIDC        = "REGISTER_METHOD_OIDC"
)

// Node is one device. Name is the host name as the client says it, GivenName
// the unique DNS label that others reach it by.
type Node struct {
	ID              ID          `json:"id"`
	MachineKey      string      `json:"machineKey"`
	NodeKey         string      `json:"nodeKey"`
	DiscoKey        string      `json:"discoKey"`
	IPAddresses     []string    `json:"ipAddresses"`
	Name            string      `json:"name"`
	User            *User       `json:"user"`
	LastSeen        *time.Time  `json:"lastSeen"`
	Expiry          *time.Time  `json:"expiry"`
	PreAuthKey      *PreAuthKey `json:"preAuthKey"`
	CreatedAt       *time.Time  `json:"createdAt"`
	RegisterMethod  string      `json:"registerMethod"`
	GivenName       string      `json:"givenName"`
	Online          bool        `json:"online"`
	ApprovedRoutes  []string    `json:"approvedRoutes"`
	AvailableRoutes []string    `json:"availableRoutes"`
	SubnetRoutes    []string    `json:"subnetRoutes"` // approved and advertised
	Tags            []string    `json:"tags"`
}

// PreAuthKey lets machines join without a person. Key is whole in the answer
// to its creation and masked (tskey-auth-<id>-***) ever after.
type PreAuthKey struct {
	User       *User      `json:"user"` // null: a key that belongs to its tags only
	ID         ID         `json:"id"`
	Key        string     `json:"key"`
	Reusable   bool       `json:"reusable"`
	Ephemeral  bool       `json:"ephemeral"`
	Used       bool       `json:"used"`
	Expiration *time.Time `json:"expiration"`
	CreatedAt  *time.Time `json:"createdAt"`
	ACLTags    []string   `json:"aclTags"`
}

// APIKey describes a key of this API, never its secret. Prefix is the start of
// the key itself, tskey-api-<id>.
type APIKey struct {
	ID         ID         `json:"id"`
	Prefix     string     `json:"prefix"`
	Expiration *time.Time `json:"expiration"`
	CreatedAt  *time.Time `json:"createdAt"`
	LastSeen   *time.Time `json:"lastSeen"`
}

// CreateUserRequest is the body of POST /user.
type CreateUserRequest struct {
	Name        string `json:"name"`
	DisplayName string `json:"displayName"`
	Email       string `json:"email"`
	PictureURL  string `json:"pictureUrl"`
}

// CreatePreAuthKeyRequest is the body of POST /preauthkey. User 0 with tags
// makes a key that belongs to its tags only. Expiration nil is one hour from
// now.
type CreatePreAuthKeyRequest struct {
	User       ID         `json:"user"`
	Reusable   bool       `json:"reusable"`
	Ephemeral  bool       `json:"ephemeral"`
	Expiration *Timestamp `json:"expiration,omitempty"`
	ACLTags    []string   `json:"aclTags"`
}

// ExpirePreAuthKeyRequest is the body of POST /preauthkey/expire. Key, whole or
// masked, is what tools written for versions before 0.27 send instead of ID.
type ExpirePreAuthKeyRequest struct {
	ID  ID     `json:"id"`
	Key string `json:"key,omitempty"`
}

// CreateAPIKeyRequest is the body of POST /apikey. Expiration nil is 90 days
// from now.
type CreateAPIKeyRequest struct {
	Expiration *Timestamp `json:"expiration,omitempty"`
}

// ExpireAPIKeyRequest is the body of POST /apikey/expire. One of the two names
// the key; Prefix may be the key's id, tskey-api-<id> or the masked form.
type ExpireAPIKeyRequest struct {
	Prefix string `json:"prefix,omitempty"`
	ID     ID     `json:"id,omitempty"`
}

// ExpireNodeRequest is the body of POST /node/{id}/expire. Without a field the
// node expires now.
type ExpireNodeRequest struct {
	Expiry        *Timestamp `json:"expiry,omitempty"`
	DisableExpiry bool       `json:"disableExpiry,omitempty"`
}

// SetTagsRequest is the body of POST /node/{id}/tags.
type SetTagsRequest struct {
	Tags []string `json:"tags"`
}

// ApproveRoutesRequest is the body of POST /node/{id}/approve_routes: the whole
// set. One exit route stands for both address families.
type ApproveRoutesRequest struct {
	Routes []string `json:"routes"`
}

// DebugNodeRequest is the body of POST /debug/node: a pretended device that
// waits for the registration id Key. User is a name or an id.
type DebugNodeRequest struct {
	User   string   `json:"user"`
	Key    string   `json:"key"`
	Name   string   `json:"name"`
	Routes []string `json:"routes"`
}

// SetIPRequest is the body of POST /api/signalbox/v1/node/{id}/ip.
type SetIPRequest struct {
	IPAddress string `json:"ipAddress"`
}

// PolicyRequest is the body of POST /policy/check: HuJSON text.
type PolicyRequest struct {
	Policy string `json:"policy"`
}

// SetPolicyRequest is the body of PUT /policy. The note, which Headscale does
// not have, is kept with the version.
type SetPolicyRequest struct {
	PolicyRequest
	Note string `json:"note"`
}

// AuthRegisterRequest is the body of POST /auth/register. User is a name or an
// id; AuthID the last path element of the address that the device printed.
type AuthRegisterRequest struct {
	User   string `json:"user"`
	AuthID string `json:"authId"`
}

// AuthRequest is the body of POST /auth/approve and /auth/reject.
type AuthRequest struct {
	AuthID string `json:"authId"`
}

// The envelopes of answers.
type (
	HealthResponse struct {
		DatabaseConnectivity bool `json:"databaseConnectivity"`
	}
	UserResponse struct {
		User *User `json:"user"`
	}
	UsersResponse struct {
		Users []*User `json:"users"`
	}
	NodeResponse struct {
		Node *Node `json:"node"`
	}
	NodesResponse struct {
		Nodes []*Node `json:"nodes"`
	}
	PreAuthKeyResponse struct {
		PreAuthKey *PreAuthKey `json:"preAuthKey"`
	}
	PreAuthKeysResponse struct {
		PreAuthKeys []*PreAuthKey `json:"preAuthKeys"`
	}
	CreateAPIKeyResponse struct {
		APIKey string `json:"apiKey"` // the whole key, this once
	}
	APIKeysResponse struct {
		APIKeys []*APIKey `json:"apiKeys"`
	}
	BackfillIPsResponse struct {
		Changes []string `json:"changes"`
	}
	PolicyResponse struct {
		Policy    string     `json:"policy"`
		UpdatedAt *time.Time `json:"updatedAt"`
	}
	EmptyResponse struct{}
)

// Problem is the body of every answer from 400 on: RFC 7807 with the names that
// Headscale 0.30 uses, and beside them the gateway's names of 0.29 that the
// older tools read.
type Problem struct {
	Title  string         `json:"title"`
	Status int            `json:"status"`
	Detail string         `json:"detail"`
	Errors []ProblemField `json:"errors,omitempty"`

	Code    int    `json:"code"` // gRPC status code
	Message string `json:"message"`
	Details []any  `json:"details"`
}

// ProblemField names what is wrong with one part of the request.
type ProblemField struct {
	Message  string `json:"message"`
	Location string `json:"location"` // "body.user", "path.id", "query.confirmed"
}

// Error makes a Problem usable as the error of a client.
func (p *Problem) Error() string {
	if p.Detail != "" {
		return p.Detail
	}
	return p.Title
}
