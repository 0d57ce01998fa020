-- Stores the messages that an inbox had in Postgres at one instant as its queue, unless the queue
-- shows a later state of the same history. Needs a permit of that history that was issued before
-- that instant. The next removal ends the permit: a slow load would otherwise restore messages that
-- were removed meanwhile and whose lease has ended.
-- KEYS: state, queue
-- ARGV: version and store id, head, removals, bytes, time for which it stays loaded in ms, permit,
--   (seq, member)*
if redis.call('HGET', KEYS[1], 'p') ~= ARGV[6] then return 0 end
if string.sub(ARGV[6], 1, #ARGV[1]) ~= ARGV[1] then return 0 end
local state = redis.call('HMGET', KEYS[1], 'h', 'r', 's')
local head, removals = tonumber(ARGV[2]), tonumber(ARGV[3])
if state[1] and state[3] == ARGV[1] then
  -- A queue with a missing part is loaded again in any state.
  local whole = redis.call('ZCARD', KEYS[2]) == tonumber(redis.call('HGET', KEYS[1], 'n'))
  if whole and tonumber(state[1]) >= head and tonumber(state[2]) >= removals then return 0 end
  -- Later messages that were pushed already are kept. A read checks whether they are complete.
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', head)
else
  redis.call('DEL', KEYS[2])
end
for i = 7, #ARGV, 2 do redis.call('ZADD', KEYS[2], ARGV[i], ARGV[i + 1]) end
while redis.call('ZCOUNT', KEYS[2], head + 1, head + 1) == 1 do head = head + 1 end
redis.call('HDEL', KEYS[1], 'g')
local count = redis.call('ZCARD', KEYS[2])
redis.call('HSET', KEYS[1], 's', ARGV[1], 'h', head, 'r', removals, 'n', count, 'b', ARGV[4])
if redis.call('ZCOUNT', KEYS[2], '(' .. head, '+inf') > 0 then
  redis.call('HSET', KEYS[1], 'g', '1')
end
redis.call('PEXPIRE', KEYS[1], ARGV[5])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return 1
