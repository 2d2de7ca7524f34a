"""What turns a base version into a target: the plan, the body in blocks and chunks, and the index that names them.

plan -> blocks (layout.py, codec.py, in threads) -> body -> chunks of LIMITS.chunk_bytes -> index
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from . import codec, preface, wire
from .digest import digest_of
from .errors import MalformedRecord, WrongBase
from .layout import Bytes, Span, gathered
from .limits import LIMITS
from .lowrank import Factors
from .threads import cores, in_order
from .types import Block, DeltaTensor, Index, Manifest, TensorEntry

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a delta. `base`: digest of the base's tensor that it is relative to, where there is one."""

    tensor: DeltaTensor
    base: bytes | None


def plan(target: Manifest, base: Manifest | None, *, lacks: Iterable[bytes] = ()) -> list[Part]:
    """The parts that a receiver needs who holds `base`, except the objects whose digests are in `lacks`; by name."""
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
        tensor = DeltaTensor(entry.spec, entry.digest, carried, carried and usable)
        parts.append(Part(tensor, before.digest if tensor.based and before else None))
    return parts


def removed(target: Manifest, base: Manifest | None) -> tuple[str, ...]:
    """Names of the tensors that `base` has and `target` lacks."""
    return tuple(name for name in base.by_name if name not in target.by_name) if base else ()


@dataclass(frozen=True, slots=True)
class Input:
    """A carried tensor's bytes, and those of the base that it is relative to.

    `number`: its position in the base; `factors`: the tensor is about the base plus their product.
    """

    dtype: str
    new: Bytes
    base: Bytes | None
    number: int = 0
    factors: Factors | None = None


@dataclass(frozen=True, slots=True)
class _Task:
    dtype: str
    inputs: tuple[Input, ...]
    spans: tuple[Span, ...]


class Encoder:
    """Encodes carried tensors, given in body order: iterate `chunks()` once, then ask for `index()`.

    Inputs are taken one at a time while blocks are encoded in threads and chunks are used: whoever makes them may still
    be reading the next tensor. Their bytes must not change until the last chunk was taken.
    """

    def __init__(self, inputs: Iterable[Input], *, chunk_bytes: int = LIMITS.chunk_bytes, threads: int = 0):
        self._inputs, self._chunk_bytes, self._threads = inputs, chunk_bytes, threads or cores()
        self._blocks: list[Block] = []
        self._chunks: list[bytes] = []
        self._body_bytes = 0

    def chunks(self) -> Iterator[memoryview]:
        """The body, cut every `chunk_bytes`; a chunk is valid for ever, nothing reuses its memory."""
        chunk, filled = bytearray(self._chunk_bytes), 0
        for block, parts in in_order(_encode, self._tasks(), threads=self._threads):
            self._blocks.append(block)
            self._body_bytes += block.encoded_bytes
            for part in parts:
                rest = memoryview(part).cast("B")
                while len(rest):
                    take = min(len(rest), self._chunk_bytes - filled)
                    chunk[filled : filled + take] = rest[:take]
                    filled, rest = filled + take, rest[take:]
                    if filled == self._chunk_bytes:
                        yield self._finish(memoryview(chunk))
                        chunk, filled = bytearray(self._chunk_bytes), 0
        if filled:
            yield self._finish(memoryview(chunk)[:filled])

    def index(self, tensors: Iterable[DeltaTensor], *, target: Manifest, base: Manifest | None) -> Index:
        """The table of everything that `chunks()` gave; `tensors` changed, the carried ones among them the inputs."""
        return Index(
            base.fingerprint if base else None, target.fingerprint,
            tuple(sorted(tensors, key=lambda tensor: tensor.spec.name.encode())), tuple(self._blocks),
            self._chunk_bytes, self._body_bytes, tuple(self._chunks), removed(target, base),
        )  # fmt: skip

    def _finish(self, chunk: memoryview) -> memoryview:
        self._chunks.append(digest_of(chunk))
        return chunk

    def _tasks(self) -> Iterator[_Task]:
        """Blocks of up to LIMITS.block_bytes, each of one group."""
        inputs: list[Input] = []
        spans: list[Span] = []
        filled = 0

        def taken() -> _Task:
            return _Task(inputs[0].dtype, tuple(inputs), tuple(spans))

        for each in self._inputs:
            if each.factors is not None and each.base is not None:
                if inputs:
                    yield taken()
                    inputs, spans, filled = [], [], 0
                yield from _by_rows(each, each.factors)
                continue
            if inputs and (inputs[0].dtype, inputs[0].base is None) != (each.dtype, each.base is None):
                yield taken()
                inputs, spans, filled = [], [], 0
            start = 0
            while start < each.new.size:
                size = min(each.new.size - start, LIMITS.block_bytes - filled)
                spans.append(Span(len(inputs), start, size))
                inputs.append(each)
                start, filled = start + size, filled + size
                if filled == LIMITS.block_bytes:
                    yield taken()
                    inputs, spans, filled = [], [], 0
        if inputs:
            yield taken()


def _by_rows(each: Input, factors: Factors) -> Iterator[_Task]:
    """Blocks of whole rows."""
    row_bytes = each.new.size // factors.rows
    rows = LIMITS.block_bytes // row_bytes
    for first in range(0, factors.rows, rows):
        last = min(first + rows, factors.rows)
        piece = replace(each, factors=factors.of_rows(first, last))
        yield _Task(each.dtype, (piece,), (Span(0, first * row_bytes, (last - first) * row_bytes),))


def _encode(task: _Task) -> tuple[Block, tuple[bytes, Buffer]]:
    new = gathered(task.spans, lambda number: task.inputs[number].new, which=0)
    base = None
    if task.inputs[0].base is not None:
        base = gathered(task.spans, lambda number: _base(task.inputs[number]), which=1)
    factors = task.inputs[0].factors
    if factors is not None and base is not None:
        codec_id, encoded = codec.encode_factored(new, base, factors, dtype=task.dtype)
    else:
        codec_id, encoded = codec.encode_block(new, base, dtype=task.dtype)
    if codec_id == codec.RAW and len(task.spans) > 1:  # a view of this thread's scratch
        encoded = bytes(encoded)
    numbers = [] if base is None else [found.number for found in task.inputs]
    encoded_bytes = memoryview(encoded).nbytes
    before = preface.packed(codec_id, new.size, numbers, task.spans[0].start, encoded_bytes)
    return Block(codec_id, new.size, len(before) + encoded_bytes), (before, encoded)


def _base(found: Input) -> Bytes:
    assert found.base is not None
    return found.base


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
    for tensor in index.tensors:
        before = entries.get(tensor.spec.name)
        if tensor.based and (before is None or before.spec != tensor.spec):
            raise WrongBase(f"the delta builds on a tensor {tensor.spec} that its base does not have")
    for name in index.removed:
        if entries.pop(name, None) is None:
            raise MalformedRecord(f"the delta's index removes {name[:60]!r}, which its base does not have")
    entries.update((tensor.spec.name, TensorEntry(tensor.spec, tensor.digest)) for tensor in index.tensors)
    try:
        return Manifest.of(entries.values())
    except ValueError as error:
        raise MalformedRecord(f"the delta's index: {error}") from None
