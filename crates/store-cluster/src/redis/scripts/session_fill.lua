-- Stores a session's copy, unless there is one, the session has ended, or Postgres was asked too
-- long ago.
-- KEYS: copy
-- ARGV: time at which Postgres was asked in ms, the validity of a copy in ms, version, store id,
--   session, 'replace' to store it even if there is a copy
-- Returns 1 if the session has ended.
local time = redis.call('TIME')
local clock = time[1] * 1000 + math.floor(time[2] / 1000)
local copy = redis.call('GET', KEYS[1])
if copy == 'E' then return 1 end
if copy and ARGV[6] ~= 'replace' and #copy > 25 and string.sub(copy, 1, 1) == ARGV[3]
    and string.sub(copy, 10, 25) == ARGV[4] then
  local age = clock - struct.unpack('>I8', copy, 2)
  -- The present copy may have a use that was recorded after Postgres was asked.
  if age >= 0 and age < tonumber(ARGV[2]) then return 0 end
end
local left = ARGV[1] + ARGV[2] - clock
if left > 0 then
  local filled = ARGV[3] .. struct.pack('>I8', ARGV[1]) .. ARGV[4] .. ARGV[5]
  redis.call('SET', KEYS[1], filled, 'PX', string.format('%.0f', left))
end
return 0
