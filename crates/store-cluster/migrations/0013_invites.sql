-- Invites: the code of an invite allows the registration of an account.
CREATE TABLE invite (
    code       bytea  PRIMARY KEY CHECK (octet_length(code) = 32), -- SHA-256 of the code
    uses       bigint NOT NULL CHECK (uses > 0),
    uses_left  bigint NOT NULL CHECK (uses_left BETWEEN 0 AND uses),
    username   text   COLLATE "C",                                 -- the only one that can be registered; NULL for any
    note       text   NOT NULL,
    created_at bigint NOT NULL,
    expires_at bigint NOT NULL
);
CREATE INDEX invite_created ON invite (created_at, code);
CREATE INDEX invite_expiry ON invite (expires_at);
CREATE INDEX invite_username ON invite (username) WHERE username IS NOT NULL;
