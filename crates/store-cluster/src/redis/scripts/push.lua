-- Adds messages that Postgres has committed to the queues of the readers of inboxes, where these
-- are loaded and of the same history. Messages may come in any order, and more than once.
-- KEYS, for each inbox: waiters, (state, queue) of each reader
-- ARGV: version and store id, maximum messages, maximum bytes, number of payloads, payloads; for
--   each inbox: number of readers, number of messages, (seq, the member without its payload, place
--   of the payload) of each message
-- Returns for each inbox the edges that wait. A registration is the instant at which it ends. The
--   previous release stores '1' instead: that registration ends after this call.
local function push(state_key, queue_key, first, messages)
  local state = redis.call('HMGET', state_key, 'h', 'n', 'b', 'g', 's')
  if not state[1] or state[5] ~= ARGV[1] then return end
  local head, count, bytes = tonumber(state[1]), tonumber(state[2]), tonumber(state[3])
  local gap = state[4]
  local before = count
  for i = first, first + 3 * (messages - 1), 3 do
    local seq = tonumber(ARGV[i])
    if seq > head then -- a load has added the others
      local member = ARGV[i + 1] .. ARGV[4 + tonumber(ARGV[i + 2])]
      local new = redis.pcall('ZADD', queue_key, seq, member)
      if type(new) == 'table' then -- out of memory: drops only this queue
        redis.call('DEL', state_key, queue_key)
        return
      end
      count = count + new
      bytes = bytes + new * #member
      if seq == head + 1 then head = seq else gap = '1' end
    end
  end
  if gap then -- messages after a gap count once it is filled
    while redis.call('ZCOUNT', queue_key, head + 1, head + 1) == 1 do head = head + 1 end
    if redis.call('ZCOUNT', queue_key, '(' .. head, '+inf') == 0 then
      redis.call('HDEL', state_key, 'g')
      gap = nil
    end
  end
  if count > tonumber(ARGV[2]) or bytes > tonumber(ARGV[3]) then
    redis.call('DEL', state_key, queue_key)
  else
    redis.call('HSET', state_key, 'h', head, 'n', count, 'b', bytes)
    if gap then redis.call('HSET', state_key, 'g', '1') end
    if before == 0 and count > 0 then
      redis.call('PEXPIRE', queue_key, redis.call('PTTL', state_key))
    end
  end
end

local clock
local function waiting(key)
  local edges, flat = {}, redis.call('HGETALL', key)
  if #flat > 0 and not clock then
    local time = redis.call('TIME')
    clock = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  for i = 1, #flat, 2 do
    local ends = tonumber(flat[i + 1])
    if ends == 1 or ends > clock then edges[#edges + 1] = flat[i] end
    if ends <= clock then redis.call('HDEL', key, flat[i]) end
  end
  return edges
end

local answer = {}
local key, arg = 1, 5 + tonumber(ARGV[4])
while key <= #KEYS do
  local readers, messages = tonumber(ARGV[arg]), tonumber(ARGV[arg + 1])
  for reader = 1, readers do
    push(KEYS[key + 2 * reader - 1], KEYS[key + 2 * reader], arg + 2, messages)
  end
  answer[#answer + 1] = waiting(KEYS[key])
  key = key + 1 + 2 * readers
  arg = arg + 2 + 3 * messages
end
return answer
