"""Rebuild a version in the store and verify all of it, with the engine untouched.

Order of checks: the target's manifest against the signed fingerprint and the engine's own names, dtypes and shapes
first, with only the index fetched; then every chunk against its digest, every rebuilt tensor against its digest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from ..common import codec
from ..common.crashpoint import crash_point
from ..common.delta import Bytes, Slot, as_bytes, chunks_of, cores, in_order, slots, target_manifest
from ..common.errors import DamagedTensor, DigestMismatch, StreamGap, WrongBase
from ..common.limits import LIMITS
from ..common.store import Store
from ..common.stream import Stream
from ..common.types import Block, Manifest, PayloadRef
from .receive import Body, fetch_index
from .state import damaged


def stage(
    stream: Stream,
    store: Store,
    ref: PayloadRef,
    *,
    check: Callable[[Manifest], None],
    on_progress: Callable[[int, int], None],
    on_received: Callable[[], None],
) -> Manifest:
    """Fetch the payload `ref` and put its version into `store`; returns the version's manifest.

    Args: `check` raises NotRefittable before payload bytes move; `on_progress(received, expected)` in bytes, from
    another thread; `on_received` is called when every needed chunk arrived with the right checksum.
    Raises: StreamGap when the payload is gone or does not carry what this worker lacks, DigestMismatch,
    MalformedRecord, LimitExceeded, WrongBase, NotRefittable, StoreFull, StreamError.
    """
    index = fetch_index(stream, ref)
    base = store.manifest(index.base) if index.base is not None else None
    manifest = target_manifest(index, base)
    if manifest.fingerprint != ref.target:
        raise DigestMismatch("the delta's index does not lead to the announced version")
    check(manifest)
    wanted = {entry.digest for entry in store.missing(manifest)}
    needed = _needed(slots(index), wanted)
    lost = wanted - {slot.tensor.digest for slot in needed}
    if lost:
        raise StreamGap(f"payload {ref.payload_id} does not carry {len(lost)} tensors that are missing here")
    numbers = chunks_of(needed, index.chunk_bytes)
    expected = sum(min(index.chunk_bytes, index.body_bytes - n * index.chunk_bytes) for n in numbers) + ref.index_bytes
    received = ref.index_bytes
    on_progress(received, expected)

    def arrived(size: int) -> None:
        nonlocal received
        received += size
        on_progress(received, expected)
        crash_point("worker.received-chunk")

    with Body(stream, ref, index, numbers, on_bytes=arrived) as body, store.writing():
        with store.batch() as batch:
            decoded = _decode(store, base, needed, body)
            for slot in needed:
                batch.add((out.data for out in islice(decoded, len(slot.tensor.blocks))), expect=slot.tensor.digest)
        on_received()
        store.put_manifest(manifest)
    return manifest


def _needed(found: list[Slot], wanted: set[bytes]) -> list[Slot]:
    """The slots of wanted digests, each digest once."""
    left = set(wanted)
    needed = []
    for slot in found:
        if slot.tensor.digest in left:
            left.remove(slot.tensor.digest)
            needed.append(slot)
    return needed


def _decode(store: Store, base: Manifest | None, needed: list[Slot], body: Body) -> Iterator[Bytes]:
    """The decoded blocks of `needed`, in order; each is valid until the next is taken."""
    threads = cores()
    # one buffer for each block that may be in flight, touched once and reused: fresh pages cost more than the decoding
    ring = [np.empty(LIMITS.block_bytes, np.uint8) for _ in range(threads + 2)]

    def tasks() -> Iterator[tuple[Block, memoryview, Bytes, Bytes | None, str]]:
        turn = 0
        for slot in needed:
            spec, at = slot.tensor.spec, slot.offset
            before = _base_bytes(store, base, slot) if any(_uses_base(b) for b in slot.tensor.blocks) else None
            for n, block in enumerate(slot.tensor.blocks):
                start = n * LIMITS.block_bytes
                out = ring[turn][: min(LIMITS.block_bytes, spec.size_bytes - start)]
                turn = (turn + 1) % len(ring)
                piece = before[start : start + out.size] if before is not None and _uses_base(block) else None
                yield block, body.read(at, block.encoded_bytes), out, piece, spec.dtype
                at += block.encoded_bytes

    def decode(task: tuple[Block, memoryview, Bytes, Bytes | None, str]) -> Bytes:
        block, encoded, out, piece, dtype = task
        codec.decode_block(block.codec, encoded, out, piece, dtype=dtype)
        return out

    return in_order(decode, tasks(), threads=threads)


def _uses_base(block: Block) -> bool:
    return block.codec == codec.SPARSE


def _base_bytes(store: Store, base: Manifest | None, slot: Slot) -> Bytes:
    """The base tensor's bytes. They are hashed here: a delta on top of bit rot would blame the publisher."""
    entry = base.by_name.get(slot.tensor.spec.name) if base else None
    if entry is None or entry.spec != slot.tensor.spec:
        raise WrongBase(f"the delta builds on a tensor {slot.tensor.spec} that its base does not have")
    try:
        return as_bytes(store.read(entry.digest, verify=True))
    except DamagedTensor as error:
        raise damaged(entry.spec.name, error) from error
