-- The history that seqs belong to. `qpq-admin restore` gives a restored copy another one.
CREATE TABLE store (
    id       INTEGER PRIMARY KEY CHECK (id = 1),
    store_id BLOB    NOT NULL CHECK (length(store_id) = 16)
) STRICT;
INSERT INTO store VALUES (1, randomblob(16));

-- When a package's lifetime begins. Of packages stored by an earlier release that is not known; those are taken to have begun.
ALTER TABLE key_package ADD COLUMN not_before INTEGER;

-- As before, with the new column: what is counted is read from the index alone.
DROP INDEX key_package_next;
CREATE INDEX key_package_next ON key_package (owner, last_resort, id, not_after, not_before);
