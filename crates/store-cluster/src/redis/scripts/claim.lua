-- Leases messages of a page that was read from Postgres, up to the first that is leased already. A
-- lease of another history hides no message, since its seqs belong to other messages.
-- KEYS: leases
-- ARGV: version and store id, lease id or '' for a peek, its duration in ms, the number of seqs in
--   the page (another seq may follow), seqs
-- Returns the number of seqs before the first leased one, and the ms until that lease ends, or 0 if
--   none is leased.
local time = redis.call('TIME')
local clock = time[1] * 1000 + math.floor(time[2] / 1000)
local free, stopped = 0, 0
for i = 5, #ARGV do
  local id = redis.call('HGET', KEYS[1], ARGV[i])
  if id then
    local lease = redis.call('HMGET', KEYS[1], 'e' .. id, 's' .. id)
    local ends = tonumber(lease[1] or 0) or 0
    -- An edge of an earlier release stores no history.
    if ends > clock and (not lease[2] or lease[2] == ARGV[1]) then
      stopped = ends - clock
      break
    end
  end
  free = free + 1
end
local claimed = math.min(free, tonumber(ARGV[4]))
if ARGV[2] ~= '' and claimed > 0 then
  for i = 5, 4 + claimed do redis.call('HSET', KEYS[1], ARGV[i], ARGV[2]) end
  redis.call('HSET', KEYS[1], 'e' .. ARGV[2], clock + ARGV[3], 's' .. ARGV[2], ARGV[1])
  redis.call('PEXPIRE', KEYS[1], 3 * ARGV[3])
end
return {free, stopped}
