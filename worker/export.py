"""Take one version out of a worker's state folder, which may be in use, and put it into an engine of our own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..common import wire
from ..common.errors import DamagedTensor, ProbeMismatch, RefitFailed, UnknownVersion, UsageError
from ..common.messages import Serving
from ..common.store import Store
from ..common.types import Manifest
from .engine import Engine, named_few
from .prove import first_difference
from .state import STATE, WorkerState, damaged, probe_name, shared_by

_WHERE = "name the --state folder of a worker"
_PREFIX = re.compile(r"[0-9a-f]{8,64}\Z")


@dataclass(frozen=True, slots=True)
class Taken:
    """A version of the store, whole and verified. Its bytes stay, whatever retention does meanwhile.

    `id`: its version id, or "" where only the fingerprint is known.
    """

    id: str
    serving: Serving
    manifest: Manifest
    tensors: dict[str, memoryview]
    restructure: bool = False

    def read(self, name: str) -> memoryview:
        return self.tensors[name]


@contextmanager
def opened(state_dir: Path) -> Iterator[Store]:
    """The store of a worker, for reading beside it. Raises: UsageError when there is none."""
    if not (state_dir / "id").is_file():
        raise UsageError(
            f"there is no worker's state folder at {state_dir}", next="name the --state folder of a worker"
        )
    with Store(state_dir) as own:
        shared = shared_by(own)
    if shared and not (shared / "id").is_file():
        raise UsageError(
            f"the worker shares the folder {shared}, which is not here", next="run this where the worker runs"
        )
    with Store(state_dir, shared=shared) as store:
        yield store


def take(store: Store, wanted: str | None) -> Taken:
    """The version with this id, or with a fingerprint that begins so; None: the one that the worker serves.

    Raises: UnknownVersion naming those that are there, DamagedTensor, UsageError for a folder of something else.
    """
    data = store.record(STATE)
    if data is None:
        raise UsageError(f"{store.root} is no worker's state folder", next=_WHERE)
    state = wire.unpack(data, WorkerState)
    named = {state.release.version: state.release.fingerprint} if state.release else {}
    if state.serving:
        named[state.serving.version] = state.serving.fingerprint
    fingerprint = _picked(store, state, named, wanted)
    known = next((name for name, held in named.items() if held == fingerprint), "")
    manifest = store.manifest(fingerprint)
    tensors = {}
    for entry in manifest.tensors:
        try:
            tensors[entry.spec.name] = store.read(entry.digest, verify=True)
        except DamagedTensor as error:
            raise damaged(entry.spec.name, error) from error
    serving = Serving(known or fingerprint.hex()[:16], 0, 0, fingerprint)
    return Taken(known, serving, manifest, tensors)


def _picked(store: Store, state: WorkerState, named: dict[str, bytes], wanted: str | None) -> bytes:
    if wanted is None:
        if state.serving is None:
            raise UnknownVersion(f"the worker {state.worker} serves nothing yet", next="name a version with --version")
        return state.serving.fingerprint
    held = store.manifests()
    if wanted in named:
        if named[wanted] in held:
            return named[wanted]
        raise UnknownVersion(f"version {wanted!r} is not complete in {store.root}", next="wait until it is served")
    found = [fingerprint for fingerprint in held if _PREFIX.match(wanted) and fingerprint.hex().startswith(wanted)]
    if len(found) == 1:
        return found[0]
    there = [*(name for name, fingerprint in named.items() if fingerprint in held)]
    there += [fingerprint.hex()[:16] for fingerprint in held if fingerprint not in named.values()]
    what = f"{len(found)} versions begin with {wanted!r}" if found else f"the worker has no version {wanted!r}"
    raise UnknownVersion(
        what, about=str(store.root),
        next=f"choose one of {named_few(there, at_most=20) or 'none'}; versions served before are known by the first "
        "digits of their fingerprint",
    )  # fmt: skip


def put_in(engine: Engine, taken: Taken, store: Store) -> None:
    """Put the version in and prove it, as a switch of a worker does.

    Raises: NotRefittable, RefitFailed, ProbeMismatch.
    """
    engine.check(taken.manifest)
    names = frozenset(taken.manifest.by_name)
    proven = engine.prepare(taken, names)
    if proven:
        _prove(engine, taken)
    engine.apply(taken, names)
    if not proven:
        _prove(engine, taken)
    probe = engine.probe()
    before = store.record(probe_name(engine.build, taken.manifest.fingerprint))
    if before is not None and before != probe:
        raise ProbeMismatch("the engine answers its probe differently than it did in the worker, at the same version")


def _prove(engine: Engine, taken: Taken) -> None:
    name = first_difference(engine, taken.manifest)
    if name is not None:
        raise RefitFailed(f"after the refit the engine holds other bytes in {name!r} than it was given", tensor=name)
