"""Rebuild a version and verify all of it, with the engine untouched.

Order of checks: the target's manifest against the signed fingerprint and the engine's own names, dtypes and shapes
first, with only the index fetched; then every chunk and every rebuilt tensor against its digest.

A delta is kept as it came, and its tensors are rebuilt in memory: the disk takes what changed. Only what bit rot took
is written whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..common.crashpoint import crash_point
from ..common.delta import as_bytes, target_manifest
from ..common.deltas import StoredDelta
from ..common.digest import matching
from ..common.errors import DamagedTensor, DigestMismatch, StreamGap
from ..common.layout import Bytes, Placed, chunks_of, decode, in_body_order, placed
from ..common.store import Store
from ..common.stream import Stream
from ..common.threads import cores, in_order
from ..common.types import DeltaTensor, Manifest, PayloadRef
from .early import Arrival
from .receive import Body, fetch_index
from .state import damaged

#: where less than this share of a payload's body is lacking here (bit rot), only that is fetched, and written whole
_PART = 0.5
#: a block, and its encoded bytes
Encoded = tuple[Placed, bytearray]


def stage(
    stream: Stream,
    store: Store,
    ref: PayloadRef,
    *,
    early: Arrival | None,
    check: Callable[[Manifest], None],
    on_progress: Callable[[int, int], None],
    on_received: Callable[[], None],
) -> Manifest:
    """Fetch the payload `ref` and put its version into `store`; returns the version's manifest.

    Args: `early` may hold chunks that came before the release; `check` raises NotRefittable before any are fetched;
    `on_progress(received, expected)` in bytes, from another thread; `on_received` is called when every needed chunk
    arrived with the right checksum.
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
    order = in_body_order(index.tensors)
    carried = {tensor.digest for tensor in order}
    lost = wanted - carried
    if lost:
        raise StreamGap(f"payload {ref.payload_id} does not carry {len(lost)} tensors that are missing here")
    places = list(placed((tensor.spec.size_bytes for tensor in order), index.blocks))
    needed = [p for p in places if any(order[span.number].digest in wanted for span in p.spans)]
    partly = not order or _encoded_bytes(needed) < _encoded_bytes(places) * _PART
    needed = needed if partly else places
    numbers = chunks_of(needed, index.chunk_bytes)
    expected = sum(min(index.chunk_bytes, index.body_bytes - n * index.chunk_bytes) for n in numbers) + ref.index_bytes
    received = ref.index_bytes
    on_progress(received, expected)

    def arrived(chunk: memoryview) -> None:
        nonlocal received
        received += len(chunk)
        on_progress(received, expected)
        crash_point("worker.received-chunk")

    bases = _Bases(store, base, order)
    if partly:
        with Body(stream, ref, index, numbers, early=early, on_chunk=arrived) as body, store.writing():
            _store_lacking(store, order, needed, wanted, bases, body)
            on_received()
            store.put_manifest(manifest)
        return manifest
    with store.delta() as delta:

        def keep(chunk: memoryview) -> None:
            delta.write(chunk)
            arrived(chunk)

        with Body(stream, ref, index, numbers, early=early, on_chunk=keep) as body:
            found, fresh = _rebuild(store, order, needed, bases, body, early.decoded() if early else {})
            body.finish()
        on_received()
        right = matching((found[number].data for number in fresh), (order[number].digest for number in fresh))
        bases.verify([order[number] for number, good in zip(fresh, right, strict=True) if not good])
        delta.commit(StoredDelta.of(index, order, base))
        store.memory.put({tensor.digest: data for tensor, data in zip(order, found, strict=True)})
        store.put_manifest(manifest)
    return manifest


def _encoded_bytes(places: list[Placed]) -> int:
    return sum(place.block.encoded_bytes for place in places)


