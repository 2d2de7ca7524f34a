"""What `planted.py` puts in the place of production code: each function makes a broken one from the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from refleet.common.memory_stream import MemoryStream
from refleet.common.messages import Evidence, Verified
from refleet.common.store import Store
from refleet.publisher.publish import Publisher
from refleet.publisher.published import Published
from refleet.worker import follow, stage
from refleet.worker.follow import Follower
from refleet.worker.gate import Gate, Switch
from refleet.worker.pursue import Pursuit


class Anything(bytes):
    """Equal to every digest."""

    def __eq__(self, _other: object) -> bool:
        return True

    def __ne__(self, _other: object) -> bool:
        return False

    __hash__ = bytes.__hash__


def always(value: Any) -> Callable[[Any], Any]:
    """A function that does nothing but return `value`."""
    return lambda _original: lambda *_args, **_options: value


@contextmanager
def unguarded(gate: Gate, *, timeout_s: float | None = None) -> Iterator[Switch]:
    switch = Switch(gate)
    gate._switch = switch
    try:
        yield switch
    finally:
        gate._open(switch, 0.0)


def any_order(judge: Any) -> Any:
    def run(follower: Follower, log_id: Any, data: bytes) -> Any:
        accepted, follower.accepted = follower.accepted, None
        try:
            found = judge(follower, log_id, data)
        finally:
            follower.accepted = accepted
        return None if found == accepted else found

    return run


def first_of_epoch_forgotten(judge: Any) -> Any:
    def run(follower: Follower, log_id: Any, data: bytes) -> Any:
        high = follower.accepted
        if high is not None:
            release = follow.wire.unpack(follow.open_envelope(data, follower._trust).payload, follow.Release)
            follower.accepted = replace(high, publisher=release.publisher)
        try:
            return judge(follower, log_id, data)
        finally:
            follower.accepted = high

    return run


def unsynced(put: Any) -> Any:
    return lambda store, name, data, sync=True: put(store, name, data, sync=False)


def unsynced_all(put: Any) -> Any:
    def run(store: Store, records: Any) -> None:
        for name, data in records.items():
            store.put_record(name, data, sync=False)

    return run


def ack_early(ack: Any) -> Any:
    def run(pursuit: Pursuit, version: Any, evidence: Evidence, **options: Any) -> None:
        ack(pursuit, version, Evidence.SERVING if evidence == Evidence.STAGED else evidence, **options)

    return run


def all_is_well(_answer: Any) -> Any:
    def run(_engine: Any, _store: Any, ask: Any, serving: Any, holds: Any, **_options: Any) -> Any:
        return Verified(ask.nonce, serving is not None, len(holds.tensors) if holds else 0, None, None, "", None), None

    return run


def second_chunk_forgotten(put: Any) -> Any:
    def run(outgoing: Any, data: Any) -> None:
        if outgoing._number == 1:
            outgoing._number += 1
        else:
            put(outgoing, data)

    return run


@contextmanager
def open_fence(stream: MemoryStream, _lease: Any) -> Iterator[Any]:
    with stream._open() as server:
        yield server


def target_only(reasons: Any) -> Any:
    return lambda *args, **options: dict(list(reasons(*args, **options).items())[:1])


def deltas_as_remembered(collect: Any) -> Any:
    """As `Store.collect` was once: it removed deltas that another process had added since its last look."""

    def run(store: Store, *args: Any, **options: Any) -> Any:
        look, looks = store._derived.refresh, []

        def refresh(**how: Any) -> bool:
            looks.append(how)
            return False if len(looks) == 1 else look(**how)

        with patch.object(store._derived, "refresh", refresh):
            return collect(store, *args, **options)

    return run


def fixed_base(call: Any) -> Any:
    def run(bases: Any, number: int) -> Any:
        found = call(bases, number)
        spec = bases._order[number].spec
        held = bases._store.manifest(bases._store.manifests()[0]).by_name.get(spec.name)
        return stage.as_bytes(bases._store.read(held.digest, verify=False)) if held and held.spec == spec else found

    return run


def mantissa_only(changed: Any) -> Any:
    return lambda new, old: changed(new & 0x7F, old & 0x7F)


def old_release_again(_rollback: Any) -> Any:
    def run(publisher: Publisher, to: str, **_options: Any) -> Published:
        with publisher._exclusive("rollback"):
            book = publisher.book
            release = next(each for each in book.releases() if each.version == to)
            book.save_release(release, book.release_bytes(release), None)
            publisher.stream.append(publisher.claim.lease(), release.seq, book.release_bytes(release), ttl_s=30.0)
            return Published(release, publisher.stream)

    return run
