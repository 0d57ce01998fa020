-- Shows the first messages of a view, and leases them unless it is a peek. A reader that is turned away gets a permit to load
-- what it then reads in Postgres.
-- KEYS: state, queue, leases, waiters
-- ARGV: 1 the least head and 2 the least removals that the queue must show, 3 after which seq, 4 'all' or 'channel', 5 the
--   channel, 6 most messages, 7 most bytes, 8 now, 9 lease id or '' for a peek, 10 how long it lasts, 11 edge that wants to be
--   woken or '', 12 how long it wants that, and how long a permit lasts, 13 how long the queue stays loaded; all times in ms
-- Answers {'C', permit to load} when the queue is not loaded, or shows an older state than it must; else
--   {'M', head, 1 if the view has more, ms until the lease ends that the view stops at or 0, members}.
local time = redis.call('TIME')
local clock = time[1] * 1000 + math.floor(time[2] / 1000)
-- First of all: what is pushed from here on wakes the edge, whatever this read finds.
if ARGV[11] ~= '' then
  redis.call('HSET', KEYS[4], ARGV[11], '1')
  redis.call('PEXPIRE', KEYS[4], ARGV[12])
end
local state = redis.call('HMGET', KEYS[1], 'h', 'r', 'n')
if not state[1] or tonumber(state[1]) < tonumber(ARGV[1]) or tonumber(state[2]) < tonumber(ARGV[2])
    or redis.call('ZCARD', KEYS[2]) ~= tonumber(state[3]) then
  local permit = redis.call('HGET', KEYS[1], 'p')
  if not permit then
    permit = time[1] .. '.' .. time[2]
    redis.call('HSET', KEYS[1], 'p', permit)
  end
  if not state[1] then redis.call('PEXPIRE', KEYS[1], ARGV[12]) end
  return {'C', permit}
end
redis.call('PEXPIRE', KEYS[1], ARGV[13])
redis.call('PEXPIRE', KEYS[2], ARGV[13])
local leases, flat = {}, redis.call('HGETALL', KEYS[3])
for i = 1, #flat, 2 do leases[flat[i]] = flat[i + 1] end
local after, all, channel = tonumber(ARGV[3]), ARGV[4] == 'all', ARGV[5]
local most, most_bytes, now = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local members, seqs, bytes, more, stopped = {}, {}, 0, 0, 0
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. string.format('%.0f', after), state[1])) do
  local seq, expires, _, length = struct.unpack('>I8I8I8B', member)
  if expires > now and (all or string.sub(member, 26, 25 + length) == channel) then
    local field = string.format('%.0f', seq)
    local ends = leases[field] and tonumber(leases['e' .. leases[field]] or 0) or 0
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
if ARGV[9] ~= '' and #members > 0 then
  for _, field in ipairs(seqs) do redis.call('HSET', KEYS[3], field, ARGV[9]) end
  redis.call('HSET', KEYS[3], 'e' .. ARGV[9], clock + ARGV[10])
  redis.call('PEXPIRE', KEYS[3], 3 * ARGV[10])
end
return {'M', state[1], more, stopped, members}
