-- Whether the store was closed in good order. If not, the next start looks for damage.
ALTER TABLE heartbeat ADD COLUMN clean INTEGER NOT NULL DEFAULT 0;
