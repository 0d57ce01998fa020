-- Bans, reports, blocks, and the audit trail.
CREATE TABLE ban (
    account    INTEGER PRIMARY KEY REFERENCES account (id),
    reason     TEXT    NOT NULL,
    banned_at  INTEGER NOT NULL,
    expires_at INTEGER                               -- NULL: permanent
) STRICT;
CREATE INDEX ban_expiry ON ban (expires_at) WHERE expires_at IS NOT NULL;

-- Removed with its group.
CREATE TABLE group_ban (
    group_id   BLOB    NOT NULL REFERENCES mls_group (id) ON DELETE CASCADE,
    account    INTEGER NOT NULL REFERENCES account (id),
    reason     TEXT    NOT NULL,
    banned_at  INTEGER NOT NULL,
    expires_at INTEGER,                              -- NULL: permanent
    PRIMARY KEY (group_id, account)
) STRICT, WITHOUT ROWID;
CREATE INDEX group_ban_account ON group_ban (account);
CREATE INDEX group_ban_expiry ON group_ban (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE report (
    id               INTEGER PRIMARY KEY AUTOINCREMENT, -- in the order of arrival, never reused
    reporter         INTEGER NOT NULL REFERENCES account (id),
    digest           BLOB    NOT NULL CHECK (length(digest) = 32), -- of the two columns that follow
    conversation_id  BLOB    NOT NULL,
    reported_at      INTEGER NOT NULL,
    encrypted_report BLOB    NOT NULL,
    UNIQUE (reporter, digest)
) STRICT;
CREATE INDEX report_age ON report (reported_at);

CREATE TABLE block (
    account    INTEGER NOT NULL REFERENCES account (id),
    blocked    BLOB    NOT NULL CHECK (length(blocked) = 32), -- an identity key
    blocked_at INTEGER NOT NULL,
    PRIMARY KEY (account, blocked)
) STRICT, WITHOUT ROWID;
CREATE INDEX block_blocked ON block (blocked);

-- The number of blocks: for an inbox without any, an enqueue does not look at the table above.
ALTER TABLE inbox ADD COLUMN blocks INTEGER NOT NULL DEFAULT 0;

CREATE TRIGGER block_in AFTER INSERT ON block BEGIN
    UPDATE inbox SET blocks = blocks + 1 WHERE id = NEW.account;
END;

CREATE TRIGGER block_out AFTER DELETE ON block BEGIN
    UPDATE inbox SET blocks = blocks - 1 WHERE id = OLD.account;
END;

-- Rows are only added. Identity keys, so that an entry does not depend on the account. The erasure of a deleted account
-- replaces its key by the SHA-256.
CREATE TABLE audit (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    at       INTEGER NOT NULL,
    actor    BLOB    CHECK (length(actor) = 32),     -- NULL: the operator, by qpq-admin
    action   TEXT    NOT NULL,
    subject  BLOB    CHECK (length(subject) = 32),
    group_id BLOB    CHECK (length(group_id) = 16),
    reason   TEXT    NOT NULL
) STRICT;
CREATE INDEX audit_actor ON audit (actor) WHERE actor IS NOT NULL;
CREATE INDEX audit_subject ON audit (subject) WHERE subject IS NOT NULL;
