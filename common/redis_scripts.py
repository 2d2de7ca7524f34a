"""The Lua that makes a publisher's writes atomic: the fence is checked and the entry written in one step.

Each script lists every key it touches; they share the slot of {model}. Epochs are compared as decimal text, because
Lua's numbers lose digits past 2^53. The first write of each script is one that a full server refuses (XADD, SET, HSET
of a new value), so OOM never leaves half of a script done; renewing an unchanged lease works even then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import redis.exceptions

_HOLD = """
local function hold(publisher, epoch, record, ttl_ms)
  if redis.call('GET', KEYS[1]) ~= epoch then redis.call('SET', KEYS[1], epoch) end
  if redis.call('HGET', KEYS[2], 'record') ~= record then
    redis.call('HSET', KEYS[2], 'publisher', publisher, 'record', record)
  end
  redis.call('PEXPIRE', KEYS[2], ttl_ms)
end
"""

_FENCE = (
    _HOLD
    + """
local function above(a, b) return #a > #b or (#a == #b and a > b) end
local epoch = redis.call('GET', KEYS[1])
local held = redis.call('HMGET', KEYS[2], 'publisher', 'record')
if (epoch and above(epoch, ARGV[2])) or (held[1] and held[1] ~= ARGV[1]) then
  return {'stale', epoch or '0', held[2] or ''}
end
"""
)

#: KEYS epoch, lease. ARGV epoch and lease record as seen ('' = none); publisher, epoch, record, ttl_ms to set.
#: Returns 1, or 0 when either changed in between.
CLAIM = (
    _HOLD
    + """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
if (redis.call('HGET', KEYS[2], 'record') or '') ~= ARGV[2] then return 0 end
hold(ARGV[3], ARGV[4], ARGV[5], ARGV[6])
return 1
"""
)

#: KEYS epoch, lease. ARGV publisher, epoch, lease record, ttl_ms. Returns {'ok'} or {'stale', epoch, holder}.
RENEW = (
    _FENCE
    + """
hold(ARGV[1], ARGV[2], ARGV[3], ARGV[4])
return {'ok'}
"""
)

#: KEYS epoch, lease, log. ARGV as RENEW, then entry id, record, entries to keep.
#: Returns also {'other'} (the id holds other bytes) or {'behind', last id}.
APPEND = (
    _FENCE
    + """
local there = redis.call('XRANGE', KEYS[3], ARGV[5], ARGV[5])
if there[1] then
  if there[1][2][2] ~= ARGV[6] then return {'other'} end
else
  local added = redis.pcall('XADD', KEYS[3], 'MAXLEN', '~', ARGV[7], ARGV[5], 'r', ARGV[6])
  if type(added) == 'table' and added.err then
    if not string.find(added.err, 'equal or smaller', 1, true) then return added end
    local last = redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)
    return {'behind', last[1] and last[1][1] or 'a later one'}
  end
end
hold(ARGV[1], ARGV[2], ARGV[3], ARGV[4])
return {'ok'}
"""
)

#: KEYS epoch, lease, control. ARGV as RENEW, then record, entries to keep. Returns as RENEW.
OFFER = (
    _FENCE
    + """
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[6], '*', 'r', ARGV[5])
hold(ARGV[1], ARGV[2], ARGV[3], ARGV[4])
return {'ok'}
"""
)


@cache
def _sha1(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()  # the name under which servers cache it


def run(client: Any, script: str, keys: list[str], args: Sequence[str | bytes | int]) -> Any:
    """The script's reply. EVALSHA, and EVAL where the server does not know it yet: no right to SCRIPT LOAD needed."""
    try:
        return client.evalsha(_sha1(script), len(keys), *keys, *args)
    except redis.exceptions.NoScriptError:
        return client.eval(script, len(keys), *keys, *args)
