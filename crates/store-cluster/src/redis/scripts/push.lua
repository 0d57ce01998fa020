-- Adds messages that Postgres has committed to their inbox's queue, if it is loaded and of the same
-- history. In any order, any number of times.
-- KEYS: state, queue, waiters
-- ARGV: version and store id, maximum messages, maximum bytes, (seq, member)*
-- Returns the edges that wait. A registration ends at its time; those of the previous release,
--   which are all '1', end here.
local state = redis.call('HMGET', KEYS[1], 'h', 'n', 'b', 'g', 's')
if state[1] and state[5] == ARGV[1] then
  local head, count, bytes = tonumber(state[1]), tonumber(state[2]), tonumber(state[3])
  local gap = state[4]
  local before = count
  for i = 4, #ARGV, 2 do
    local seq = tonumber(ARGV[i])
    if seq > head then -- otherwise a load has brought it
      local new = redis.call('ZADD', KEYS[2], seq, ARGV[i + 1])
      count = count + new
      bytes = bytes + new * #ARGV[i + 1]
      if seq == head + 1 then head = seq else gap = '1' end
    end
  end
  if gap then -- messages that came too early count once those before them are there
    while redis.call('ZCOUNT', KEYS[2], head + 1, head + 1) == 1 do head = head + 1 end
    if redis.call('ZCOUNT', KEYS[2], '(' .. head, '+inf') == 0 then
      redis.call('HDEL', KEYS[1], 'g')
      gap = nil
    end
  end
  if count > tonumber(ARGV[2]) or bytes > tonumber(ARGV[3]) then
    redis.call('DEL', KEYS[1], KEYS[2])
  else
    redis.call('HSET', KEYS[1], 'h', head, 'n', count, 'b', bytes)
    if gap then redis.call('HSET', KEYS[1], 'g', '1') end
    if before == 0 and count > 0 then
      redis.call('PEXPIRE', KEYS[2], redis.call('PTTL', KEYS[1]))
    end
  end
end
local waiters, flat = {}, redis.call('HGETALL', KEYS[3])
if #flat > 0 then
  local time = redis.call('TIME')
  local clock = time[1] * 1000 + math.floor(time[2] / 1000)
  for i = 1, #flat, 2 do
    local ends = tonumber(flat[i + 1])
    if ends == 1 or ends > clock then waiters[#waiters + 1] = flat[i] end
    if ends <= clock then redis.call('HDEL', KEYS[3], flat[i]) end
  end
end
return waiters
