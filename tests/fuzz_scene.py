"""What a decoder is to the fuzzer, and two versions of a few tensors for its valid inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from refleet.common.delta import Encoder, Input
from refleet.common.digest import tensor_digest
from refleet.common.limits import MIB
from refleet.common.types import Manifest, TensorEntry, TensorSpec


@dataclass(frozen=True, slots=True)
class Decoder:
    """`decode` takes any bytes. `repair` makes checksums right again, so that what they guard is reached, too.

    `words` are what texts of this format are made of. `memory_bytes`: what a case may take at most.
    """

    name: str
    decode: Callable[[bytes], object]
    seeds: Sequence[bytes]
    words: Sequence[bytes] = ()
    repair: Callable[[bytes], bytes] | None = None
    memory_bytes: int = 4 * MIB


_SIZES = {"a": 900, "b": 64, "c": 5000}


def two_versions() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:  # type: ignore[type-arg]
    """Two versions of a few tensors, as bytes."""
    random = np.random.default_rng(5)
    before = {
        name: random.integers(0, 256, size, dtype=np.uint8) for name, size in (("a", 900), ("b", 64), ("c", 5000))
    }
    after = {name: data.copy() for name, data in before.items()}
    for data in after.values():
        data[::37] += 1
    return before, after


def manifest_of(tensors: dict[str, np.ndarray]) -> Manifest:  # type: ignore[type-arg]
    return Manifest.of(TensorEntry(TensorSpec(n, "U8", (d.size,)), tensor_digest(d.data)) for n, d in tensors.items())


def body_between() -> bytes:
    before, after = two_versions()
    encoder = Encoder(Input("U8", after[name], before[name], at) for at, name in enumerate(sorted(before)))
    return b"".join(bytes(chunk) for chunk in encoder.chunks())
