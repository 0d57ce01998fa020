-- Deleted accounts. An account that is being erased has a random username and a random identity key, and no inbox. So edges
-- of the previous release do not find it either.

-- Erasures in progress. `after` is the last inbox in which the account's own messages to others were looked up.
CREATE TABLE erasure (
    id         bytea  PRIMARY KEY CHECK (octet_length(id) = 16),
    account    bigint NOT NULL UNIQUE REFERENCES account (id),
    identity   bytea  NOT NULL CHECK (octet_length(identity) = 32), -- the key that the account had
    deleted_at bigint NOT NULL,
    begun_at   bigint,                                              -- of the present pass; NULL: the next one has not begun
    after      bigint NOT NULL DEFAULT 0
);

-- Keys of deleted accounts, permanently, and their usernames until an instant, as hashes.
CREATE TABLE tombstone (
    hash  bytea  PRIMARY KEY CHECK (octet_length(hash) = 32),
    until bigint                                                    -- NULL: permanently
);
CREATE INDEX tombstone_until ON tombstone (until) WHERE until IS NOT NULL;

-- A key of a deleted account is not registered again, also not by an edge of the previous release, and not by a transaction
-- that began before the deletion: the triggers run after the insert, which waits for a concurrent deletion. The code is that
-- of a conflict between transactions, so that an edge tries again, and then finds the tombstone.
CREATE FUNCTION refuse_deleted_key(key bytea) RETURNS void LANGUAGE plpgsql AS
$$ BEGIN
    IF EXISTS (SELECT 1 FROM tombstone WHERE hash = sha256('qpq/key/1'::bytea || key)) THEN
        RAISE serialization_failure USING MESSAGE = 'the key belongs to a deleted account';
    END IF;
END $$;
CREATE FUNCTION check_identity() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM refuse_deleted_key(NEW.identity); RETURN NULL; END $$;
CREATE FUNCTION check_device_key() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM refuse_deleted_key(NEW.key); RETURN NULL; END $$;
CREATE TRIGGER identity_of_deleted AFTER INSERT ON account
    FOR EACH ROW EXECUTE FUNCTION check_identity();
CREATE TRIGGER device_key_of_deleted AFTER INSERT ON device_key
    FOR EACH ROW EXECUTE FUNCTION check_device_key();

-- For the erasure, which finds the rows of an account.
CREATE INDEX device_key_account ON device_key (account);
CREATE INDEX group_commit_account ON group_commit (account);
CREATE INDEX mls_group_first ON mls_group (substr(pair, 1, 32)) WHERE pair IS NOT NULL;
CREATE INDEX mls_group_second ON mls_group (substr(pair, 33, 32)) WHERE pair IS NOT NULL;
