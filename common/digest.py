"""Digests: BLAKE3 of what is signed or sent, and a faster one of tensors, which names their content everywhere.

    chunks, indexes, records, fingerprints    BLAKE3-256: nobody can make other bytes with the same digest
    tensors    BLAKE3-256 of (label, XXH3-128 of each 64 KiB leaf, number of bytes): at the speed of reading memory

Tensors are hashed over and over on both sides to find what went wrong by accident: a flipped bit, a wrong base, a bad
write. XXH3-128 misses none of these with any likelihood that matters (2**-128 a leaf). It is no proof against somebody
who makes tensors to collide; what keeps those out is the publisher's signature over BLAKE3 of every byte sent, and on
demand `proof_of` (`refleet verify --deep`). Leaves make it the same on a GPU, where they are hashed side by side.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import xxhash
from blake3 import blake3

from .kernels import leaves
from .threads import cores, in_order

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .types import Manifest, TensorSpec

LEAF_BYTES = 64 << 10

TENSOR_LABEL = b"refleet tensor 1\0"
#: as much as is hashed in one go in a thread
_TASK_BYTES, _TASK_TENSORS = 1 << 20, 256


def digest_of(*parts: Buffer) -> bytes:
    """BLAKE3-256 of the concatenated bytes."""
    hasher = blake3(max_threads=blake3.AUTO)
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def blake3_of(blocks: Iterable[Buffer]) -> bytes:
    """BLAKE3-256 of a stream of blocks, never holding more than one."""
    hasher = blake3(max_threads=blake3.AUTO)
    for block in blocks:
        hasher.update(block)
    return hasher.digest()


class TensorHasher:
    """The digest of a tensor whose bytes come in blocks of any size."""

    def __init__(self) -> None:
        self._hasher = blake3(TENSOR_LABEL)
        self._rest = bytearray()  # less than a leaf
        self._size = 0

    def update(self, block: Buffer) -> None:
        """The next bytes; they may be reused when this returns."""
        view = memoryview(block)
        if not view.nbytes:
            return  # `cast` refuses them
        view = view.cast("B")
        self._size += len(view)
        if self._rest:
            lacking = LEAF_BYTES - len(self._rest)
            self._rest += view[:lacking]
            view = view[lacking:]
            if len(self._rest) == LEAF_BYTES:
                self._hasher.update(xxhash.xxh3_128_digest(self._rest))
                self._rest.clear()
        whole = len(view) // LEAF_BYTES * LEAF_BYTES
        if whole:
            self._hasher.update(leaves(view[:whole]))
        self._rest += view[whole:]

    def digest(self) -> bytes:
        """32 bytes; called once, at the end."""
        if self._rest:
            self._hasher.update(xxhash.xxh3_128_digest(self._rest))
        self._hasher.update(struct.pack("<Q", self._size))
        return self._hasher.digest()


def tensor_digest(*blocks: Buffer) -> bytes:
    """The digest of a tensor: what names its content in manifests and stores."""
    return tensor_digest_of(blocks)


def tensor_digest_of(blocks: Iterable[Buffer]) -> bytes:
    """The same of a stream of blocks, never holding more than one."""
    hasher = TensorHasher()
    for block in blocks:
        hasher.update(block)
    return hasher.digest()


def matching(tensors: Iterable[Buffer], digests: Iterable[bytes]) -> list[bool]:
    """Which of the tensors have their digest, hashed in threads."""

    def right(pairs: list[tuple[Buffer, bytes]]) -> list[bool]:
        return [tensor_digest(tensor) == digest for tensor, digest in pairs]

    tasks = _worth_a_thread(zip(tensors, digests, strict=True))
    return [each for found in in_order(right, tasks, threads=cores()) for each in found]


def _worth_a_thread(pairs: Iterable[tuple[Buffer, bytes]]) -> Iterator[list[tuple[Buffer, bytes]]]:
    """Small tensors together: handing one over takes longer than to hash it."""
    task: list[tuple[Buffer, bytes]] = []
    size = 0
    for pair in pairs:
        task.append(pair)
        size += memoryview(pair[0]).nbytes
        if size >= _TASK_BYTES or len(task) == _TASK_TENSORS:
            yield task
            task, size = [], 0
    if task:
        yield task


def fingerprint(manifest: Manifest) -> bytes:
    """Digest of a whole version: BLAKE3 over the sorted list of (name, dtype, shape, tensor digest).

    Every field is length-prefixed, so no two different manifests share an input.
    """
    return _combined(b"refleet version 1\0", ((entry.spec, entry.digest) for entry in manifest.tensors))


def proof_of(tensors: Iterable[tuple[TensorSpec, bytes]]) -> bytes:
    """The content of a whole version, such that nobody can make another with the same: tensors with their `blake3_of`.

    In the order of a manifest. Laid out as in `fingerprint`, which combines the tensor digests.
    """
    return _combined(b"refleet proof 1\0", tensors)


def _combined(label: bytes, tensors: Iterable[tuple[TensorSpec, bytes]]) -> bytes:
    hasher = blake3(label)
    for spec, digest in tensors:
        name, dtype, shape = spec.name.encode(), spec.dtype.encode(), spec.shape
        hasher.update(struct.pack(f"<I{len(name)}sB{len(dtype)}sB{len(shape)}Q32s", len(name), name, len(dtype), dtype,
                                  len(shape), *shape, digest))  # fmt: skip
    return hasher.digest()
