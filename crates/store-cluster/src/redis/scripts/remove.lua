-- Messages that Postgres has removed leave the queue, if it is of the same history, and their lease ends; or the lease alone ends.
-- KEYS: state, queue, leases, waiters
-- ARGV: version and store id, which removal of the inbox it was (0: none, only the lease ends), lease id or '', seqs
-- Answers the edges that wait. Registrations end at their time; those of the release before, which are all '1', end here.
local removal, own = tonumber(ARGV[2]), ARGV[3]
if removal > 0 then
  local state = redis.call('HMGET', KEYS[1], 'r', 'n', 's', 'p')
  -- Who is loading may have read them before they were removed, and reads again.
  if state[4] and string.sub(state[4], 1, #ARGV[1]) == ARGV[1] then redis.call('HDEL', KEYS[1], 'p') end
  if state[1] and state[3] == ARGV[1] then
    if tonumber(state[1]) == removal - 1 then
      local count = tonumber(state[2])
      for i = 4, #ARGV do count = count - redis.call('ZREMRANGEBYSCORE', KEYS[2], ARGV[i], ARGV[i]) end
      redis.call('HSET', KEYS[1], 'r', removal, 'n', count)
    elseif tonumber(state[1]) < removal then
      -- The one before it has not come yet, or never will.
      redis.call('DEL', KEYS[1], KEYS[2])
    end
  end
end
if own ~= '' then
  if removal == 0 and #ARGV == 3 then -- whoever took the lease went away before it knew of what
    local leases = redis.call('HGETALL', KEYS[3])
    for i = 1, #leases, 2 do
      if leases[i + 1] == own then redis.call('HDEL', KEYS[3], leases[i]) end
    end
  end
  for i = 4, #ARGV do
    -- A lease that took over after ours had run out is not ours to end.
    if redis.call('HGET', KEYS[3], ARGV[i]) == own then redis.call('HDEL', KEYS[3], ARGV[i]) end
  end
  redis.call('HDEL', KEYS[3], 'e' .. own, 's' .. own)
end
local waiters, flat = {}, redis.call('HGETALL', KEYS[4])
if #flat > 0 then
  local time = redis.call('TIME')
  local clock = time[1] * 1000 + math.floor(time[2] / 1000)
  for i = 1, #flat, 2 do
    local ends = tonumber(flat[i + 1])
    if ends == 1 or ends > clock then waiters[#waiters + 1] = flat[i] end
    if ends <= clock then redis.call('HDEL', KEYS[4], flat[i]) end
  end
end
return waiters
