"""Bytes from host memory into live tensors: through pinned blocks, and where few elements changed only those.

Everything moves as integers: NaN payloads, -0.0 and bools other than 0 and 1 arrive unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common.delta import as_bytes
from ..common.errors import DigestMismatch, NotRefittable, UsageError
from ..common.kernels_numpy import changes as changes_in_block
from ..common.kernels_types import KINDS
from ..common.limits import MIB
from ..common.sparse import sampled
from ..common.tensors import dtype_text, spec_of
from ..common.types import TensorSpec
from .device_digest import c_order_pieces, flat_bytes
from .torch_state import bits, not_writable

if TYPE_CHECKING:
    from typing_extensions import Buffer

Bytes = NDArray[np.uint8]
Positions = NDArray[np.int64]
Values = NDArray[np.unsignedinteger[Any]]

BLOCK_BYTES, BLOCKS = 8 * MIB, 4  # of pinned memory: one is filled while others travel
SCAN_BYTES = MIB  # old and new stay in cache between the two looks at them
PUT_ELEMENTS = 1 << 20  # at a time: bounds the scratch on the device to 24 MiB
#: Up to this share of changed elements only they travel. A position costs 4 bytes, so at 12 % this is 60 % of a whole
#: copy's traffic for elements of 1 byte, 36 % for 2 bytes, 24 % for 4. The link is what is saved, not the host's time:
#: finding the elements takes one core longer than copying them all does, beyond about 0.1 %.
ELEMENTS_SHARE_MAX = 0.12
_TORCH_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(slots=True)
class _Block:
    memory: Tensor
    array: Bytes  # the same memory
    sent: torch.cuda.Event | None = None  # until then it must not be overwritten


class Staging:
    """A ring of buffers through which bytes go to a device, pinned where there is CUDA. For one thread at a time."""

    def __init__(self, *, block_bytes: int = BLOCK_BYTES, count: int = BLOCKS) -> None:
        if block_bytes < 8 or count < 1:
            raise UsageError(f"{count} blocks of {block_bytes} bytes are no ring: it takes at least one of 8 bytes")
        pinned = torch.cuda.is_available()
        self._ring: list[_Block] = []
        for _ in range(count):
            memory = torch.empty(block_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            self._ring.append(_Block(memory, memory.numpy()))
        self._next = 0
        self._streams: set[torch.cuda.Stream] = set()

    def copy(
        self, source: Buffer, into: Tensor, *, name: str = "tensor", stream: torch.cuda.Stream | None = None
    ) -> None:
        """Put `source` (bytes in C order) into the memory of `into`. `source` may be reused as soon as this returns.

        Copies to a CUDA device are asynchronous, on `stream` or the current one; to order kernels on other streams that
        use `into` is up to the caller. Scratch: one block on the device if `into` is not contiguous.
        Raises before anything is written: DigestMismatch if `source` has another size than `into`, NotRefittable for
        what can't be written in place, UsageError for a stream of another device.
        """
        data, spec = as_bytes(source), spec_of(name, into)
        _check(spec, into, data)
        done = 0
        with torch.no_grad(), self.on(into.device, stream) as used:
            for piece in c_order_pieces(bits(into), self._ring[0].array.size):
                size = piece.numel() * piece.element_size()
                block = self._free_block()
                np.copyto(block.array[:size], data[done : done + size])  # releases the GIL
                _write(piece, block.memory[:size])
                block.sent = _event(used)
                done += size

    @contextmanager
    def on(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> Iterator[torch.cuda.Stream | None]:
        """Work inside goes to `stream`, or the device's current one, and `finish` waits for it too."""
        if device.type != "cuda":
            yield None
            return
        stream = stream or torch.cuda.current_stream(device)
        if stream.device != device:
            raise UsageError(f"a stream of {stream.device} for a tensor on {device}")
        self._streams.add(stream)
        with torch.cuda.stream(stream):
            yield stream

    def finish(self) -> None:
        """Wait until everything has arrived. Errors of the copies show here at the latest."""
        for stream in self._streams:
            stream.synchronize()
        self._streams.clear()
        for block in self._ring:
            block.sent = None

    def _free_block(self) -> _Block:
        """The block used longest ago, once its bytes have left it."""
        block = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        if block.sent is not None:
            block.sent.synchronize()
            block.sent = None
        return block


def changed_elements(old: Buffer, new: Buffer, item_bytes: int) -> tuple[Positions, Values]:
    """Positions of the elements of `item_bytes` whose bytes differ, ascending, and their new bits.

    Raises: DigestMismatch unless both are the same whole number of elements.
    """
    found = _found(as_bytes(old), as_bytes(new), item_bytes, limit=None)
    assert found is not None
    return found


