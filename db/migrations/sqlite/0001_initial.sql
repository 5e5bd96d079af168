-- min_reader: 1
--
-- Times are microseconds since 1970 UTC, 0 for none. Keys are tailscale's text
-- form ("nodekey:...", "mkey:..."), addresses and prefixes are text, lists are
-- JSON arrays.

CREATE TABLE tailnets (
  id              INTEGER PRIMARY KEY AUTOINCREMENT,
  name            TEXT    NOT NULL UNIQUE,
  created         INTEGER NOT NULL,
  revision        INTEGER NOT NULL DEFAULT 0,
  pruned_revision INTEGER NOT NULL DEFAULT 0,
  audit_number    INTEGER NOT NULL DEFAULT 0,
  audit_head      BLOB    NOT NULL DEFAULT x''
) STRICT;

CREATE TABLE changes (
  tailnet_id INTEGER NOT NULL,
  revision   INTEGER NOT NULL,
  seq        INTEGER NOT NULL,
  kind       INTEGER NOT NULL,
  entity     INTEGER NOT NULL,
  at         INTEGER NOT NULL,
  PRIMARY KEY (tailnet_id, revision, seq)
) STRICT, WITHOUT ROWID;

CREATE TABLE users (
  id              INTEGER PRIMARY KEY AUTOINCREMENT CHECK (id > 0 AND id < 2147400000),
  tailnet_id      INTEGER NOT NULL REFERENCES tailnets(id),
  name            TEXT    NOT NULL,
  name_key        TEXT    NOT NULL,
  display_name    TEXT    NOT NULL,
  email           TEXT    NOT NULL,
  role            TEXT    NOT NULL,
  provider        TEXT    NOT NULL,
  provider_id     TEXT,
  profile_pic_url TEXT    NOT NULL,
  created         INTEGER NOT NULL,
  UNIQUE (tailnet_id, id),
  UNIQUE (tailnet_id, name_key),
  UNIQUE (tailnet_id, provider, provider_id)
) STRICT;
CREATE INDEX users_email ON users (tailnet_id, email);

CREATE TABLE nodes (
  id              INTEGER PRIMARY KEY AUTOINCREMENT,
  stable_id       TEXT    NOT NULL UNIQUE,
  tailnet_id      INTEGER NOT NULL REFERENCES tailnets(id),
  machine_key     TEXT    NOT NULL,
  node_key        TEXT    NOT NULL UNIQUE,
  nl_key          TEXT    NOT NULL,
  user_id         INTEGER,
  tags            TEXT    NOT NULL,
  hostname        TEXT    NOT NULL,
  given_name      TEXT    NOT NULL,
  ipv4            TEXT,
  ipv6            TEXT,
  approved_routes TEXT    NOT NULL,
  expiry          INTEGER NOT NULL,
  expired         INTEGER NOT NULL,
  logged_out      INTEGER NOT NULL,
  ephemeral       INTEGER NOT NULL,
  auth_key_id     INTEGER NOT NULL,
  register_method TEXT    NOT NULL,
  created         INTEGER NOT NULL,
  UNIQUE (tailnet_id, given_name),
  UNIQUE (tailnet_id, ipv4),
  UNIQUE (tailnet_id, ipv6),
  FOREIGN KEY (tailnet_id, user_id) REFERENCES users (tailnet_id, id)
) STRICT;
CREATE INDEX nodes_tailnet ON nodes (tailnet_id, id);
CREATE INDEX nodes_machine_key ON nodes (tailnet_id, machine_key);
CREATE INDEX nodes_user ON nodes (user_id);

CREATE TABLE node_states (
  node_id    INTEGER PRIMARY KEY REFERENCES nodes(id) ON DELETE CASCADE,
  tailnet_id INTEGER NOT NULL REFERENCES tailnets(id),
  disco_key  TEXT    NOT NULL,
  endpoints  TEXT    NOT NULL,
  home_derp  INTEGER NOT NULL,
  hostinfo   TEXT    NOT NULL,
  cap        INTEGER NOT NULL,
  online     INTEGER NOT NULL,
  instance   INTEGER NOT NULL,
  last_seen  INTEGER NOT NULL
) STRICT;

