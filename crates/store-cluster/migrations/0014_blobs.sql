-- Blobs. The bytes are in blob_chunk or in one object of the bucket (`place`), named by `object`, which is never used twice. An
-- object of the bucket has a row in blob_trash before it is written, and until a blob refers to it. Chunks have a row in upload
-- or blob. Locks are taken in the order upload, blob, blob_quota.
CREATE TABLE blob (
    hash   bytea    PRIMARY KEY CHECK (octet_length(hash) = 32),
    object text     NOT NULL UNIQUE,
    place  smallint NOT NULL CHECK (place IN (0, 1)), -- 0 blob_chunk, 1 the bucket
    size   bigint   NOT NULL CHECK (size > 0)
);

-- The references of accounts. A blob goes with its last reference. Both are changed only under the lock of the blob's row.
CREATE TABLE blob_ref (
    account    bigint NOT NULL REFERENCES account (id),
    hash       bytea  NOT NULL REFERENCES blob (hash),
    mime       text   NOT NULL,
    expires_at bigint NOT NULL,
    PRIMARY KEY (account, hash)
);
CREATE INDEX blob_ref_hash ON blob_ref (hash, expires_at);
CREATE INDEX blob_ref_expiry ON blob_ref (expires_at);

CREATE TABLE upload (
    account         bigint NOT NULL REFERENCES account (id),
    hash            bytea  NOT NULL CHECK (octet_length(hash) = 32),
    object          text   NOT NULL UNIQUE,           -- of its chunks
    size            bigint NOT NULL CHECK (size > 0),
    received        bigint NOT NULL CHECK (received BETWEEN 0 AND size),
    mime            text   NOT NULL,
    expires_at      bigint NOT NULL,
    finishing_until bigint NOT NULL DEFAULT 0,        -- until then, an edge completes it
    PRIMARY KEY (account, hash)
) WITH (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_cost_delay = 0
);
CREATE INDEX upload_expiry ON upload (expires_at);

-- The chunks of uploads, and of blobs that stay in Postgres. Those of one object follow one another without a gap.
CREATE TABLE blob_chunk (
    object text   NOT NULL,
    start  bigint NOT NULL,
    bytes  bytea  NOT NULL,
    PRIMARY KEY (object, start)
) WITH (
    autovacuum_vacuum_scale_factor = 0.02,            -- nearly all of it turns over
    autovacuum_vacuum_cost_delay = 0,
    toast.autovacuum_vacuum_scale_factor = 0.02,
    toast.autovacuum_vacuum_cost_delay = 0
);
-- Ciphertext does not compress, and parts of a chunk can be read alone.
ALTER TABLE blob_chunk ALTER COLUMN bytes SET STORAGE EXTERNAL;

-- The total size of an account's references and uploads. No row: zero.
CREATE TABLE blob_quota (
    account bigint PRIMARY KEY REFERENCES account (id),
    used    bigint NOT NULL CHECK (used >= 0)
) WITH (fillfactor = 50);

-- Objects that may exist and that no blob refers to.
CREATE TABLE blob_trash (
    object     text     PRIMARY KEY,
    place      smallint NOT NULL CHECK (place IN (0, 1)),
    not_before bigint   NOT NULL,                     -- a call may be using or writing the object until then
    removing   boolean  NOT NULL DEFAULT false        -- no blob may refer to the object any more
);
CREATE INDEX blob_trash_due ON blob_trash (not_before);
