"""Bugs that are planted on purpose, at least one for every invariant: a simulator that misses one is blind.

Each breaks one mechanism of the production code, in memory, for as long as `planted` lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from refleet.common.memory_stream import MemoryStream
from refleet.common.messages import Evidence, Verified
from refleet.common.store import Store
from refleet.publisher import claim, compare, payloads, publish, source_file
from refleet.publisher.fleet import Fleet
from refleet.worker import apply, follow, pursue, receive, stage, staging
from refleet.worker.board import Board
from refleet.worker.follow import Follower, News
from refleet.worker.gate import Gate, Switch
from refleet.worker.pursue import Pursuit

from .run import run_seed
from .seams import installed

#: (owner, name of what is replaced, what makes the replacement from the original)
Break = tuple[Any, str, Callable[[Any], Any]]


@dataclass(frozen=True)
class Bug:
    invariant: str
    name: str
    breaks: tuple[Break, ...]
    focus: tuple[str, ...] = ()  # events and faults without which it can't show


class _Anything(bytes):
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
def _unguarded(gate: Gate, *, timeout_s: float | None = None) -> Iterator[Switch]:
    switch = Switch(gate)
    gate._switch = switch
    try:
        yield switch
    finally:
        gate._open(switch, 0.0)


def _any_order(judge: Any) -> Any:
    def run(follower: Follower, log_id: Any, data: bytes) -> Any:
        accepted, follower.accepted = follower.accepted, None
        try:
            found = judge(follower, log_id, data)
        finally:
            follower.accepted = accepted
        return None if found == accepted else found

    return run


def _first_of_epoch_forgotten(judge: Any) -> Any:
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


def _unsynced(put: Any) -> Any:
    return lambda store, name, data, sync=True: put(store, name, data, sync=False)


def _unsynced_all(put: Any) -> Any:
    def run(store: Store, records: Any) -> None:
        for name, data in records.items():
            store.put_record(name, data, sync=False)

    return run


def _ack_early(ack: Any) -> Any:
    def run(pursuit: Pursuit, version: Any, evidence: Evidence, **options: Any) -> None:
        ack(pursuit, version, Evidence.SERVING if evidence == Evidence.STAGED else evidence, **options)

    return run


def _all_is_well(_answer: Any) -> Any:
    def run(_engine: Any, _store: Any, ask: Any, serving: Any, holds: Any, **_options: Any) -> Any:
        return Verified(ask.nonce, serving is not None, len(holds.tensors) if holds else 0, None, None, "", None), None

    return run


def _second_chunk_forgotten(put: Any) -> Any:
    def run(outgoing: Any, data: Any) -> None:
        if outgoing._number == 1:
            outgoing._number += 1
        else:
            put(outgoing, data)

    return run


@contextmanager
def _open_fence(stream: MemoryStream, _lease: Any) -> Iterator[Any]:
    with stream._open() as server:
        yield server


def _target_only(reasons: Any) -> Any:
    return lambda *args, **options: dict(list(reasons(*args, **options).items())[:1])


def _deltas_as_remembered(collect: Any) -> Any:
    """As `Store.collect` was once: it removed deltas that another process had added since its last look."""

    def run(store: Store, *args: Any, **options: Any) -> Any:
        look, looks = store._derived.refresh, []

        def refresh(**how: Any) -> bool:
            looks.append(how)
            return False if len(looks) == 1 else look(**how)

        with patch.object(store._derived, "refresh", refresh):
            return collect(store, *args, **options)

    return run


def _fixed_base(call: Any) -> Any:
    def run(bases: Any, number: int) -> Any:
        found = call(bases, number)
        spec = bases._order[number].spec
        held = bases._store.manifest(bases._store.manifests()[0]).by_name.get(spec.name)
        return stage.as_bytes(bases._store.read(held.digest, verify=False)) if held and held.spec == spec else found

    return run


def _mantissa_only(changed: Any) -> Any:
    return lambda new, old: changed(new & 0x7F, old & 0x7F)


PLANTED = (
    Bug("I1", "a switch does not wait for requests in flight", ((Gate, "switching", lambda _: _unguarded),)),
    Bug("I2", "a delta is decoded against whatever version is at hand, unchecked", (
        (stage._Bases, "__call__", _fixed_base), (stage, "matching", lambda _: lambda data, _d: [True for _ in data]),
    )),
    Bug("I3", "chunks and tensors are not hashed before the engine gets them", (
        (receive, "digest_of", lambda original: lambda data: _Anything(original(data))),
        (stage, "matching", lambda _: lambda data, _d: [True for _ in data]),
    )),
    Bug("I3", "what is on the disk is not hashed again before it is applied", ((staging, "verify", always(None)),),
        ("disk_rotted",)),
    Bug("I4", "STAGED is told as SERVING", ((Pursuit, "_ack", _ack_early),)),
    Bug("I4", "verify says that all is right without reading back", ((pursue, "answer", _all_is_well),),
        ("engine_rotted", "verify")),
    Bug("I5", "a failed apply is not undone", ((apply, "_restore", always(None)),)),
    Bug("I6", "a worker accepts releases in any order", ((Follower, "_judge", _any_order),)),
    Bug("I7", "a publisher numbers by its own count alone", ((publish, "max", lambda _: lambda own, _server: own),),
        ("forged_record",)),
    Bug("I8", "probes are not compared with the first time", ((apply, "prove_probe", lambda _: lambda e, *_: e.probe()),),
        ("engine.lies-probe",)),
    Bug("I9", "signatures are not checked", ((follow, "open_envelope", lambda o: lambda data, _trust: o(data, None)),)),
    Bug("I10", "what was acknowledged is not acknowledged again", ((Pursuit, "acknowledge_again", always(None)),)),
    Bug("I11", "a worker that lacks bytes does not ask for them", ((staging.Staging, "_ask", always(None)),)),
    Bug("I12", "a reader does not notice that the server lost data", ((Follower, "_after_silence", always(News())),)),
    Bug("I13", "a worker believes a second publisher within an epoch", ((Follower, "_judge", _first_of_epoch_forgotten),),
        ("usurped",)),
    Bug("I13", "the server's fence is open", ((MemoryStream, "_fence", lambda _: _open_fence),)),
    Bug("I14", "a claim does not ask the workers", ((claim, "fleet", lambda _: lambda s: Fleet(s.model, None, ())),),
        ("server_empty", "take_over")),
    Bug("I15", "a chunk of a payload is forgotten", ((payloads.Outgoing, "_put", _second_chunk_forgotten),)),
    Bug("I16", "nobody looks whether the checkpoint changed", ((source_file.SourceFile, "_compare", always(None)),),
        ("published_while_written",)),
    Bug("I17", "a worker fetches what its engine can't hold", ((staging, "partial", lambda _: lambda *_a, **_o: lambda _m: None),),
        ("published_other",)),
    Bug("I17", "a change of structure is not told", ((publish, "restructures", always(False)),)),
    Bug("I18", "changes of a sign bit are overlooked", ((compare, "changed", _mantissa_only),)),
    Bug("I19", "a wrong chunk is read again without end", ((receive, "_READS", lambda _: 10**9),)),
    Bug("I20", "silence is not told", ((Board, "silent", lambda _: property(lambda _board: False)),)),
    Bug("I23", "the rollback window is not kept", ((publish, "reasons_to_keep", _target_only),)),
    Bug("I23", "retention does not look at deltas that others added", ((Store, "collect", _deltas_as_remembered),),
        ("disk_slow",)),
    Bug("I24", "a worker's record is not synced", ((Store, "put_record", _unsynced),)),
    Bug("I24", "a release is not synced", ((Store, "put_records", _unsynced_all),)),
)  # fmt: skip


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The production code with this bug. Inside `installed()`."""
    with ExitStack() as broken:
        for owner, name, change in bug.breaks:
            broken.enter_context(patch.object(owner, name, change(getattr(owner, name, None)), create=True))
        yield


def hunt(bug: Bug, *, first: int = 0, seeds: int = 400) -> tuple[int | None, str]:
    """The first of so many seeds that fails with the bug and holds without it, and what it says."""
    with installed():
        for seed in range(first, first + seeds):
            with planted(bug):
                error = run_seed(seed, focus=bug.focus).error
            if error is not None and run_seed(seed, focus=bug.focus).error is None:
                return seed, error
    return None, ""
