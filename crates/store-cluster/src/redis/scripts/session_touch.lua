-- Records a use of a session in its copy. The copy keeps its age.
-- KEYS: copy
-- ARGV: last_used_at and expires_at, 8 bytes each, and version
local copy = redis.call('GET', KEYS[1])
if copy and #copy >= 41 and string.sub(copy, 1, 1) == ARGV[2] then
  redis.call('SET', KEYS[1], string.sub(copy, 1, 25) .. ARGV[1] .. string.sub(copy, 42), 'KEEPTTL')
end
return 0
