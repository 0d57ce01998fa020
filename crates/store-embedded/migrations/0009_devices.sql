-- Devices. Each is a reader of its account's inbox, on a position of its own. A message waits for a device if its seq is
-- above `upto` and device_done has no row for both.
CREATE TABLE device (
    id            INTEGER PRIMARY KEY AUTOINCREMENT, -- the number of the registration, never reused
    account       INTEGER NOT NULL REFERENCES account (id),
    device        BLOB    NOT NULL CHECK (length(device) = 16),
    name          TEXT    NOT NULL,
    key           BLOB    CHECK (length(key) = 32),   -- NULL: it uses the identity key
    proof         BLOB    CHECK (length(proof) = 64),
    registered_at INTEGER NOT NULL,
    last_seen_at  INTEGER NOT NULL,                   -- with a precision of ten minutes
    upto          INTEGER NOT NULL,                   -- no message up to this seq waits for the device
    position_lost INTEGER NOT NULL DEFAULT 0,         -- 1: a sweep has moved it, and its client has not confirmed that
    UNIQUE (account, device),
    CHECK ((key IS NULL) = (proof IS NULL))
) STRICT;
CREATE INDEX device_absent ON device (last_seen_at, account, position_lost, upto);

-- Messages above `upto` that a device is done with. Each is queued: its rows go with it.
CREATE TABLE device_done (
    inbox  INTEGER NOT NULL,
    seq    INTEGER NOT NULL,
    device BLOB    NOT NULL,
    PRIMARY KEY (inbox, seq, device)
) STRICT, WITHOUT ROWID;

-- A key belongs to one device of one account permanently, also after its revocation.
CREATE TABLE device_key (
    key     BLOB    PRIMARY KEY CHECK (length(key) = 32),
    account INTEGER NOT NULL,
    device  BLOB    NOT NULL
) STRICT, WITHOUT ROWID;

-- The number of devices: an inbox without any has a single reader, who needs no look at the tables above.
ALTER TABLE inbox ADD COLUMN devices INTEGER NOT NULL DEFAULT 0;

CREATE TRIGGER device_in AFTER INSERT ON device BEGIN
    UPDATE inbox SET devices = devices + 1 WHERE id = NEW.account;
END;

CREATE TRIGGER device_moved AFTER UPDATE OF upto ON device BEGIN
    DELETE FROM device_done
     WHERE inbox = NEW.account AND seq > OLD.upto AND seq <= NEW.upto AND device = NEW.device;
END;

CREATE TRIGGER device_out AFTER DELETE ON device BEGIN
    UPDATE inbox SET devices = devices - 1 WHERE id = OLD.account;
    DELETE FROM device_done WHERE inbox = OLD.account AND device = OLD.device;
END;

-- As before, with the last statement.
DROP TRIGGER message_out;
CREATE TRIGGER message_out AFTER DELETE ON message BEGIN
    UPDATE inbox
       SET messages = messages - 1, bytes = bytes - OLD.size,
           next_expiry = CASE messages WHEN 1 THEN 9223372036854775807 ELSE next_expiry END
     WHERE id = OLD.inbox;
    DELETE FROM device_done WHERE inbox = OLD.inbox AND seq = OLD.seq;
END;

-- The device whose key signs the package. NULL: the identity key does.
ALTER TABLE key_package ADD COLUMN device BLOB CHECK (length(device) = 16);
CREATE INDEX key_package_of_device ON key_package (owner, device, last_resort, id, not_after, not_before);

-- The identity key's signature over the key, if its owner uploaded one.
ALTER TABLE hybrid_key ADD COLUMN signature BLOB CHECK (length(signature) = 64);
