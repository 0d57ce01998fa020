-- Invites: the code of an invite allows the registration of an account.
CREATE TABLE invite (
    code       BLOB    PRIMARY KEY CHECK (length(code) = 32), -- SHA-256 of the code
    uses       INTEGER NOT NULL CHECK (uses > 0),
    uses_left  INTEGER NOT NULL CHECK (uses_left BETWEEN 0 AND uses),
    username   TEXT,                                          -- the only one that can be registered; NULL for any
    note       TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX invite_created ON invite (created_at, code);
CREATE INDEX invite_expiry ON invite (expires_at);
CREATE INDEX invite_username ON invite (username) WHERE username IS NOT NULL;
