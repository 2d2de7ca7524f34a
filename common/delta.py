"""What turns a base version into a target: the plan, the body in blocks and chunks, and the index that names them.

    plan -> blocks (codec.py, in threads) -> body -> chunks of LIMITS.chunk_bytes -> index

Both directions read tensors out of a store and never hold more than a few blocks and chunks in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import codec, wire
from .digest import digest_of
from .errors import DamagedTensor, MalformedRecord, WrongBase
from .limits import LIMITS
from .types import Block, DeltaTensor, Index, Manifest, TensorEntry

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .store import Store

T = TypeVar("T")
R = TypeVar("R")
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a delta: a tensor to carry, relative to `base` (a digest) where there is one.

    `carried` is false where the receiver finds the same bytes by digest: in its base or earlier in this delta.
    """

    entry: TensorEntry
    base: bytes | None
    carried: bool


def plan(target: Manifest, base: Manifest | None, *, lacks: Iterable[bytes] = ()) -> list[Part]:
    """The parts that a receiver needs who holds `base`, except the objects whose digests are in `lacks`."""
    missing = frozenset(lacks)
    at_hand = {entry.digest for entry in base.tensors} - missing if base else set()
    parts = []
    for entry in target.tensors:
        before = base.by_name.get(entry.spec.name) if base else None
        if before == entry and entry.digest not in missing:
            continue
        usable = before is not None and before.spec == entry.spec and before.digest in at_hand and before != entry
        carried = entry.digest not in at_hand and entry.spec.size_bytes > 0
        at_hand.add(entry.digest)
        parts.append(Part(entry, before.digest if usable and before else None, carried))
    return parts


def removed(target: Manifest, base: Manifest | None) -> tuple[str, ...]:
    """Names of the tensors that `base` has and `target` lacks."""
    return tuple(name for name in base.by_name if name not in target.by_name) if base else ()


