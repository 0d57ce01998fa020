-- Takes tokens from a bucket, which is kept as the instant at which it is full again.
-- KEYS: bucket
-- ARGV: burst, ms in which a token comes back, cost, now or '' for the time of Redis, 5 how long a key outlives its bucket, 6 and how long it is kept at
--   most; all times in ms
-- Answers nil if there were enough, else how many ms later there will be. Numbers go in and out as text with 17 digits,
-- which is all that a double has: as they are, Lua would send them without their fraction.
local burst, per_token, cost, now = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local full_at = math.max(tonumber(redis.call('GET', KEYS[1]) or now) or now, now)
-- No debt is stored that is larger: the clock was put back, and the bucket counts as full.
if full_at - now > tonumber(ARGV[6]) then full_at = now end
-- More than a whole bucket needs the whole bucket, and leaves a debt.
local needed = math.min(cost, burst)
local lacking = (full_at - now) / per_token + needed - burst
-- An instant is a whole millisecond, so less than what comes back in one is no reason to refuse.
if not (lacking * per_token < 1e-3) then
  return string.format('%.17g', math.ceil(lacking * per_token - 1e-3))
end
full_at = math.min(full_at + cost * per_token, now + tonumber(ARGV[6]))
if full_at > now then
  local kept = math.min(full_at - now + ARGV[5], tonumber(ARGV[6]))
  redis.call('SET', KEYS[1], string.format('%.17g', full_at), 'PX', string.format('%.0f', math.ceil(kept)))
end
return nil
