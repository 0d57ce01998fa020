-- The time that is believed, so that a clock which jumps far ahead destroys nothing. No row: nothing is stored yet.
CREATE TABLE clock (
    id       INTEGER PRIMARY KEY CHECK (id = 1),
    believed INTEGER NOT NULL,           -- the newest instant that is believed to have come
    shown    INTEGER,                    -- what the clock showed last, while that is not believed
    proved   INTEGER NOT NULL DEFAULT 0  -- for how many ms of running time it has shown that in step with another clock
) STRICT;
INSERT INTO clock (id, believed)
SELECT 1, max(at) FROM (
    SELECT max(enqueued_at) AS at FROM message
    UNION ALL SELECT max(created_at) FROM account
    UNION ALL SELECT max(last_used_at) FROM session)
HAVING max(at) IS NOT NULL;
