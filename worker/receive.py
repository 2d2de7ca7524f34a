"""Fetch one payload: its index first, then the chunks that hold tensors which are not in the store yet."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..common.delta import unpack_index
from ..common.digest import digest_of
from ..common.errors import (
    DigestMismatch,
    LimitExceeded,
    MalformedRecord,
    RefleetError,
    StreamGap,
    UnknownVersion,
    WrongBase,
)
from ..common.limits import LIMITS
from ..common.store import Store
from ..common.stream import Stream
from ..common.types import Index, PayloadRef

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

    def complete(self, store: Store, fingerprint: bytes) -> bool:
        """Whether every tensor of this version is here: staging it moves no byte."""
        return fingerprint in self.have and not store.missing(store.manifest(fingerprint))


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
        (part,) = stream.chunks(ref.payload_id, number, 1)
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

    Use as a context manager: leaving it ends the thread.
    """

    def __init__(
        self, stream: Stream, ref: PayloadRef, index: Index, numbers: list[int], *, on_bytes: Callable[[int], None]
    ):
        self._stream, self._ref, self._index, self._numbers = stream, ref, index, numbers
        self._on_bytes = on_bytes
        self._ready: queue.Queue[tuple[int, bytes | RefleetError]] = queue.Queue(_AHEAD)
        self._stop = threading.Event()
        self._current: tuple[int, memoryview] = (-1, memoryview(b""))
        self._thread = threading.Thread(target=self._fetch_all, name="refleet-receive", daemon=True)

    def __enter__(self) -> Body:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread.join()

    def read(self, offset: int, size: int) -> memoryview:
        """Bytes [offset, offset + size) of the body; copies only what crosses a chunk's edge. Raises: StreamError..."""
        number, start = divmod(offset, self._index.chunk_bytes)
        first = self._chunk(number)[start : start + size] if size else memoryview(b"")
        if len(first) == size:
            return first
        joined = bytearray(first)
        while len(joined) < size:
            number += 1
            joined += self._chunk(number)[: size - len(joined)]
        return memoryview(joined)

    def _chunk(self, number: int) -> memoryview:
        while self._current[0] != number:
            found, data = self._ready.get()
            if isinstance(data, RefleetError):
                raise data
            assert found <= number, "the body is read front to back"
            self._current = (found, memoryview(data))
        return self._current[1]

    def _fetch_all(self) -> None:
        for number in self._numbers:
            try:
                item: bytes | RefleetError = self._fetch(number)
            except RefleetError as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put((number, item), timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or isinstance(item, RefleetError):
                return

    def _fetch(self, number: int) -> bytes:
        index = self._index
        size = min(index.chunk_bytes, index.body_bytes - number * index.chunk_bytes)
        for _ in range(_READS):
            (data,) = self._stream.chunks(self._ref.payload_id, number, 1)
            if len(data) == size and digest_of(data) == index.chunks[number]:
                self._on_bytes(len(data))
                return data
            if self._stop.is_set():
                raise StreamGap("stopped")
        raise DigestMismatch(f"chunk {number} of payload {self._ref.payload_id} is not what the publisher signed")
