-- Returns a session's copy, if it is valid and of the present history. A copy is: version (1 byte),
--   time at which Postgres was asked (8 bytes, ms), store id (16 bytes), session. A copy of another
--   version or history counts as none.
-- KEYS: copy
-- ARGV: the validity of a copy in ms, version, store id
-- Returns {'found', its age in ms, session}, {'ended', 0, ''}, or {'absent', the time in ms, ''}.
local time = redis.call('TIME')
local clock = time[1] * 1000 + math.floor(time[2] / 1000)
local copy = redis.call('GET', KEYS[1])
if copy == 'E' then return {'ended', 0, ''} end
if copy and #copy > 25 and string.sub(copy, 1, 1) == ARGV[2]
    and string.sub(copy, 10, 25) == ARGV[3] then
  local age = clock - struct.unpack('>I8', copy, 2)
  -- A clock that was set back makes the copy invalid.
  if age >= 0 and age < tonumber(ARGV[1]) then return {'found', age, string.sub(copy, 26)} end
end
return {'absent', clock, ''}
