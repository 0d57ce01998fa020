-- Recovery bundles, at most one for each account, sealed under a key that is not in the database. After a removal the row
-- stays, with the version and the count of fetches.
CREATE TABLE recovery_bundle (
    account      bigint PRIMARY KEY REFERENCES account (id),
    version      bigint NOT NULL,           -- the number of times that a bundle was stored or removed
    bundle       bytea,                     -- NULL: removed
    key_id       bytea  CHECK (octet_length(key_id) = 8),
    stored_at    bigint NOT NULL,
    counted_from bigint NOT NULL DEFAULT 0, -- the first of the fetches that are counted
    fetches      bigint NOT NULL DEFAULT 0,
    CHECK ((bundle IS NULL) = (key_id IS NULL))
);
-- Ciphertext does not compress.
ALTER TABLE recovery_bundle ALTER COLUMN bundle SET STORAGE EXTERNAL;
-- For the check at the start that the edge has the key of every bundle.
CREATE INDEX recovery_bundle_key ON recovery_bundle (key_id) WHERE key_id IS NOT NULL;
