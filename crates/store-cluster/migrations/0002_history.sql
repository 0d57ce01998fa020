-- Part of the store id, in addition to the identifier and the timeline of the Postgres server. `qpq-admin restore` renews the
-- salt, since a copy of a data directory that is started without a promotion has the identifier and the timeline of its original.
CREATE TABLE store (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    salt      bytea   NOT NULL CHECK (octet_length(salt) = 16)
);
INSERT INTO store (salt) VALUES (uuid_send(gen_random_uuid()));

-- When a package's lifetime begins. Of packages stored by an earlier release that is not known; those are taken to have begun.
ALTER TABLE key_package ADD COLUMN not_before bigint;
