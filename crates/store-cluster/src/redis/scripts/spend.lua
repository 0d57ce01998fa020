-- Takes tokens from a bucket, which is stored as the instant at which it is full again.
-- KEYS: bucket
-- ARGV: burst, ms in which a token returns, cost, now or '' for the time of Redis, time for which a
--   key outlives its bucket, and its maximum lifetime; all times in ms
-- Returns nil if there were enough tokens, else the ms until there are. Numbers are passed as text
--   with 17 digits, which is the precision of a double: Lua would send them without their fraction.
local burst, per_token = tonumber(ARGV[1]), tonumber(ARGV[2])
local cost, now = tonumber(ARGV[3]), tonumber(ARGV[4])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local full_at = math.max(tonumber(redis.call('GET', KEYS[1]) or now) or now, now)
-- A larger debt is never stored. So the clock was set back, and the bucket counts as full.
if full_at - now > tonumber(ARGV[6]) then full_at = now end
-- A cost of more than the burst needs a full bucket, and leaves a debt.
local needed = math.min(cost, burst)
local lacking = (full_at - now) / per_token + needed - burst
-- Instants are whole milliseconds, so a debt that one millisecond restores is not refused.
if not (lacking * per_token < 1e-3) then
  return string.format('%.17g', math.ceil(lacking * per_token - 1e-3))
end
full_at = math.min(full_at + cost * per_token, now + tonumber(ARGV[6]))
if full_at > now then
  local kept = math.min(full_at - now + ARGV[5], tonumber(ARGV[6]))
  local expiry = string.format('%.0f', math.ceil(kept))
  redis.call('SET', KEYS[1], string.format('%.17g', full_at), 'PX', expiry)
end
return nil
