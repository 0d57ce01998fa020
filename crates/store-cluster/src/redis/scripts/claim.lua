-- Leases messages of a page that was read from Postgres, up to the first that is leased already.
-- KEYS: leases
-- ARGV: lease id or '' for a peek, how long it lasts in ms, how many of the seqs are the page (another may follow), seqs
-- Answers how many of the seqs are free, and the ms until the lease ends that they stop at, or 0.
local time = redis.call('TIME')
local clock = time[1] * 1000 + math.floor(time[2] / 1000)
local free, stopped = 0, 0
for i = 4, #ARGV do
  local id = redis.call('HGET', KEYS[1], ARGV[i])
  local ends = id and tonumber(redis.call('HGET', KEYS[1], 'e' .. id) or 0) or 0
  if ends > clock then
    stopped = ends - clock
    break
  end
  free = free + 1
end
local claimed = math.min(free, tonumber(ARGV[3]))
if ARGV[1] ~= '' and claimed > 0 then
  for i = 4, 3 + claimed do redis.call('HSET', KEYS[1], ARGV[i], ARGV[1]) end
  redis.call('HSET', KEYS[1], 'e' .. ARGV[1], clock + ARGV[2])
  redis.call('PEXPIRE', KEYS[1], 3 * ARGV[2])
end
return {free, stopped}
