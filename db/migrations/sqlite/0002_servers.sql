-- min_reader: 1
-- What a server says of itself with each sign of life. 0 is also what a server of the version before leaves.
ALTER TABLE instances ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
ALTER TABLE instances ADD COLUMN streams  INTEGER NOT NULL DEFAULT 0;
