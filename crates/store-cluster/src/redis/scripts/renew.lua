-- Renews a lease. A lease that no longer exists is not restored, since another reader may have
-- leased its messages.
-- KEYS: leases
-- ARGV: lease id, its duration in ms
local field = 'e' .. ARGV[1]
if redis.call('HEXISTS', KEYS[1], field) == 0 then return 0 end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], field, time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[2])
redis.call('PEXPIRE', KEYS[1], 3 * ARGV[2])
return 1
