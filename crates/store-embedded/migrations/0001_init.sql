-- The embedded store, version 1. Instants are milliseconds since the Unix epoch; keys, ids and hashes are raw bytes.

PRAGMA application_id = 1903194417; -- "qpq1": what the file is, so that nobody's other database is taken for ours.

CREATE TABLE account (
    id            INTEGER PRIMARY KEY AUTOINCREMENT, -- never reused
    username      TEXT    NOT NULL UNIQUE,
    identity      BLOB    NOT NULL UNIQUE CHECK (length(identity) = 32),
    opaque_record BLOB    NOT NULL,
    created_at    INTEGER NOT NULL
) STRICT;

CREATE TABLE session (
    token            BLOB    PRIMARY KEY CHECK (length(token) = 32), -- SHA-256 of the token
    account          INTEGER NOT NULL REFERENCES account (id),
    device           BLOB    CHECK (length(device) = 16),
    authenticated_at INTEGER NOT NULL,
    last_used_at     INTEGER NOT NULL,
    expires_at       INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX session_account ON session (account);
CREATE INDEX session_expiry ON session (expires_at);

-- The head of each inbox: kept by the triggers below, so that neither a cap nor a seq ever needs a count.
CREATE TABLE inbox (
    id          INTEGER PRIMARY KEY REFERENCES account (id),
    last_seq    INTEGER NOT NULL DEFAULT 0,
    messages    INTEGER NOT NULL DEFAULT 0,
    bytes       INTEGER NOT NULL DEFAULT 0,
    -- No message expires before this: tells a full inbox at once that looking for expired ones is no use.
    next_expiry INTEGER NOT NULL DEFAULT 9223372036854775807
) STRICT;

-- In order of arrival, so that what is committed together lies together: payloads of many inboxes share pages and only
-- short index entries are spread.
CREATE TABLE message (
    id             INTEGER PRIMARY KEY,
    inbox          INTEGER NOT NULL,
    seq            INTEGER NOT NULL,
    expires_at     INTEGER NOT NULL,
    enqueued_at    INTEGER NOT NULL,
    size           INTEGER NOT NULL, -- of the payload, in bytes
    channel        BLOB    NOT NULL, -- 16 bytes, or none for the default channel
    sender         BLOB    NOT NULL,
    message_id     BLOB,
    payload_sha256 BLOB    NOT NULL,
    payload        BLOB    NOT NULL  -- last, so that nothing before it waits for its overflow pages
) STRICT;
CREATE UNIQUE INDEX message_inbox ON message (inbox, seq);
-- One channel in seq order; expires_at besides, so that expired ones are found without touching a payload.
CREATE INDEX message_channel ON message (inbox, channel, seq, expires_at);
CREATE UNIQUE INDEX message_once ON message (inbox, sender, message_id) WHERE message_id IS NOT NULL;
CREATE INDEX message_expiry ON message (expires_at);

-- No seq is skipped or used twice: a row whose turn it is not is left out, and nothing is said.
CREATE TRIGGER message_next BEFORE INSERT ON message BEGIN
    SELECT RAISE (IGNORE) WHERE NEW.seq <> (SELECT last_seq + 1 FROM inbox WHERE id = NEW.inbox);
END;

CREATE TRIGGER message_in AFTER INSERT ON message BEGIN
    UPDATE inbox
       SET last_seq = NEW.seq, messages = messages + 1, bytes = bytes + NEW.size,
           next_expiry = min(next_expiry, NEW.expires_at)
     WHERE id = NEW.inbox;
END;

CREATE TRIGGER message_out AFTER DELETE ON message BEGIN
    UPDATE inbox
       SET messages = messages - 1, bytes = bytes - OLD.size,
           next_expiry = CASE messages WHEN 1 THEN 9223372036854775807 ELSE next_expiry END
     WHERE id = OLD.inbox;
END;

-- Ids of messages that are gone, with what their receipt said.
CREATE TABLE recent_id (
    inbox          INTEGER NOT NULL,
    sender         BLOB    NOT NULL,
    message_id     BLOB    NOT NULL,
    seq            INTEGER NOT NULL,
    channel        BLOB    NOT NULL,
    payload_sha256 BLOB    NOT NULL,
    enqueued_at    INTEGER NOT NULL,
    forget_at      INTEGER NOT NULL,
    PRIMARY KEY (inbox, sender, message_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX recent_id_forget ON recent_id (forget_at);

CREATE TABLE key_package (
    id          INTEGER PRIMARY KEY AUTOINCREMENT, -- in order of upload
    owner       INTEGER NOT NULL REFERENCES account (id),
    fingerprint BLOB    NOT NULL CHECK (length(fingerprint) = 32),
    last_resort INTEGER NOT NULL,
    not_after   INTEGER NOT NULL,
    bytes       BLOB    NOT NULL,
    UNIQUE (owner, fingerprint)
) STRICT;
CREATE INDEX key_package_next ON key_package (owner, last_resort, id, not_after);
CREATE INDEX key_package_expiry ON key_package (not_after);

-- What was given out and may not be uploaded again while it is valid.
CREATE TABLE key_package_given (
    owner       INTEGER NOT NULL,
    fingerprint BLOB    NOT NULL,
    not_after   INTEGER NOT NULL,
    PRIMARY KEY (owner, fingerprint)
) STRICT, WITHOUT ROWID;
CREATE INDEX key_package_given_expiry ON key_package_given (not_after);

CREATE TABLE hybrid_key (
    owner INTEGER PRIMARY KEY REFERENCES account (id),
    key   BLOB NOT NULL
) STRICT;

-- What Upkeep::check writes, to know that a commit is possible.
CREATE TABLE heartbeat (
    id    INTEGER PRIMARY KEY CHECK (id = 1),
    beats INTEGER NOT NULL
) STRICT;
INSERT INTO heartbeat VALUES (1, 0);
