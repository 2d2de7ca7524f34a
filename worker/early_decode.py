"""Decode a payload that builds on the version served here while its publisher still writes it, by its prefaces alone.

Nothing here is believed: what came out is used only where it has a digest that the signed index names. Whatever does
not make sense ends the decoding, and costs nothing but that.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..common.delta import as_bytes
from ..common.digest import tensor_digest
from ..common.errors import DamagedTensor, LimitExceeded, MalformedRecord
from ..common.layout import Bytes, Placed, Span, decode
from ..common.limits import LIMITS
from ..common.preface import SIZES, Preface, unpacked
from ..common.store import Store
from ..common.types import Block, Manifest


class EarlyDecoder:
    """Takes the body of one payload, piece by piece, as it comes. Called by one thread.

    `likely`: names of the tensors that the payload before this one had; None: there was none.
    """

    def __init__(self, base: Manifest, store: Store, *, likely: frozenset[str] | None = None):
        self._base, self._store, self._likely = base, store, likely
        self._rest = bytearray()  # of a block that is not all here
        self._failed = False
        self._bases: dict[int, Bytes] = {}
        self._outs: dict[int, Bytes] = {}  # being filled, or waiting to be
        self._filled: dict[int, int] = {}  # bytes, of every tensor that was begun
        self._decoded_bytes = 0
        #: tensors that are complete, by their digest
        self.found: dict[bytes, Bytes] = {}

    @property
    def names(self) -> frozenset[str]:
        """The tensors that were begun."""
        return frozenset(self._base.tensors[number].spec.name for number in self._filled)

    def feed(self, chunk: memoryview) -> None:
        """The next bytes of the body."""
        if self._failed:
            return
        self._rest += chunk
        start = 0
        try:
            while (size := self._whole(start)) is not None:
                with memoryview(self._rest)[start : start + size] as data:
                    self._block(data)
                start += size
        except (MalformedRecord, LimitExceeded, DamagedTensor):
            self._failed = True
            self._rest, self._outs, self._bases = bytearray(), {}, {}
            return
        del self._rest[:start]

    def _whole(self, start: int) -> int | None:
        """Size of the block at `start`, if all of it is here."""
        if len(self._rest) - start < SIZES.size:
            return None
        size: int = SIZES.unpack_from(self._rest, start)[0]
        if not SIZES.size <= size <= LIMITS.block_bytes + LIMITS.preface_bytes:
            raise MalformedRecord(f"a block of {size} encoded bytes")
        return size if size <= len(self._rest) - start else None

    def _block(self, data: memoryview) -> None:
        before = unpacked(data)
        if not before.numbers:  # relative to no base, or of very many tensors
            return
        place = self._placed(before, len(data))
        dtype = self._base.tensors[before.numbers[0]].spec.dtype
        for number in before.numbers:
            self._ready(number)
        decode(place, data, dtype=dtype, base=self._bases.__getitem__, out=self._outs.__getitem__)
        self._decoded_bytes += before.size_bytes
        for span in place.spans:
            self._filled[span.number] = span.start + span.size
            if self._filled[span.number] == self._size(span.number):
                out = self._outs.pop(span.number)
                self.found[tensor_digest(out.data)] = out
                del self._bases[span.number]

    def _placed(self, before: Preface, encoded_bytes: int) -> Placed:
        """Raises: MalformedRecord for a block that can't be, tensors that there are not, or one that was filled."""
        spans, left, start = [], before.size_bytes, before.start
        for number in before.numbers:
            if number >= len(self._base.tensors) or self._filled.get(number, 0) != start or not left:
                raise MalformedRecord("a preface that does not fit its base")
            size = min(left, self._size(number) - start)
            spans.append(Span(number, start, size))
            left, start = left - size, 0
        if left or not all(span.size for span in spans):
            raise MalformedRecord("a preface that does not fit its base")
        try:
            return Placed(Block(before.codec, before.size_bytes, encoded_bytes), 0, tuple(spans))
        except ValueError as error:
            raise MalformedRecord(str(error)) from None

    def _size(self, number: int) -> int:
        return self._base.tensors[number].spec.size_bytes

    def _ready(self, number: int) -> None:
        """Base and buffer of this tensor. With it, buffers for those that are likely to follow: what is taken at once
        lies in one place.
        """
        if number not in self._bases:
            self._bases[number] = as_bytes(self._store.read(self._base.tensors[number].digest, verify=False))
        if number in self._outs:
            return
        begun = self._outs.keys() | self._filled.keys() | {number}
        numbers = [number, *(other for other in self._following(number) if other not in begun)]
        buffers = self._store.memory.take_all(self._size(other) for other in numbers)
        self._outs.update(zip(numbers, buffers, strict=True))

    def _following(self, number: int) -> Iterator[int]:
        """At first those of the payload before, or all; then as many bytes behind this one as were decoded so far."""
        tensors = self._base.tensors
        if not self._filled:
            yield from (n for n, each in enumerate(tensors) if self._likely is None or each.spec.name in self._likely)
            return
        most_bytes = self._decoded_bytes
        for other in range(number + 1, len(tensors)):
            most_bytes -= self._size(other)
            if most_bytes < 0:
                return
            if tensors[other].spec.dtype == tensors[number].spec.dtype:
                yield other
