-- Removes messages from the queue after Postgres has removed them, if the queue is of the same
-- history, and ends their lease. Or ends a lease alone.
-- KEYS: state, queue, leases, waiters
-- ARGV: version and store id, the number of the reader's removal (0: only the lease ends),
--   lease id or '', seqs
-- Returns the edges that wait. A registration is the instant at which it ends. The previous release
--   stores '1' instead: that registration ends after this call.
local removal, own = tonumber(ARGV[2]), ARGV[3]
if removal > 0 then
  local state = redis.call('HMGET', KEYS[1], 'r', 'n', 's', 'p')
  -- A load in progress may have read the messages before the removal, and must read again.
  if state[4] and string.sub(state[4], 1, #ARGV[1]) == ARGV[1] then
    redis.call('HDEL', KEYS[1], 'p')
  end
  if state[1] and state[3] == ARGV[1] then
    if tonumber(state[1]) == removal - 1 then
      local count = tonumber(state[2])
      for i = 4, #ARGV do
        count = count - redis.call('ZREMRANGEBYSCORE', KEYS[2], ARGV[i], ARGV[i])
      end
      redis.call('HSET', KEYS[1], 'r', removal, 'n', count)
    elseif tonumber(state[1]) < removal then
      -- An earlier removal has not arrived yet, or never will.
      redis.call('DEL', KEYS[1], KEYS[2])
    end
  end
end
if own ~= '' then
  if removal == 0 and #ARGV == 3 then -- the reader was dropped before it knew the messages
    local leases = redis.call('HGETALL', KEYS[3])
    for i = 1, #leases, 2 do
      if leases[i + 1] == own then redis.call('HDEL', KEYS[3], leases[i]) end
    end
  end
  for i = 4, #ARGV do
    -- A lease that began after this one had expired is not ended.
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
