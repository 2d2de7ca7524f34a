"""Fetch one payload: its index first, then the chunks that hold tensors which are not in the store yet."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ..common.delta import unpack_index
from ..common.digest import digest_of
from ..common.errors import (
    DigestMismatch,
    LimitExceeded,
    MalformedRecord,
    StreamGap,
    UnknownVersion,
    WrongBase,
)
from ..common.limits import LIMITS
from ..common.store import Store
from ..common.stream import PayloadReader, Stream
from ..common.types import Index, PayloadRef
from .early import Arrival

#: what a payload raises that is all there and wrong: another one may be right
BAD_PAYLOAD = (DigestMismatch, MalformedRecord, LimitExceeded, WrongBase)
#: chunks that are fetched ahead of the decoder
_AHEAD = 3
#: a chunk whose checksum is wrong is read again this often: the wire may have flipped a bit, the server may not have
_READS = 3


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a worker can build on: `have` names the versions in its store, `lacks` the objects that bit rot took."""

    have: tuple[bytes, ...]
    lacks: tuple[bytes, ...]

    @classmethod
    def of(cls, store: Store, *, first: Iterable[bytes]) -> Holdings:
        """Holdings of `store`; the fingerprints in `first` lead, so that the publisher prefers them as bases."""
        known = set(store.manifests())
        ordered = [f for f in dict.fromkeys(first) if f in known] + sorted(known - set(first))
        have, lacks = [], dict[bytes, None]()
        for fingerprint in ordered[: LIMITS.held_versions]:
            try:
                missing = {entry.digest for entry in store.missing(store.manifest(fingerprint))}
            except UnknownVersion:
                continue  # bit rot in its manifest
            if len(lacks.keys() | missing) <= LIMITS.lacking:
                have.append(fingerprint)
                lacks.update(dict.fromkeys(sorted(missing)))
        return cls(tuple(have), tuple(lacks))


def choose(candidates: Iterable[PayloadRef], holdings: Holdings, *, refused: Iterable[str]) -> PayloadRef | None:
    """The smallest usable payload: one whose base is held here and that did not prove bad before."""
    bad, have = set(refused), set(holdings.have)
    usable = [ref for ref in candidates if ref.payload_id not in bad and (ref.base is None or ref.base in have)]
    return min(usable, key=lambda ref: (ref.base is None, ref.size_bytes), default=None)


def fetch_index(stream: Stream, ref: PayloadRef) -> Index:
    """The payload's index, checked against the signed reference.

    Raises: StreamGap, DigestMismatch, MalformedRecord, LimitExceeded, StreamError.
    """
    parts, size = [], 0
    for number in range(ref.body_chunks, ref.body_chunks + ref.index_chunks):
        (part,) = stream.chunks(ref.payload_id, number, 1, carrier=ref.carrier)
        size += len(part)
        if size > ref.index_bytes:
            break
        parts.append(part)
    data = b"".join(parts)
    if size != ref.index_bytes or digest_of(data) != ref.index_digest:
        raise DigestMismatch(f"the index of payload {ref.payload_id} is not the signed one")
    index = unpack_index(data)
    if (index.base, index.target, index.body_bytes, len(index.chunks)) != (
        ref.base, ref.target, ref.body_bytes, ref.body_chunks,
    ):  # fmt: skip
        raise DigestMismatch(f"the index of payload {ref.payload_id} contradicts its reference")
    return index


class Body:
    """The body of one payload, read front to back; chunks are fetched and verified by a thread ahead of the reader.

    Use as a context manager: leaving it ends the thread. `on_chunk` is called by that thread with every verified chunk,
    in order; it must not keep the view. Chunks that came `early` are not fetched.
    """

    def __init__(
        self, stream: Stream, ref: PayloadRef, index: Index, numbers: list[int], *,
        early: Arrival | None, on_chunk: Callable[[memoryview], None],
    ):  # fmt: skip
        self._stream, self._ref, self._index, self._numbers = stream, ref, index, numbers
        self._early, self._on_chunk = early, on_chunk
        # received into memory that is used again: chunks on their way, the one being read, and the next one
        self._free: queue.Queue[memoryview] = queue.Queue()
        for _ in range(_AHEAD + 2):
            self._free.put(np.empty(min(index.chunk_bytes, index.body_bytes), np.uint8).data)
        self._ready: queue.Queue[tuple[int, memoryview, int] | Exception] = queue.Queue()
        self._stop = threading.Event()
        self._number, self._current, self._size = -1, memoryview(b""), 0
        self._thread = threading.Thread(target=self._fetch_all, name="refleet-receive", daemon=True)

    def __enter__(self) -> Body:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._free.put(memoryview(b""))  # wakes the thread
        self._thread.join()

    def read(self, offset: int, size: int) -> bytearray:
        """Bytes [offset, offset + size) of the body, in memory of the caller's own. Raises: what fetching raised."""
        out = bytearray(size)
        number, start = divmod(offset, self._index.chunk_bytes)
        filled = 0
        while filled < size:
            chunk = self._chunk(number)
            take = min(size - filled, len(chunk) - start)
            out[filled : filled + take] = chunk[start : start + take]
            filled, number, start = filled + take, number + 1, 0
        return out

    def finish(self) -> None:
        """Wait until every chunk was fetched. Raises: what fetching raised."""
        if self._numbers:
            self._chunk(self._numbers[-1])

    def _chunk(self, number: int) -> memoryview:
        while self._number != number:
            found = self._ready.get()
            if isinstance(found, Exception):
                self._ready.put(found)  # for whoever asks again
                raise found
            if self._number >= 0:
                self._free.put(self._current)
            self._number, self._current, self._size = found
            assert self._number <= number, "the body is read front to back"
        return self._current[: self._size]

    def _fetch_all(self) -> None:
        try:
            with self._stream.payload_reader(self._ref.payload_id, self._numbers, carrier=self._ref.carrier) as reader:
                for number in self._numbers:
                    buffer = self._free.get()
                    if self._stop.is_set():
                        return
                    size = self._fetch(reader, number, buffer)
                    self._on_chunk(buffer[:size])
                    self._ready.put((number, buffer, size))
        except Exception as error:  # the reader raises it in its own thread
            self._ready.put(error)

    def _fetch(self, reader: PayloadReader, number: int, buffer: memoryview) -> int:
        index = self._index
        size = min(index.chunk_bytes, index.body_bytes - number * index.chunk_bytes)

        def right(found: int | None) -> bool:
            return found == size and digest_of(buffer[:size]) == index.chunks[number]

        if self._early is not None and right(self._early.read(number, buffer)):
            return size
        for _ in range(_READS):
            try:
                found = reader.read(number, buffer)
            except LimitExceeded:
                found = -1
            if right(found):
                return size
            if self._stop.is_set():
                raise StreamGap("stopped")
        raise DigestMismatch(f"chunk {number} of payload {self._ref.payload_id} is not what the publisher signed")
