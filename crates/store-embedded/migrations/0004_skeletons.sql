-- The skeleton of each username (UTS 39): names that people confuse have the same one, and only one of them may be
-- registered. It is computed from the username by the program, which fills it in for older rows when it opens the database.
ALTER TABLE account ADD COLUMN skeleton TEXT;
-- 1: registered beside an older account with the same skeleton, before the rule. It stays.
ALTER TABLE account ADD COLUMN lookalike INTEGER NOT NULL DEFAULT 0;
CREATE UNIQUE INDEX account_skeleton ON account (skeleton) WHERE lookalike = 0;
CREATE INDEX account_without_skeleton ON account (id) WHERE skeleton IS NULL;
