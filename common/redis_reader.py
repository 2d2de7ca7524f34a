"""`PayloadReader` over Redis: one connection, the next chunk requested before the current one has come."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from .errors import StreamGap
from .redis_link import Link
from .redis_replies import milliseconds
from .redis_wire import Wire, packed, unexpected
from .stream import Keys
from .stream_rules import gap, too_large
from .types import BLOBS


class RedisReader:
    """Reads one payload. Takes a connection at its first read and gives it back when it is left."""

    def __init__(self, link: Link, keys: Keys, payload_id: str, numbers: Sequence[int] | None, *, carrier: str):
        self._link, self._keys, self._payload_id, self._carrier = link, keys, payload_id, carrier
        self._key = keys.chunks(payload_id).encode()
        self._after = None if numbers is None else dict(pairwise(numbers))
        self._wire: Wire | None = None
        self._asked: deque[int] = deque()  # requests without a reply so far, oldest first

    def __enter__(self) -> RedisReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave(again=not self._asked)

    def read(self, number: int, into: memoryview, *, wait_s: float = 0.0) -> int:
        with self._link.use(f"reading chunk {number} of payload {self._payload_id}"):
            try:
                return self._await(number, into.cast("B"), wait_s) if wait_s > 0 else self._read(number, into.cast("B"))
            except StreamGap:
                raise  # an answer like any other
            except BaseException:
                self._leave(again=False)  # who knows what comes next on this connection
                raise

    def _read(self, number: int, into: memoryview) -> int:
        if self._asked and self._asked[0] != number:
            self._leave(again=False)  # another chunk is on its way: a new connection is cheaper than taking that in
        if self._wire is None:
            self._wire = self._link.take_wire()
        following = number + 1 if self._after is None else self._after.get(number)
        new = [n for n in (number, following) if n is not None and n not in self._asked]
        self._wire.send([b"".join(map(self._request, new))])
        self._asked.extend(new)
        size = self._size(self._wire, number)
        if size is None:
            self._asked.popleft()
            raise gap(self._payload_id, [number])
        if size > len(into):
            raise too_large(self._payload_id, number, size, len(into))
        self._wire.fill(into[:size])
        self._asked.popleft()
        return size

    def _await(self, number: int, into: memoryview, wait_s: float) -> int:
        """The server holds its answer back until the chunk is there: one round trip, however long that takes.

        The entry after n-0 is that of chunk n. With carrier blobs the string is asked for in the same breath: the
        server answers that once the entry, which is written after the string, has come.
        """
        if self._asked:
            self._leave(again=False)
        if self._wire is None:
            self._wire = self._link.take_wire()
        wire, blobs = self._wire, self._carrier == BLOBS
        # well below the reply timeout, so that a server that hangs is an error
        block = b"%d" % milliseconds(min(wait_s, self._link.timeout_s / 2))
        words = (b"XREAD", b"COUNT", b"1", b"BLOCK", block, b"STREAMS", self._key, b"%d-0" % number)
        wire.send([packed(*words) + (self._request(number) if blobs else b"")])
        there = self._awaited_entry(wire, number)
        if not blobs:
            size = wire.size(wire.line()) if there else None
        else:
            found = wire.line()
            size = None if found == b"$-1" else wire.size(found)
            if size is not None and not there:  # its entry may come yet: the next call asks again
                self._leave(again=False)
                size = None
        if size is None:
            raise gap(self._payload_id, [number])
        if size > len(into):
            raise too_large(self._payload_id, number, size, len(into))
        wire.fill(into[:size])
        return size

    def _awaited_entry(self, wire: Wire, number: int) -> bool:
        """Reads a reply to XREAD up to the chunk's size, or for carrier blobs to its end; False: nothing came."""
        if (first := wire.line()) == b"*-1":
            return False
        if first != b"*1":
            raise unexpected(first, b"*1")
        entry = b"%d-0" % (number + 1)
        wire.expect(b"*2", b"$%d" % len(self._key), self._key, b"*1", b"*2")
        wire.size(wire.line())
        if wire.line() != entry:  # a later one: this chunk was passed over
            self._leave(again=False)
            raise gap(self._payload_id, [number])
        wire.expect(b"*2", b"$1", *((b"b", b"$0", b"") if self._carrier == BLOBS else (b"c",)))
        return True

    def _request(self, number: int) -> bytes:
        if self._carrier == BLOBS:
            return packed(b"GET", self._keys.blob(self._payload_id, number).encode())
        entry = b"%d-0" % (number + 1)
        return packed(b"XRANGE", self._key, entry, entry)

    def _size(self, wire: Wire, number: int) -> int | None:
        """The chunk's size, with its bytes next on the wire; None where it is gone."""
        first = wire.line()
        if self._carrier == BLOBS:
            return None if first == b"$-1" else wire.size(first)
        if first == b"*0":
            return None
        entry = b"%d-0" % (number + 1)
        if first != b"*1":
            raise unexpected(first, b"*1")
        wire.expect(b"*2", b"$%d" % len(entry), entry, b"*2", b"$1", b"c")
        return wire.size(wire.line())

    def _leave(self, *, again: bool) -> None:
        if self._wire is not None:
            self._link.give_wire(self._wire, again=again)
        self._wire = None
        self._asked.clear()
