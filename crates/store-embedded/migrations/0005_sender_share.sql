-- What one sender holds in an inbox, for messages without an id; message_once has those with one. Looked up only while the
-- inbox is more than half full. Partial, so that a message with an id, which is what clients send, has no more index entries
-- than before.
CREATE INDEX message_of_sender ON message (inbox, sender) WHERE message_id IS NULL;
