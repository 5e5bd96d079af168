-- min_reader: 1
--
-- Only new tables, so that programs of earlier schemas go on beside this one.

-- Words between servers about a node whose stream one of them holds: a call,
-- and its answer. Rows are taken by deleting them.
CREATE TABLE mail (
  id         INTEGER PRIMARY KEY AUTOINCREMENT,
  tailnet_id INTEGER NOT NULL REFERENCES tailnets(id),
  sender     INTEGER NOT NULL,
  recipient  INTEGER NOT NULL,
  call       TEXT    NOT NULL,
  answer     INTEGER NOT NULL,
  node_id    INTEGER NOT NULL,
  error      TEXT    NOT NULL,
  body       BLOB    NOT NULL,
  created    INTEGER NOT NULL
) STRICT;
CREATE INDEX mail_recipient ON mail (tailnet_id, recipient, id);
CREATE INDEX mail_created ON mail (tailnet_id, created);

-- Routers that are online and do not answer the probes of their server.
CREATE TABLE unhealthy_nodes (
  node_id    INTEGER PRIMARY KEY REFERENCES nodes(id) ON DELETE CASCADE,
  tailnet_id INTEGER NOT NULL REFERENCES tailnets(id),
  since      INTEGER NOT NULL
) STRICT;