def put_elements(into: Tensor, positions: Positions, values: Values, *, staging: Staging | None = None) -> int:
    """Write `values` (bits) at `positions` (in C order, none twice) of a contiguous tensor, on its own device.

    With `staging` they travel through its blocks and have arrived after its `finish`; without, when this returns.
    Returns how many bytes travel. Raises before anything is written: UsageError for elements that `into` does not have.
    """
    _check_elements(into, positions, values)
    # Copies, as narrow as can be. Signed values: torch has no index_copy_ for most unsigned types.
    index_type = np.dtype(np.int32 if into.numel() <= 1 << 31 else np.int64)
    value_type = np.dtype(np.uint8 if values.itemsize == 1 else f"<i{values.itemsize}")
    ring = staging or Staging(block_bytes=MIB, count=2)
    with torch.no_grad(), ring.on(into.device):
        flat = bits(into).as_strided((into.numel(),), (1,))
        for start in range(0, positions.size, PUT_ELEMENTS):
            some = slice(start, start + PUT_ELEMENTS)
            index = _sent(positions[some].astype(index_type), into.device, ring)
            flat.index_copy_(0, index.long(), _sent(values[some].view(value_type), into.device, ring))
    if staging is None:
        ring.finish()
    return positions.size * (index_type.itemsize + value_type.itemsize)


def put_changed(into: Tensor, old: Buffer, new: Buffer, spec: TensorSpec, staging: Staging) -> int:
    """Make `into`, which holds the bytes `old`, hold `new`; returns how many bytes travel.

    Few changed elements go one by one, anything else as a whole. What `into` holds is not looked at: where it is not
    `old`, it is not `new` afterwards unless everything was copied. A digest of `into` tells.
    Raises before anything is written: NotRefittable if `into` is not like `spec` or can't be written in place,
    DigestMismatch if `old` or `new` has another size.
    """
    before, after = as_bytes(old), as_bytes(new)
    if (into.shape, dtype_text(into.dtype)) != (spec.shape, spec.dtype):
        held = f"{dtype_text(into.dtype)}{list(into.shape)}"
        raise NotRefittable(f"{spec} does not fit a tensor {held}", tensor=spec.name)
    for data in (before, after):
        _check(spec, into, data)
    if into.is_contiguous() and spec.size_bytes:
        limit = int(ELEMENTS_SHARE_MAX * into.numel())
        # A sample first: it saves most of the search where it would be in vain.
        if sampled(after, before, KINDS[spec.dtype]).share <= 2 * ELEMENTS_SHARE_MAX:
            found = _found(before, after, spec.item_bytes, limit=limit)
            if found is not None:
                return put_elements(into, *found, staging=staging)
    staging.copy(after.data, into, name=spec.name)
    return spec.size_bytes


def _found(old: Bytes, new: Bytes, item_bytes: int, *, limit: int | None) -> tuple[Positions, Values] | None:
    """What `changed_elements` returns, or None as soon as there are more than `limit`."""
    if old.size != new.size or new.size % item_bytes:
        raise DigestMismatch(f"{old.size} and {new.size} bytes are not equally many elements of {item_bytes} bytes")
    count, all_positions, all_values = 0, [np.empty(0, np.int64)], [np.empty(0, f"<u{item_bytes}")]
    for start in range(0, new.size, SCAN_BYTES):
        some = slice(start, start + SCAN_BYTES)
        found = changes_in_block(new[some], old[some], item_bytes, limit=SCAN_BYTES)
        assert found is not None  # no block has more elements than bytes
        positions, values, _ = found
        count += positions.size
        if limit is not None and count > limit:
            return None
        if positions.size:
            all_positions.append(positions + start // item_bytes)
            all_values.append(values)
    return np.concatenate(all_positions), np.concatenate(all_values)


def _check(spec: TensorSpec, into: Tensor, data: Bytes) -> None:
    if data.size != spec.size_bytes:
        raise DigestMismatch(f"{data.size} bytes for {spec}, which has {spec.size_bytes}", tensor=spec.name)
    problem = not_writable(spec.name, into)
    if problem:
        raise NotRefittable(f"it can't be written in place: {problem}", tensor=spec.name)


def _check_elements(into: Tensor, positions: Positions, values: Values) -> None:
    """On the host: an index out of range stops a CUDA device for the whole process."""
    if not into.is_contiguous() or not_writable("tensor", into):
        raise UsageError("elements can be put only into a contiguous tensor")
    if values.itemsize != into.element_size() or values.shape != positions.shape or positions.ndim != 1:
        raise UsageError(
            f"{list(values.shape)} values of {values.itemsize} bytes for {list(positions.shape)} positions in a tensor "
            f"of {into.element_size()}-byte elements"
        )
    if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) < into.numel():
        raise UsageError(f"positions from {positions.min()} to {positions.max()} in {into.numel()} elements")


def _sent(array: NDArray[Any], device: torch.device, ring: Staging) -> Tensor:
    """A copy of `array` on the device."""
    tensor = torch.empty(array.size, dtype=_TORCH_TYPES[array.itemsize], device=device)
    ring.copy(array.data, tensor)
    return tensor


def _write(piece: Tensor, memory: Tensor) -> None:
    """Bytes of a host block into a part of a tensor, in C order."""
    if piece.is_contiguous():
        flat_bytes(piece).copy_(memory, non_blocking=piece.is_cuda)
    else:
        there = memory.to(piece.device, non_blocking=piece.is_cuda)
        piece.copy_(there.view(piece.dtype).view(piece.shape))


def _event(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """Happens when everything on the stream up to now is done. Waiting for it leaves the CPU to others."""
    if stream is None:
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
