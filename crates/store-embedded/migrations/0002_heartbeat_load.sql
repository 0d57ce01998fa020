-- What Upkeep::check writes besides, after a commit was refused: as much as that had, to know that it would be taken now.
ALTER TABLE heartbeat ADD COLUMN load BLOB;
