"""Bugs that are planted on purpose, at least one for every invariant: a simulator that misses one is blind.

Each breaks one mechanism of the production code, in memory, for as long as `planted` lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from refleet.common.memory_stream import MemoryStream
from refleet.common.store import Store
from refleet.publisher import claim, compare, payloads, publish, source_file
from refleet.publisher.fleet import Fleet
from refleet.worker import apply, follow, pursue, receive, stage, staging
from refleet.worker.board import Board
from refleet.worker.follow import Follower, News
from refleet.worker.gate import Gate
from refleet.worker.pursue import Pursuit
from refleet.worker.staging import Staging

from .breaks import (
    Anything,
    ack_early,
    all_is_well,
    always,
    any_order,
    deltas_as_remembered,
    first_of_epoch_forgotten,
    fixed_base,
    mantissa_only,
    old_release_again,
    open_fence,
    second_chunk_forgotten,
    target_only,
    unguarded,
    unsynced,
    unsynced_all,
)
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


PLANTED = (
    Bug("I1", "a switch does not wait for requests in flight", ((Gate, "switching", lambda _: unguarded),)),
    Bug(
        "I2",
        "a delta is decoded against whatever version is at hand, unchecked",
        (
            (stage._Bases, "__call__", fixed_base),
            (stage, "matching", lambda _: lambda data, _d: [True for _ in data]),
        ),
    ),
    Bug(
        "I3",
        "chunks and tensors are not hashed before the engine gets them",
        (
            (receive, "digest_of", lambda original: lambda data: Anything(original(data))),
            (stage, "matching", lambda _: lambda data, _d: [True for _ in data]),
        ),
    ),
    Bug(
        "I3",
        "what is on the disk is not hashed again before it is applied",
        ((staging, "verify", always(None)),),
        ("disk_rotted",),
    ),
    Bug("I4", "STAGED is told as SERVING", ((Pursuit, "_ack", ack_early),)),
    Bug(
        "I4",
        "verify says that all is right without reading back",
        ((pursue, "answer", all_is_well),),
        ("engine_rotted", "verify"),
    ),
    Bug("I5", "a failed apply is not undone", ((apply, "_restore", always(None)),)),
    Bug("I6", "a worker accepts releases in any order", ((Follower, "_judge", any_order),)),
    Bug("I7", "a rollback writes the old release again", ((publish.Publisher, "rollback", old_release_again),)),
    Bug(
        "I8",
        "probes are not compared with the first time",
        ((apply, "prove_probe", lambda _: lambda e, *_: e.probe()),),
        ("engine.lies-probe",),
    ),
    Bug("I9", "signatures are not checked", ((follow, "open_envelope", lambda o: lambda data, _trust: o(data, None)),)),
    Bug("I10", "what was acknowledged is not acknowledged again", ((Pursuit, "acknowledge_again", always(None)),)),
    Bug("I11", "a worker that lacks bytes does not ask for them", ((Staging, "_ask", always(None)),)),
    Bug("I12", "a reader does not notice that the server lost data", ((Follower, "_after_silence", always(News())),)),
    Bug(
        "I13",
        "a worker believes a second publisher within an epoch",
        ((Follower, "_judge", first_of_epoch_forgotten),),
        ("usurped",),
    ),
    Bug("I13", "the server's fence is open", ((MemoryStream, "_fence", lambda _: open_fence),)),
    Bug(
        "I14",
        "a claim does not ask the workers",
        ((claim, "fleet", lambda _: lambda s: Fleet(s.model, None, ())),),
        ("server_empty", "take_over"),
    ),
    Bug("I15", "a chunk of a payload is forgotten", ((payloads.Outgoing, "_put", second_chunk_forgotten),)),
    Bug(
        "I16",
        "nobody looks whether the checkpoint changed",
        ((source_file.SourceFile, "_compare", always(None)),),
        ("published_while_written",),
    ),
    Bug(
        "I17",
        "a worker fetches what its engine can't hold",
        ((staging, "partial", lambda _: lambda *_a, **_o: lambda _m: None),),
        ("published_other",),
    ),
    Bug("I17", "a change of structure is not told", ((publish, "restructures", always(False)),), ("published_other",)),
    Bug("I18", "changes of a sign bit are overlooked", ((compare, "changed", mantissa_only),)),
    Bug("I19", "a wrong chunk is read again without end", ((receive, "_READS", lambda _: 10**9),), ("chunk_rotted",)),
    Bug("I19", "payloads are never dropped", ((payloads.Payloads, "clean", always(0)),)),
    Bug("I20", "silence is not told", ((Board, "silent", lambda _: property(lambda _board: False)),)),
    Bug("I23", "the rollback window is not kept", ((publish, "reasons_to_keep", target_only),)),
    Bug(
        "I23",
        "retention does not look at deltas that others added",
        ((Store, "collect", deltas_as_remembered),),
        ("disk_slow",),
    ),
    Bug(
        "I13",
        "an epoch that was claimed twice is kept",
        ((claim.Claim, "_is_of_another_store", always(False)),),
        ("usurped",),
    ),
    Bug("I24", "a worker's record is not synced", ((Store, "put_record", unsynced),)),
    Bug("I24", "a release is not synced", ((Store, "put_records", unsynced_all),)),
)


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
