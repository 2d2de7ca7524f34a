"""Replies of Redis as refleet's facts, and refleet's facts as arguments."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from .errors import StreamError
from .messages import Lease
from .stream import LogId, Member, ServerFacts
from .wire import pack

Argument = str | bytes | int

_ID_BYTES = 41  # two numbers of 64 bits
LIFETIME = struct.Struct(">Q")  # in front of a worker's status: how long the heartbeat lives, ms


def records(entries: list[tuple[bytes, dict[bytes, bytes]]]) -> list[tuple[bytes, bytes]]:
    """Ids and records. An entry without our field becomes an empty record, which its reader refuses and reports."""
    return [(entry_id, fields.get(b"r", b"")) for entry_id, fields in entries]


def with_text_ids(entries: list[tuple[bytes, bytes]]) -> list[tuple[str, bytes]]:
    return [(text_id(log_id(entry_id)), record) for entry_id, record in entries]


def text_id(order: LogId) -> str:
    return f"{order[0]}-{order[1]}"


def log_id(entry_id: bytes) -> LogId:
    epoch, _, seq = entry_id.partition(b"-")
    if not (epoch.isdigit() and seq.isdigit() and len(entry_id) <= _ID_BYTES):
        raise StreamError(f"the server names an entry {entry_id[:_ID_BYTES]!r}, which is no id")
    return int(epoch), int(seq)


def epoch_number(text: bytes) -> int:
    if text and not text.isdigit():
        raise StreamError(f"the epoch key holds {text[:20]!r}, not a number", next="delete it and publish again")
    return int(text or 0)


def milliseconds(seconds: float) -> int:
    return max(1, math.ceil(seconds * 1000))


def fence_arguments(lease: Lease, ttl_s: float) -> list[Argument]:
    assert lease.epoch > 0, "claim an epoch before writing"
    return [lease.publisher, lease.epoch, pack(lease), milliseconds(ttl_s)]


def member_of(worker: str, value: bytes, left_ms: int) -> Member:
    if left_ms < 0 or len(value) < LIFETIME.size:
        return Member(worker, None, None)
    (lifetime_ms,) = LIFETIME.unpack_from(value)
    return Member(worker, value[LIFETIME.size :], max(0.0, (lifetime_ms - left_ms) / 1000))


def facts_of(info: Mapping[str, Any]) -> ServerFacts:
    """What INFO says, as redis-py parses it."""
    name = "Valkey" if info.get("server_name") == "valkey" else "Redis"
    version = info.get("valkey_version") or info.get("redis_version") or "of unknown version"
    aof = info.get("aof_enabled")
    return ServerFacts(
        server=f"{name} {version}",
        used_bytes=int(info.get("used_memory", 0)),
        max_bytes=int(info.get("maxmemory", 0)),
        policy=info.get("maxmemory_policy"),
        aof=None if aof is None else bool(aof),
        run_id=info.get("run_id"),
    )


def replies_by_reference(facts: ServerFacts) -> bool:
    """Whether the server sends large strings without copying them: Valkey from version 9 on."""
    name, _, version = facts.server.partition(" ")
    major = version.split(".")[0]
    return name == "Valkey" and major.isdigit() and int(major) >= 9
