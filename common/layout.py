"""Where the tensors of a delta lie in its blocks; blocks from tensors, and back.

Tensors of one group (dtype, relative to a base or not) are one run of bytes in the order of their names. Blocks cut
that run, so that many small tensors share a block, whose statistics pay for its header, and a large one fills many.
Tensors are numbered in body order here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import codec
from .limits import LIMITS
from .preface import behind
from .types import Block, DeltaTensor

if TYPE_CHECKING:
    from typing_extensions import Buffer

Bytes = NDArray[np.uint8]
#: number of a tensor -> all of its bytes
Tensors = Callable[[int], Bytes]


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of one tensor in a block: `size` bytes from byte `start` of the tensor on."""

    number: int
    start: int
    size: int

    def of(self, tensors: Tensors) -> Bytes:
        """A view of these bytes."""
        return tensors(self.number)[self.start : self.start + self.size]


@dataclass(frozen=True, slots=True)
class Placed:
    """A block with its place: encoded bytes [offset, offset + block.encoded_bytes) of the body."""

    block: Block
    offset: int
    spans: tuple[Span, ...]


def in_body_order(tensors: Iterable[DeltaTensor]) -> list[DeltaTensor]:
    """The carried ones, as they lie in the body."""
    return sorted((t for t in tensors if t.carried), key=lambda t: (t.group, t.spec.name.encode()))


def placed(sizes: Iterable[int], blocks: Iterable[Block]) -> Iterator[Placed]:
    """The blocks with the tensors in them, whose `sizes` in bytes come in body order and add up to the blocks'."""
    offset, order = 0, enumerate(sizes)
    number = start = whole = 0
    for block in blocks:
        spans, left = [], block.size_bytes
        while left:
            if start == whole:
                (number, whole), start = next(order), 0
                continue
            size = min(left, whole - start)
            spans.append(Span(number, start, size))
            left, start = left - size, start + size
        yield Placed(block, offset, tuple(spans))
        offset += block.encoded_bytes


def chunks_of(found: Iterable[Placed], chunk_bytes: int) -> list[int]:
    """Numbers of the body chunks that hold these blocks, ascending, each once."""
    needed: list[int] = []
    for place in found:
        size = place.block.encoded_bytes
        if not size:
            continue
        first, last = place.offset // chunk_bytes, (place.offset + size - 1) // chunk_bytes
        needed.extend(n for n in range(first, last + 1) if not needed or n > needed[-1])
    return needed


class _Scratch(threading.local):
    """Two blocks a thread for blocks of several tensors, touched once: fresh pages cost more than the coding."""

    def __init__(self) -> None:
        self._arrays = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def take(self, which: int, size: int) -> Bytes:
        if self._arrays[which].size < size:
            self._arrays[which] = np.empty(LIMITS.block_bytes, np.uint8)
        return self._arrays[which][:size]


_scratch = _Scratch()


def gathered(spans: Sequence[Span], tensors: Tensors, *, which: int = 0) -> Bytes:
    """The bytes of a block: a view where one tensor fills it, else a copy that lives until this thread's next call."""
    if len(spans) == 1:
        return spans[0].of(tensors)
    out, at = _scratch.take(which, sum(span.size for span in spans)), 0
    for span in spans:
        out[at : at + span.size] = span.of(tensors)
        at += span.size
    return out


def decode(place: Placed, encoded: Buffer, *, dtype: str, base: Tensors | None, out: Tensors) -> None:
    """Decode one block, preface and all, into the tensors `out`, relative to those of `base` where its codec needs one.

    Raises: MalformedRecord, LimitExceeded; the block's bytes in `out` are undefined then.
    """
    before = None
    if base is not None and codec.needs_base(place.block.codec):
        before = gathered(place.spans, base, which=0)
    encoded = behind(encoded)
    if len(place.spans) == 1:
        codec.decode_block(place.block.codec, encoded, place.spans[0].of(out), before, dtype=dtype)
        return
    after, at = _scratch.take(1, place.block.size_bytes), 0
    codec.decode_block(place.block.codec, encoded, after, before, dtype=dtype)
    for span in place.spans:
        span.of(out)[:] = after[at : at + span.size]
        at += span.size
