-- Deleted accounts. An account that is being erased has a random username and a random identity key, and no inbox.

-- Erasures in progress. `after` is the last inbox in which the account's own messages to others were looked up.
CREATE TABLE erasure (
    id         BLOB    PRIMARY KEY CHECK (length(id) = 16),
    account    INTEGER NOT NULL UNIQUE REFERENCES account (id),
    identity   BLOB    NOT NULL CHECK (length(identity) = 32), -- the key that the account had
    deleted_at INTEGER NOT NULL,
    begun_at   INTEGER,                                        -- of the present pass; NULL: the next one has not begun
    after      INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;

-- Keys of deleted accounts, permanently, and their usernames until an instant, as hashes.
CREATE TABLE tombstone (
    hash  BLOB    PRIMARY KEY CHECK (length(hash) = 32),
    until INTEGER                                              -- NULL: permanently
) STRICT, WITHOUT ROWID;
CREATE INDEX tombstone_until ON tombstone (until) WHERE until IS NOT NULL;

-- For the erasure, which finds the rows of an account.
CREATE INDEX device_key_account ON device_key (account);
CREATE INDEX group_commit_account ON group_commit (account);
CREATE INDEX mls_group_first ON mls_group (substr(pair, 1, 32)) WHERE pair IS NOT NULL;
CREATE INDEX mls_group_second ON mls_group (substr(pair, 33, 32)) WHERE pair IS NOT NULL;
