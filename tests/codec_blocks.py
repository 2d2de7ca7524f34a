"""Blocks of tensor bytes for the tests of codecs, and what those tests measure."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray
from refleet.common import codec, kernels
from refleet.common.types import DTYPE_BYTES

Bytes = NDArray[np.uint8]


@contextmanager
def kernel_form(name: str) -> Iterator[None]:
    """Runs the codecs on these kernels; `c`: the fastest in C. Skips the test where this machine lacks them."""
    here = kernels.available()
    wanted = here[-1] if name == "c" else name
    if wanted not in here or (name == "c" and wanted == "numpy"):
        pytest.skip(f"no {name} kernels on this machine")
    before = kernels.use(wanted)
    try:
        yield
    finally:
        kernels.use(before)


def roundtrip(new: Bytes, base: Bytes | None, dtype: str) -> tuple[int, int]:
    """Encodes, checks the size and that it decodes to the same bytes; (codec id, encoded size)."""
    number, encoded = codec.encode_block(new, base, dtype=dtype)
    size = len(memoryview(encoded).cast("B"))
    assert size <= new.size, f"codec {number} made {size} bytes of {new.size}"
    for fill in (0x00, 0xFF):  # the decoder must set every byte itself
        out = np.full(new.size, fill, np.uint8)
        codec.decode_block(number, encoded, out, base, dtype=dtype)
        assert np.array_equal(out, new)
    if base is not None:
        out = base.copy()
        codec.decode_block(number, encoded, out, out, dtype=dtype)
        assert np.array_equal(out, new), "not the same in place"
    return number, size


def weights(count: int, dtype: str = "BF16", seed: int = 0) -> Bytes:
    """`count` elements whose exponents look like a layer's: compressible top bytes, noise below."""
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32) * 0.02
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    assert dtype == "F32"
    return values.view(np.uint8)


def noise(size: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def stepped(base: Bytes, dtype: str, share: float, seed: int = 1) -> Bytes:
    """`base` after a small training step: `share` of its elements moved by a few units in the last place."""
    random = np.random.default_rng(seed)
    new = base.copy()
    view = new.view(f"<u{DTYPE_BYTES[dtype]}")
    chosen = np.flatnonzero(random.random(view.size) < share)
    steps = random.geometric(0.85, chosen.size) * random.choice([-1, 1], chosen.size)
    view[chosen] += steps.astype(np.int64).astype(view.dtype)
    return new


def peak_bytes(action: Callable[[], object]) -> int:
    """The most memory that Python and numpy held at once during `action`."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
