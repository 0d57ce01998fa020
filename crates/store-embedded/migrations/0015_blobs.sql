-- Blobs. The bytes are in files of the directory blobs/, each named by `object`, which is never used twice. Each file has exactly
-- one row: that of an upload while it is written, then that of its blob, and blob_trash once no row needs it. The row is
-- committed before the file is created, and removed after the file, so no crash leaves a file without a row.
CREATE TABLE blob (
    hash   BLOB    PRIMARY KEY CHECK (length(hash) = 32),
    object TEXT    NOT NULL UNIQUE,
    size   INTEGER NOT NULL CHECK (size > 0)
) STRICT;

-- The references of accounts. A blob goes with its last reference.
CREATE TABLE blob_ref (
    account    INTEGER NOT NULL REFERENCES account (id),
    hash       BLOB    NOT NULL REFERENCES blob (hash),
    mime       TEXT    NOT NULL,
    expires_at INTEGER NOT NULL,
    PRIMARY KEY (account, hash)
) STRICT;
CREATE INDEX blob_ref_hash ON blob_ref (hash, expires_at);
CREATE INDEX blob_ref_expiry ON blob_ref (expires_at);

CREATE TABLE upload (
    account    INTEGER NOT NULL REFERENCES account (id),
    hash       BLOB    NOT NULL CHECK (length(hash) = 32),
    object     TEXT    NOT NULL UNIQUE,
    size       INTEGER NOT NULL CHECK (size > 0),
    received   INTEGER NOT NULL CHECK (received BETWEEN 0 AND size), -- bytes that are durable in the file
    mime       TEXT    NOT NULL,
    expires_at INTEGER NOT NULL,
    PRIMARY KEY (account, hash)
) STRICT;
CREATE INDEX upload_expiry ON upload (expires_at);

-- The total size of an account's references and uploads. No row: zero.
CREATE TABLE blob_quota (
    account INTEGER PRIMARY KEY REFERENCES account (id),
    used    INTEGER NOT NULL CHECK (used >= 0)
) STRICT;

-- Files that no row needs, and that may exist.
CREATE TABLE blob_trash (
    object     TEXT    PRIMARY KEY,
    not_before INTEGER NOT NULL -- a read or a backup may be using the file until then
) STRICT;
CREATE INDEX blob_trash_due ON blob_trash (not_before);
