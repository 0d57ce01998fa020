-- Recovery bundles, at most one for each account, sealed under a key that is not in the database. After a removal the row
-- stays, with the version and the count of fetches.
CREATE TABLE recovery_bundle (
    account      INTEGER PRIMARY KEY REFERENCES account (id),
    version      INTEGER NOT NULL,           -- the number of times that a bundle was stored or removed
    bundle       BLOB,                       -- NULL: removed
    key_id       BLOB CHECK (length(key_id) = 8),
    stored_at    INTEGER NOT NULL,
    counted_from INTEGER NOT NULL DEFAULT 0, -- the first of the fetches that are counted
    fetches      INTEGER NOT NULL DEFAULT 0,
    CHECK ((bundle IS NULL) = (key_id IS NULL))
) STRICT;
-- For the check at the start that the server has the key of every bundle.
CREATE INDEX recovery_bundle_key ON recovery_bundle (key_id) WHERE key_id IS NOT NULL;