CREATE TABLE released_names (
  tailnet_id INTEGER NOT NULL REFERENCES tailnets(id),
  name       TEXT    NOT NULL,
  owner      TEXT    NOT NULL,
  released   INTEGER NOT NULL,
  PRIMARY KEY (tailnet_id, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE released_addresses (
  tailnet_id INTEGER NOT NULL REFERENCES tailnets(id),
  address    TEXT    NOT NULL,
  released   INTEGER NOT NULL,
  PRIMARY KEY (tailnet_id, address)
) STRICT, WITHOUT ROWID;

CREATE TABLE tombstones (
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  tailnet_id  INTEGER NOT NULL REFERENCES tailnets(id),
  machine_key TEXT    NOT NULL,
  node_key    TEXT    NOT NULL,
  node_id     INTEGER NOT NULL,
  stable_id   TEXT    NOT NULL,
  name        TEXT    NOT NULL,
  deleted     INTEGER NOT NULL
) STRICT;
CREATE INDEX tombstones_keys ON tombstones (tailnet_id, machine_key, node_key);
CREATE INDEX tombstones_deleted ON tombstones (tailnet_id, deleted);

CREATE TABLE auth_keys (
  id            INTEGER PRIMARY KEY AUTOINCREMENT,
  key_id        TEXT    NOT NULL UNIQUE,
  hash          BLOB    NOT NULL,
  tailnet_id    INTEGER NOT NULL REFERENCES tailnets(id),
  user_id       INTEGER,
  description   TEXT    NOT NULL,
  reusable      INTEGER NOT NULL,
  ephemeral     INTEGER NOT NULL,
  preauthorized INTEGER NOT NULL,
  tags          TEXT    NOT NULL,
  uses          INTEGER NOT NULL,
  expires       INTEGER NOT NULL,
  created       INTEGER NOT NULL,
  revoked       INTEGER NOT NULL,
  FOREIGN KEY (tailnet_id, user_id) REFERENCES users (tailnet_id, id)
) STRICT;
CREATE INDEX auth_keys_tailnet ON auth_keys (tailnet_id, id);
CREATE INDEX auth_keys_user ON auth_keys (user_id);

CREATE TABLE auth_key_uses (
  auth_key_id INTEGER NOT NULL REFERENCES auth_keys(id) ON DELETE CASCADE,
  machine_key TEXT    NOT NULL,
  used        INTEGER NOT NULL,
  closed      INTEGER NOT NULL,
  PRIMARY KEY (auth_key_id, machine_key)
) STRICT, WITHOUT ROWID;

CREATE TABLE api_keys (
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  key_id      TEXT    NOT NULL UNIQUE,
  hash        BLOB    NOT NULL,
  tailnet_id  INTEGER NOT NULL REFERENCES tailnets(id),
  user_id     INTEGER,
  description TEXT    NOT NULL,
  expires     INTEGER NOT NULL,
  created     INTEGER NOT NULL,
  revoked     INTEGER NOT NULL,
  last_seen   INTEGER NOT NULL,
  FOREIGN KEY (tailnet_id, user_id) REFERENCES users (tailnet_id, id)
) STRICT;
CREATE INDEX api_keys_tailnet ON api_keys (tailnet_id, id);
CREATE INDEX api_keys_user ON api_keys (user_id);

CREATE TABLE policies (
  id         INTEGER PRIMARY KEY AUTOINCREMENT,
  tailnet_id INTEGER NOT NULL REFERENCES tailnets(id),
  revision   INTEGER NOT NULL,
  text       BLOB    NOT NULL,
  author     TEXT    NOT NULL,
  note       TEXT    NOT NULL,
  created    INTEGER NOT NULL
) STRICT;
CREATE INDEX policies_tailnet ON policies (tailnet_id, id);

CREATE TABLE auth_requests (
  id           INTEGER PRIMARY KEY AUTOINCREMENT,
  hash         BLOB    NOT NULL UNIQUE,
  kind         TEXT    NOT NULL,
  tailnet_id   INTEGER NOT NULL REFERENCES tailnets(id),
  machine_key  TEXT    NOT NULL,
  node_key     TEXT    NOT NULL,
  old_node_key TEXT    NOT NULL,
  nl_key       TEXT    NOT NULL,
  hostinfo     TEXT    NOT NULL,
  expiry       INTEGER NOT NULL,
  ephemeral    INTEGER NOT NULL,
  cap          INTEGER NOT NULL,
  source       TEXT    NOT NULL,
  created      INTEGER NOT NULL,
  expires      INTEGER NOT NULL,
  opened       INTEGER NOT NULL,
  followed     INTEGER NOT NULL,
  state        TEXT    NOT NULL,
  node_id      INTEGER NOT NULL,
  user_id      INTEGER NOT NULL,
  message      TEXT    NOT NULL,
  detail       BLOB
) STRICT;
CREATE INDEX auth_requests_machine_key ON auth_requests (tailnet_id, machine_key);
CREATE INDEX auth_requests_source ON auth_requests (tailnet_id, source, opened, followed, id);
CREATE INDEX auth_requests_expires ON auth_requests (tailnet_id, expires);

-- How many auth requests each source has, and ('') how many there are in all.
CREATE TABLE auth_request_counts (
  tailnet_id INTEGER NOT NULL REFERENCES tailnets(id),
  source     TEXT    NOT NULL,
  n          INTEGER NOT NULL,
  PRIMARY KEY (tailnet_id, source)
) STRICT, WITHOUT ROWID;
CREATE INDEX auth_request_counts_n ON auth_request_counts (tailnet_id, n);

CREATE TABLE audit_events (
  tailnet_id INTEGER NOT NULL REFERENCES tailnets(id),
  number     INTEGER NOT NULL,
  time       INTEGER NOT NULL,
  actor_kind TEXT    NOT NULL,
  actor_id   INTEGER NOT NULL,
  actor_name TEXT    NOT NULL,
  key_id     TEXT    NOT NULL,
  source     TEXT    NOT NULL,
  action     TEXT    NOT NULL,
  target     TEXT    NOT NULL,
  before     TEXT,
  after      TEXT,
  prev_hash  BLOB    NOT NULL,
  PRIMARY KEY (tailnet_id, number)
) STRICT;

CREATE TABLE settings (
  id         INTEGER PRIMARY KEY AUTOINCREMENT,
  tailnet_id INTEGER NOT NULL REFERENCES tailnets(id),
  name       TEXT    NOT NULL,
  value      TEXT    NOT NULL,
  hash       TEXT    NOT NULL,
  UNIQUE (tailnet_id, name)
) STRICT;

CREATE TABLE primaries (
  tailnet_id INTEGER NOT NULL REFERENCES tailnets(id),
  prefix     TEXT    NOT NULL,
  node_id    INTEGER NOT NULL REFERENCES nodes(id) ON DELETE CASCADE,
  PRIMARY KEY (tailnet_id, prefix)
) STRICT, WITHOUT ROWID;
CREATE INDEX primaries_node ON primaries (node_id);

CREATE TABLE instances (
  id        INTEGER PRIMARY KEY AUTOINCREMENT,
  name      TEXT    NOT NULL UNIQUE,
  version   TEXT    NOT NULL,
  started   INTEGER NOT NULL,
  heartbeat INTEGER NOT NULL
) STRICT;

CREATE TABLE secrets (
  name    TEXT    PRIMARY KEY,
  value   BLOB    NOT NULL,
  sealed  INTEGER NOT NULL,
  created INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- One row that health checks write, to see that the disk takes it.
CREATE TABLE health (
  id     INTEGER PRIMARY KEY CHECK (id = 1),
  probed INTEGER NOT NULL
) STRICT;
INSERT INTO health (id, probed) VALUES (1, 0);
