-- Groups: the members, the metadata and the epoch of a channel.
CREATE TABLE mls_group (
    id          BLOB    PRIMARY KEY CHECK (length(id) = 16),
    pair        BLOB    UNIQUE CHECK (length(pair) = 64), -- of a direct group: the keys of both members, the lesser one first
    name        TEXT    NOT NULL,
    description TEXT    NOT NULL,
    settings    BLOB    NOT NULL,
    version     INTEGER NOT NULL, -- of the metadata
    epoch       INTEGER NOT NULL,
    created_at  INTEGER NOT NULL,
    group_info  BLOB              -- of the last commit that had one; last, so that nothing before it waits for its overflow pages
) STRICT;

CREATE TABLE group_member (
    id        INTEGER PRIMARY KEY AUTOINCREMENT, -- in the order in which members joined, never reused
    group_id  BLOB    NOT NULL REFERENCES mls_group (id),
    account   INTEGER NOT NULL REFERENCES account (id),
    role      INTEGER NOT NULL,                  -- 0 member, 1 admin
    joined_at INTEGER NOT NULL,
    UNIQUE (group_id, account)
) STRICT;
CREATE INDEX group_member_joined ON group_member (group_id, id);
CREATE INDEX group_member_admin ON group_member (group_id) WHERE role = 1;
CREATE INDEX group_member_account ON group_member (account);

-- Commits that were accepted, with what their senders were answered: a repeat gets the same answer.
CREATE TABLE group_commit (
    group_id     BLOB    NOT NULL REFERENCES mls_group (id),
    account      INTEGER NOT NULL, -- of the sender
    message_id   BLOB    NOT NULL CHECK (length(message_id) = 16),
    epoch        INTEGER NOT NULL, -- the one that the commit led to
    committed_at INTEGER NOT NULL,
    outcome      BLOB    NOT NULL, -- src/groups/outcome.rs
    PRIMARY KEY (group_id, account, message_id)
) STRICT;
CREATE INDEX group_commit_age ON group_commit (committed_at);
