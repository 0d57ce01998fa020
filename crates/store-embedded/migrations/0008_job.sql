-- Durable work that is done after the answer to a call.
CREATE TABLE job (
    id         INTEGER PRIMARY KEY AUTOINCREMENT, -- never reused
    kind       TEXT    NOT NULL,
    key        BLOB,                              -- unique among a kind's jobs that are not dead
    payload    BLOB    NOT NULL,
    run_at     INTEGER NOT NULL,                  -- when the job is due; when the lease of a claim ends
    claim      BLOB    CHECK (length(claim) = 16), -- token of the worker that has claimed the job
    again_at   INTEGER,                           -- put once more while claimed: due then, after this run
    attempts   INTEGER NOT NULL DEFAULT 0,
    died_at    INTEGER,
    last_error TEXT
) STRICT;
CREATE INDEX job_due ON job (kind, run_at, id) WHERE died_at IS NULL;
CREATE UNIQUE INDEX job_key ON job (kind, key) WHERE key IS NOT NULL AND died_at IS NULL;
CREATE INDEX job_dead ON job (died_at, id) WHERE died_at IS NOT NULL;