def in_order(task: Callable[[T], R], items: Iterable[T], *, threads: int) -> Iterator[R]:
    """`map` over threads that keeps the order and looks at most `threads + 1` items ahead: memory stays bounded."""
    if threads <= 1:
        yield from map(task, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="refleet-codec") as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(task, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Encoder:
    """Encodes `parts`, the plan from `base` to `target`, out of `store`: iterate `chunks()` once, then ask for
    `index()`."""

    def __init__(
        self,
        store: Store,
        parts: list[Part],
        *,
        base: Manifest | None,
        target: Manifest,
        chunk_bytes: int = LIMITS.chunk_bytes,
        threads: int = 0,
    ):
        self._store, self._parts, self._base, self._target = store, parts, base, target
        self._chunk_bytes, self._threads = chunk_bytes, threads or cores()
        self._blocks: dict[int, list[Block]] = {n: [] for n in range(len(parts))}
        self._chunks: list[bytes] = []
        self._body_bytes = 0

    def chunks(self) -> Iterator[memoryview]:
        """The body, cut every `chunk_bytes`; a chunk is valid for ever, nothing reuses its memory.

        Raises: DamagedTensor when the store can't give back a tensor of the target.
        """
        chunk, filled = bytearray(self._chunk_bytes), 0
        for number, codec_id, encoded in in_order(self._encode, self._tasks(), threads=self._threads):
            rest = memoryview(encoded).cast("B")
            self._blocks[number].append(Block(codec_id, len(rest)))
            self._body_bytes += len(rest)
            while len(rest):
                take = min(len(rest), self._chunk_bytes - filled)
                chunk[filled : filled + take] = rest[:take]
                filled, rest = filled + take, rest[take:]
                if filled == self._chunk_bytes:
                    yield self._finish(memoryview(chunk))
                    chunk, filled = bytearray(self._chunk_bytes), 0
        if filled:
            yield self._finish(memoryview(chunk)[:filled])

    def index(self) -> Index:
        """The table of everything that `chunks()` gave."""
        tensors = tuple(
            DeltaTensor(part.entry.spec, part.entry.digest, tuple(self._blocks[n]))
            for n, part in enumerate(self._parts)
        )
        return Index(
            self._base.fingerprint if self._base else None, self._target.fingerprint, tensors, self._chunk_bytes,
            self._body_bytes, tuple(self._chunks), removed(self._target, self._base),
        )  # fmt: skip

    def _finish(self, chunk: memoryview) -> memoryview:
        self._chunks.append(digest_of(chunk))
        return chunk

    def _tasks(self) -> Iterator[tuple[int, str, Bytes, Bytes | None]]:
        for number, part in enumerate(self._parts):
            if not part.carried:
                continue
            new = as_bytes(self._store.read(part.entry.digest, verify=True))
            base = self._read_base(part.base)
            for start in range(0, new.size, LIMITS.block_bytes):
                piece = slice(start, start + LIMITS.block_bytes)
                yield number, part.entry.spec.dtype, new[piece], None if base is None else base[piece]

    def _read_base(self, digest: bytes | None) -> Bytes | None:
        if digest is None:
            return None
        try:
            return as_bytes(self._store.read(digest, verify=True))
        except DamagedTensor:
            # the receivers' copies are their own; here it only means that this tensor travels whole
            self._store.forget(digest)
            return None

    @staticmethod
    def _encode(task: tuple[int, str, Bytes, Bytes | None]) -> tuple[int, int, Buffer]:
        number, dtype, new, base = task
        codec_id, encoded = codec.encode_block(new, base, dtype=dtype)
        return number, codec_id, encoded


def as_bytes(data: Buffer) -> Bytes:
    """A flat uint8 view of a buffer, without a copy."""
    return np.frombuffer(memoryview(data), np.uint8)


def cut(data: bytes, size: int = LIMITS.chunk_bytes) -> list[memoryview]:
    """`data` in pieces of `size` bytes, the last one shorter; at least one piece."""
    view = memoryview(data)
    return [view[start : start + size] for start in range(0, max(len(data), 1), size)]


def unpack_index(data: bytes) -> Index:
    """The index in `data`. Raises: MalformedRecord, LimitExceeded."""
    return wire.unpack(data, Index, max_bytes=LIMITS.index_bytes)


def target_manifest(index: Index, base: Manifest | None) -> Manifest:
    """The manifest that `index` makes out of `base`.

    The caller compares the result's fingerprint with the signed one before any body byte moves.
    Raises: WrongBase when the index is relative to another base, MalformedRecord.
    """
    if index.base != (base.fingerprint if base else None):
        raise WrongBase("the delta is relative to a version that is not held here")
    entries = dict(base.by_name) if base else {}
    for name in index.removed:
        if entries.pop(name, None) is None:
            raise MalformedRecord(f"the delta's index removes {name[:60]!r}, which its base does not have")
    entries.update((tensor.spec.name, TensorEntry(tensor.spec, tensor.digest)) for tensor in index.tensors)
    try:
        return Manifest.of(entries.values())
    except ValueError as error:
        raise MalformedRecord(f"the delta's index: {error}") from None


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor's blocks lie in the body."""

    tensor: DeltaTensor
    offset: int

    @property
    def size_bytes(self) -> int:
        return sum(block.encoded_bytes for block in self.tensor.blocks)


def slots(index: Index) -> list[Slot]:
    """The carried tensors of `index` with their offsets in the body."""
    sizes = (sum(block.encoded_bytes for block in tensor.blocks) for tensor in index.tensors)
    offsets = accumulate(sizes, initial=0)
    return [Slot(tensor, offset) for tensor, offset in zip(index.tensors, offsets, strict=False) if tensor.blocks]


def chunks_of(found: Iterable[Slot], chunk_bytes: int) -> list[int]:
    """Numbers of the body chunks that hold these slots, ascending, each once."""
    needed: list[int] = []
    for slot in found:
        if not slot.size_bytes:
            continue
        first, last = slot.offset // chunk_bytes, (slot.offset + slot.size_bytes - 1) // chunk_bytes
        needed.extend(n for n in range(first, last + 1) if not needed or n > needed[-1])
    return needed
