-- Messages that Postgres has removed leave the queue, and their lease ends; or the lease alone ends.
-- KEYS: state, queue, leases, waiters
-- ARGV: which removal of the inbox it was (0: none, only the lease ends), lease id or '', seqs
-- Answers the edges that wait, which are forgotten here.
local removal = tonumber(ARGV[1])
if removal > 0 then
  -- Who is loading may have read them before they were removed, and reads again.
  redis.call('HDEL', KEYS[1], 'p')
  local state = redis.call('HMGET', KEYS[1], 'r', 'n')
  if state[1] and tonumber(state[1]) == removal - 1 then
    local count = tonumber(state[2])
    for i = 3, #ARGV do count = count - redis.call('ZREMRANGEBYSCORE', KEYS[2], ARGV[i], ARGV[i]) end
    redis.call('HSET', KEYS[1], 'r', removal, 'n', count)
  elseif state[1] and tonumber(state[1]) < removal then
    -- The one before it has not come yet, or never will.
    redis.call('DEL', KEYS[1], KEYS[2])
  end
end
if removal == 0 and #ARGV == 2 then -- whoever took the lease went away before it knew of what
  local leases = redis.call('HGETALL', KEYS[3])
  for i = 1, #leases, 2 do
    if leases[i + 1] == ARGV[2] then redis.call('HDEL', KEYS[3], leases[i]) end
  end
end
for i = 3, #ARGV do
  -- A lease that took over after ours had run out is not ours to end.
  if removal > 0 or redis.call('HGET', KEYS[3], ARGV[i]) == ARGV[2] then redis.call('HDEL', KEYS[3], ARGV[i]) end
end
if ARGV[2] ~= '' then redis.call('HDEL', KEYS[3], 'e' .. ARGV[2]) end
local waiters = redis.call('HKEYS', KEYS[4])
if #waiters > 0 then redis.call('DEL', KEYS[4]) end
return waiters
