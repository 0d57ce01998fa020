-- Returns the first messages of a view, and leases them unless it is a peek. Without a usable queue
-- it returns a permit to load the messages that the reader then reads from Postgres.
-- KEYS: state, queue, leases, waiters
-- ARGV: 1 version and store id, 2 the minimum head and 3 the minimum removals that the queue must
--   show, 4 '1' if it may show a later state, 5 the seq to read after, 6 'all' or 'channel', 7 the
--   channel, 8 maximum messages, 9 maximum bytes, 10 now, 11 lease id or '' for a peek, 12 its
--   duration, 13 edge to wake or '', 14 the duration of its registration and of a permit, 15 time
--   for which the queue stays loaded; all times in ms
-- Returns {'C', permit to load} when the queue is not loaded, is of another history or shows an
--   older state than it must; {'A', head, removals} when it shows a later state than it may; else
--   {'M', head, 1 if the view has more, ms until the end of the lease at which the view stops or
--   0, members}.
local time = redis.call('TIME')
local clock = time[1] * 1000 + math.floor(time[2] / 1000)
-- Before the read, so that a message that is pushed from now on wakes the edge.
if ARGV[13] ~= '' then
  redis.call('HSET', KEYS[4], ARGV[13], string.format('%.0f', clock + ARGV[14]))
  redis.call('PEXPIRE', KEYS[4], ARGV[14])
end
local state = redis.call('HMGET', KEYS[1], 'h', 'r', 'n', 's')
local head, removals = tonumber(state[1]), tonumber(state[2])
if not head or state[4] ~= ARGV[1] or head < tonumber(ARGV[2]) or removals < tonumber(ARGV[3])
    or redis.call('ZCARD', KEYS[2]) ~= tonumber(state[3]) then
  local permit = redis.call('HGET', KEYS[1], 'p')
  if not permit or string.sub(permit, 1, #ARGV[1]) ~= ARGV[1] then
    permit = ARGV[1] .. time[1] .. '.' .. time[2]
    redis.call('HSET', KEYS[1], 'p', permit)
  end
  if not head then redis.call('PEXPIRE', KEYS[1], ARGV[14]) end
  return {'C', permit}
end
if ARGV[4] ~= '1' and (head > tonumber(ARGV[2]) or removals > tonumber(ARGV[3])) then
  return {'A', state[1], state[2]}
end
redis.call('PEXPIRE', KEYS[1], ARGV[15])
redis.call('PEXPIRE', KEYS[2], ARGV[15])
local leases, flat = {}, redis.call('HGETALL', KEYS[3])
for i = 1, #flat, 2 do leases[flat[i]] = flat[i + 1] end
-- Returns the end of the lease of a message. A lease of another history hides no message, since its
-- seqs belong to other messages. An edge of an earlier release stores no history.
local function lease_ends(field)
  local id = leases[field]
  if not id or (leases['s' .. id] or ARGV[1]) ~= ARGV[1] then return 0 end
  return tonumber(leases['e' .. id] or 0) or 0
end
local after, all, channel = tonumber(ARGV[5]), ARGV[6] == 'all', ARGV[7]
local most, most_bytes, now = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local members, seqs, bytes, more, stopped = {}, {}, 0, 0, 0
local first = '(' .. string.format('%.0f', after)
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], first, state[1])) do
  local seq, expires, _, length = struct.unpack('>I8I8I8B', member)
  if expires > now and (all or string.sub(member, 26, 25 + length) == channel) then
    local field = string.format('%.0f', seq)
    local ends = lease_ends(field)
    if ends > clock then
      stopped = ends - clock
      break
    end
    local cost = #member - 25 - length + 64
    if #members >= most or (#members > 0 and bytes + cost > most_bytes) then
      more = 1
      break
    end
    bytes = bytes + cost
    members[#members + 1] = member
    seqs[#seqs + 1] = field
  end
end
if ARGV[11] ~= '' and #members > 0 then
  for _, field in ipairs(seqs) do redis.call('HSET', KEYS[3], field, ARGV[11]) end
  redis.call('HSET', KEYS[3], 'e' .. ARGV[11], clock + ARGV[12], 's' .. ARGV[11], ARGV[1])
  redis.call('PEXPIRE', KEYS[3], 3 * ARGV[12])
end
return {'M', state[1], more, stopped, members}