class _Bases:
    """The base's tensors, by number in body order."""

    def __init__(self, store: Store, base: Manifest | None, order: list[DeltaTensor]):
        self._store, self._base, self._order = store, base, order
        self._found: dict[int, Bytes] = {}

    def __call__(self, number: int) -> Bytes:
        if number not in self._found:
            name = self._order[number].spec.name
            assert self._base is not None
            try:
                self._found[number] = as_bytes(self._store.read(self._base.by_name[name].digest, verify=False))
            except DamagedTensor as error:
                raise damaged(name, error) from error
        return self._found[number]

    def verify(self, wrong: list[DeltaTensor]) -> None:
        """These came out wrong: blame the base if bit rot got at it, else the payload.

        Raises: DamagedTensor, DigestMismatch; nothing if there are none.
        """
        for tensor in wrong:
            if tensor.based and self._base is not None:
                try:
                    self._store.recheck(self._base.by_name[tensor.spec.name].digest)
                except DamagedTensor as error:
                    raise damaged(tensor.spec.name, error) from error
        if wrong:
            raise DigestMismatch(f"tensor {wrong[0].spec.name!r} does not have the digest that the publisher signed")


def _rebuild(
    store: Store, order: list[DeltaTensor], places: list[Placed], bases: _Bases, body: Body, early: dict[bytes, Bytes]
) -> tuple[list[Bytes], list[int]]:
    """All carried tensors, in memory, and the numbers of those that are not verified yet; the others came `early`."""
    fresh = [number for number, tensor in enumerate(order) if tensor.digest not in early]
    taken = dict(zip(fresh, store.memory.take_all(order[number].spec.size_bytes for number in fresh), strict=True))
    # a block may hold parts of both: nobody writes into those that are verified
    spare: dict[int, Bytes] = {}

    def out(number: int) -> Bytes:
        if number in taken:
            return taken[number]
        return spare.setdefault(number, np.empty(order[number].spec.size_bytes, np.uint8))

    lacking = [place for place in places if any(span.number in taken for span in place.spans)]
    for _ in in_order(_decoder(order, bases, out), _tasks(order, lacking, bases, body), threads=cores()):
        pass
    return [taken[n] if n in taken else early[tensor.digest] for n, tensor in enumerate(order)], fresh


def _store_lacking(
    store: Store, order: list[DeltaTensor], places: list[Placed], wanted: set[bytes], bases: _Bases, body: Body
) -> None:
    """Every wanted tensor into a pack, each as soon as its last block was decoded."""
    left = set(wanted)
    last = {span.number: place for place in places for span in place.spans}
    outs: dict[int, Bytes] = {}

    def out(number: int) -> Bytes:
        return outs[number]

    def tasks() -> Iterator[Encoded]:
        for place, encoded in _tasks(order, places, bases, body):
            for span in place.spans:
                if span.number not in outs:
                    outs[span.number] = store.memory.take(order[span.number].spec.size_bytes)
            yield place, encoded

    with store.batch() as batch:
        for place in in_order(_decoder(order, bases, out), tasks(), threads=cores()):
            for span in place.spans:
                if last[span.number] is not place:
                    continue
                tensor, data = order[span.number], outs.pop(span.number)
                if tensor.digest in left:
                    left.remove(tensor.digest)
                    try:
                        batch.add((data.data,), expect=tensor.digest)
                    except DigestMismatch:
                        bases.verify([tensor])


def _decoder(order: list[DeltaTensor], bases: _Bases, out: Callable[[int], Bytes]) -> Callable[[Encoded], Placed]:
    def run(task: Encoded) -> Placed:
        place, encoded = task
        tensor = order[place.spans[0].number]
        decode(place, encoded, dtype=tensor.spec.dtype, base=bases if tensor.based else None, out=out)
        return place

    return run


def _tasks(order: list[DeltaTensor], places: list[Placed], bases: _Bases, body: Body) -> Iterator[Encoded]:
    for place in places:
        for span in place.spans:
            tensor = order[span.number]
            if tensor.based:
                bases(span.number)  # here, in one thread: the decoders only look it up
        yield place, body.read(place.offset, place.block.encoded_bytes)
