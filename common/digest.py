"""BLAKE3 digests of tensors, chunks and versions."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

from blake3 import blake3

from .threads import cores, in_order

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .types import Manifest


def digest_of(*parts: Buffer) -> bytes:
    """BLAKE3-256 of the concatenated bytes."""
    hasher = blake3(max_threads=blake3.AUTO)
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def matching(tensors: Iterable[Buffer], digests: Iterable[bytes]) -> list[bool]:
    """Which of the tensors have their digest, hashed in threads."""
    pairs = zip(tensors, digests, strict=True)
    return list(in_order(lambda pair: digest_of(pair[0]) == pair[1], pairs, threads=cores()))


def digest_blocks(blocks: Iterable[Buffer]) -> bytes:
    """BLAKE3-256 of a stream of blocks, never holding more than one."""
    hasher = blake3(max_threads=blake3.AUTO)
    for block in blocks:
        hasher.update(block)
    return hasher.digest()


def fingerprint(manifest: Manifest) -> bytes:
    """Digest of a whole version: BLAKE3 over the sorted list of (name, dtype, shape, tensor digest).

    Every field is length-prefixed, so no two different manifests share an input.
    """
    hasher = blake3(b"refleet version 1\0")
    for entry in manifest.tensors:
        name, dtype, shape = entry.spec.name.encode(), entry.spec.dtype.encode(), entry.spec.shape
        hasher.update(struct.pack(f"<I{len(name)}sB{len(dtype)}sB{len(shape)}Q32s", len(name), name, len(dtype), dtype,
                                  len(shape), *shape, entry.digest))  # fmt: skip
    return hasher.digest()
