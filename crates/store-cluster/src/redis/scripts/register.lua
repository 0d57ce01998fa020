-- Registers an edge as waiting for the inbox, before the inbox is read from Postgres.
-- KEYS: waiters
-- ARGV: edge, the duration of the registration in ms
local time = redis.call('TIME')
local clock = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', clock + ARGV[2]))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
