"""Payloads in a Redis server: written from the caller's memory, read into it, kept and dropped. Keys: stream.py.

Two carriers. STREAM: chunk n is entry (n+1)-0 of the payload's stream. BLOBS: chunk n is a string, and entry (n+1)-0 of
the payload's stream says that it is there; the stream alone decides what a payload holds and how long it lives, and
strings that it does not name (left by a crash) only wait for their own expiry.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from .errors import RefleetError, StreamError
from .limits import Limits
from .redis_link import Link, send_all
from .redis_reader import RedisReader
from .redis_replies import milliseconds
from .redis_wire import Wire, packed
from .stream import Keys
from .stream_rules import check_size, gap, id_taken
from .types import BLOBS, STREAM

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: strings outlive the stream that names them by this factor, so that a payload in use need not renew all of them often
_OUTLIVE = 1.25
_AT_ONCE = 256  # keys in one batch
_REMEMBERED = 64  # payloads that are being written at the same time

Reply = bytes | ResponseError | None


@dataclass(slots=True)
class _Put:
    """One chunk on its way."""

    payload_id: str
    number: int
    body: memoryview
    ttl_s: float

    @property
    def entry(self) -> bytes:
        return b"%d-0" % (self.number + 1)

    @property
    def what(self) -> str:
        return f"chunk {self.number} of payload {self.payload_id}"


class RedisPayloads:
    """Payloads of one model: written to one server, read from the same or from another one that has its data."""

    def __init__(self, link: Link, keys: Keys, limits: Limits, *, read: Link):
        self._link, self._keys, self._limits, self._read = link, keys, limits, read
        self._alive_until: dict[str, float] = {}  # by payload being written: the first expiry of its strings

    def reader(self, payload_id: str, numbers: Sequence[int] | None, *, carrier: str) -> RedisReader:
        return RedisReader(self._read, self._keys, payload_id, numbers, carrier=carrier)

    def chunks(self, payload_id: str, first: int, count: int, *, carrier: str) -> list[bytes]:
        numbers = range(first, first + count)
        key, names = self._keys.chunks(payload_id), self._blobs(payload_id, numbers)
        doing = f"reading chunks of payload {payload_id}"
        there: dict[int, bytes | None] = {}
        if carrier == BLOBS:
            with self._read.use(doing) as redis:
                replies = send_all(redis, lambda pipe: [pipe.get(name) for name in names])
            for number, reply in zip(numbers, replies, strict=True):
                if isinstance(reply, Exception):
                    raise self._read.refuse(reply, doing)
                there[number] = reply
        elif numbers:
            with self._read.use(doing) as redis:
                entries = redis.xrange(key, min=f"{first + 1}-0", max=f"{first + count}-0", count=count)
            found: dict[bytes, bytes] = {entry_id: fields[b"c"] for entry_id, fields in entries if b"c" in fields}
            there = {number: found.get(b"%d-0" % (number + 1)) for number in numbers}
        missing = [number for number, chunk in there.items() if chunk is None]
        if missing:
            raise gap(payload_id, missing)
        return [chunk for chunk in there.values() if chunk is not None]

    # ------------------------------------------------------------------ writing

    def put(self, payload_id: str, number: int, data: Buffer, *, ttl_s: float, carrier: str) -> None:
        put = _Put(payload_id, number, memoryview(data).cast("B"), ttl_s)
        check_size(len(put.body), self._limits.chunk_bytes_max, f"chunk {number}")
        if carrier == STREAM:
            self._put_entry(put)
        else:
            self._put_blob(put)

    def _put_entry(self, put: _Put) -> None:
        key = self._keys.chunks(put.payload_id)
        added, kept = self._say(put, [*self._xadd(put, b"c", put.body), self._expire(put)], replies=2)
        if self._passed(put, added, kept):
            with self._link.use(f"comparing {put.what}") as redis:
                there = redis.xrange(key, min=put.entry, max=put.entry)
            if not there or there[0][1].get(b"c") != bytes(put.body):  # bytes compare by memcmp
                raise id_taken(put.what, there=bool(there))

    def _put_blob(self, put: _Put) -> None:
        self._renew(put)
        blob = self._keys.blob(put.payload_id, put.number)
        lifetime = b"%d" % milliseconds(put.ttl_s * _OUTLIVE)
        pieces = [
            *_with_body([b"SET", blob.encode()], put.body, [b"NX", b"PX", lifetime]),
            *self._xadd(put, b"b", memoryview(b"")), self._expire(put),
        ]  # fmt: skip
        made, added, kept = self._say(put, pieces, replies=3)
        try:
            passed = self._passed(put, made, added, kept)
            if passed and made is None:
                self._compare(put, blob)
            elif passed:  # the string was lost or this number never written: only the stream knows
                with self._link.use(f"comparing {put.what}") as redis:
                    if not redis.xrange(self._keys.chunks(put.payload_id), min=put.entry, max=put.entry):
                        raise id_taken(put.what, there=False)
            elif made is None:  # a crash or a full server left this string without an entry
                over = _with_body([b"SET", blob.encode()], put.body, [b"PX", lifetime])
                self._passed(put, *self._say(put, over, replies=1))
        except RefleetError:
            if made == b"OK":
                with suppress(StreamError), self._link.use(f"taking {put.what} back") as redis:
                    redis.unlink(blob)
            raise

    def _compare(self, put: _Put, blob: str) -> None:
        key = self._keys.chunks(put.payload_id)
        with self._link.use(f"comparing {put.what}") as redis:
            there = redis.xrange(key, min=put.entry, max=put.entry)
            if not there or redis.get(blob) != bytes(put.body):
                raise id_taken(put.what, there=bool(there))

    def _renew(self, put: _Put) -> None:
        """Let all strings so far live as long as this one, unless they do so anyway."""
        now = time.monotonic()
        mine = now + put.ttl_s * _OUTLIVE
        first = self._alive_until.pop(put.payload_id, math.inf if put.number == 0 else 0.0)
        if put.number > 0 and first < now + put.ttl_s:
            self._expire_blobs(put.payload_id, put.number + 1, put.ttl_s)  # this one too: it may be sent again
            first = mine
        self._alive_until[put.payload_id] = min(first, mine)
        while len(self._alive_until) > _REMEMBERED:
            self._alive_until.pop(next(iter(self._alive_until)), None)

    def _xadd(self, put: _Put, field: bytes, body: memoryview) -> list[bytes | memoryview]:
        # chunk 0 alone may create the stream: a server that lost the others must not go unnoticed
        words = [b"XADD", self._keys.chunks(put.payload_id).encode(), *([b"NOMKSTREAM"] if put.number else [])]
        return _with_body([*words, put.entry, field], body, [])

    def _expire(self, put: _Put) -> bytes:
        return packed(b"PEXPIRE", self._keys.chunks(put.payload_id).encode(), b"%d" % milliseconds(put.ttl_s))

    def _say(self, put: _Put, pieces: list[bytes | memoryview], *, replies: int) -> list[Reply]:
        """One round trip, repeated once where the reply was lost: what is there is compared."""

        def command(_: Any) -> list[Reply]:
            wire = self._link.take_wire()
            whole = False
            try:
                wire.send(pieces)
                found = [_reply(wire) for _ in range(replies)]
                whole = True
            finally:
                self._link.give_wire(wire, again=whole)
            return found

        return self._link.run(f"writing {put.what}", command, tries=2)

    def _passed(self, put: _Put, *replies: Reply) -> bool:
        """Whether the stream has gone past this entry. Raises: the server's refusal, or StreamGap."""
        passed = [isinstance(reply, ResponseError) and "equal or smaller" in str(reply) for reply in replies]
        for reply, known in zip(replies, passed, strict=True):
            if isinstance(reply, ResponseError) and not known:
                raise self._link.refuse(reply, f"writing {put.what}")
        if len(replies) > 1 and replies[-2] is None:
            raise gap(put.payload_id, list(range(put.number)))
        return any(passed)

    # ------------------------------------------------------------------ as a whole

    def count(self, payload_id: str) -> int:
        with self._link.use(f"counting chunks of payload {payload_id}") as redis:
            return int(redis.xlen(self._keys.chunks(payload_id)))

    def keep(self, payload_id: str, *, ttl_s: float) -> None:
        self._alive_until.pop(payload_id, None)
        self._expire_blobs(payload_id, self._blob_count(payload_id), ttl_s)
        with self._link.use(f"keeping payload {payload_id}") as redis:
            redis.pexpire(self._keys.chunks(payload_id), milliseconds(ttl_s))

    def drop(self, payload_id: str) -> None:
        """Strings first, the first one last: what a broken connection leaves is found again."""
        self._alive_until.pop(payload_id, None)
        names = self._blobs(payload_id, range(self._blob_count(payload_id)))[::-1]
        with self._link.use(f"dropping payload {payload_id}") as redis:
            for start in range(0, len(names), _AT_ONCE):
                redis.unlink(*names[start : start + _AT_ONCE])
            redis.unlink(self._keys.chunks(payload_id))

    def _blob_count(self, payload_id: str) -> int:
        """How many strings there may be: 0 for a payload of the other carrier, whose last entry is a whole chunk."""
        with self._link.use(f"looking for payload {payload_id}") as redis:
            if int(redis.pttl(self._keys.blob(payload_id, 0))) == -2:  # no such key
                return 0
            last = redis.xrevrange(self._keys.chunks(payload_id), count=1)
        return int(last[0][0].split(b"-")[0]) + 1 if last else 1  # one more may lack its entry

    def _blobs(self, payload_id: str, numbers: range) -> list[str]:
        return [self._keys.blob(payload_id, number) for number in numbers]

    def _expire_blobs(self, payload_id: str, count: int, ttl_s: float) -> None:
        lifetime = milliseconds(ttl_s * _OUTLIVE)
        names = self._blobs(payload_id, range(count))
        doing = f"keeping payload {payload_id}"
        for start in range(0, count, _AT_ONCE):
            batch = names[start : start + _AT_ONCE]
            with self._link.use(doing) as redis:
                replies = send_all(redis, partial(_expire_all, batch, lifetime))
            for reply in replies:
                if isinstance(reply, Exception):
                    raise self._link.refuse(reply, doing)


def _expire_all(names: list[str], lifetime_ms: int, pipe: Any) -> None:
    for name in names:
        pipe.pexpire(name, lifetime_ms)


def _with_body(before: list[bytes], body: memoryview, after: list[bytes]) -> list[bytes | memoryview]:
    """RESP of one command with `body` among its words, as pieces: the body stays where it is."""
    head = packed(*before)
    head = b"*%d%b$%d\r\n" % (len(before) + 1 + len(after), head[head.index(b"\r\n") :], len(body))
    tail = packed(*after)
    return [head, body, b"\r\n" + tail[tail.index(b"\r\n") + 2 :]]


def _reply(wire: Wire) -> Reply:
    """One reply to a write: its text, None for nothing, or the server's refusal."""
    try:
        line = wire.line()
    except ResponseError as error:
        return error
    if line == b"$-1":
        return None
    if line.startswith((b"+", b":")):
        return line[1:]
    text = bytearray(min(wire.size(line), 64))
    wire.fill(memoryview(text))
    return bytes(text)
