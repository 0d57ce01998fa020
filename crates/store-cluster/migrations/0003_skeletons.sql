-- The skeleton of each username (UTS 39): names that people confuse have the same one, and only one of them may be
-- registered. It is computed from the username by the program, so rows of edges of the previous release have none until an
-- edge of this release fills it in: at its start, and before each registration.
ALTER TABLE account
    ADD COLUMN skeleton  text COLLATE "C",
    -- Registered beside an older account with the same skeleton, before the rule or by an edge without it. It stays.
    ADD COLUMN lookalike boolean NOT NULL DEFAULT false;
CREATE UNIQUE INDEX account_skeleton ON account (skeleton) WHERE skeleton IS NOT NULL AND NOT lookalike;
CREATE INDEX account_without_skeleton ON account (id) WHERE skeleton IS NULL;
