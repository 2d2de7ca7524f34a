"""What a worker keeps on disk besides tensors, what it pursues, and a version that is ready to be applied."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..common import wire
from ..common.digest import digest_of
from ..common.errors import DamagedTensor, UsageError
from ..common.messages import Release, Serving
from ..common.shm import placed
from ..common.store import Store
from ..common.types import MODEL_NAME, WORKER_ID, Manifest, PayloadRef

STATE = "worker"
SHARE = "share"


@wire.record("worker-state")
@dataclass(frozen=True, slots=True)
class WorkerState:
    """The worker's record: a crash and a restart give exactly this. `recent` orders retention, newest last."""

    worker: str
    model: str
    release: Release | None  # the highest accepted: nothing at or below it is accepted again
    serving: Serving | None
    recent: tuple[bytes, ...]  # fingerprints served, each once
    restructure: bool  # a release accepted since the target was served last may have another structure

    def after(self, serving: Serving, *, base: bytes | None, keep: int) -> WorkerState:
        """The record once `serving` is served. `keep` versions stay in `recent`, and an older one that this was sent
        relative to: so may the next one be.
        """
        recent = (*(f for f in self.recent if f != serving.fingerprint), serving.fingerprint)
        kept = recent[-keep:]
        previous = self.serving.fingerprint if self.serving else None
        if base in recent and base not in (*kept, previous):
            kept = (base, *kept)
        reached = self.release is not None and self.release.order == serving.order
        return replace(self, serving=serving, recent=kept, restructure=self.restructure and not reached)


def load(store: Store, *, worker: str, model: str, folder: Path) -> WorkerState:
    """The record on disk, or a fresh one. Raises: UsageError when the folder belongs to another worker or model."""
    data = store.record(STATE)
    if data is None:
        return WorkerState(worker, model, None, None, (), False)
    state = wire.unpack(data, WorkerState)
    if (state.worker, state.model) != (worker, model):
        raise UsageError(
            f"the state folder {folder} belongs to worker {state.worker!r} of model {state.model!r}",
            about=f"worker {worker!r} of model {model!r}",
            serving="nothing: the worker did not start",
            next="give this worker a --state folder of its own",
        )
    return state


def default_id(state_dir: str | Path) -> str:
    """The id of a worker that was given none."""
    return f"{socket.gethostname()}-{Path(state_dir).absolute().name}"[:64]


@contextmanager
def owned_state(
    state_dir: str | Path, *, worker: str, model: str, share: str | Path | None = None
) -> Iterator[tuple[Store, WorkerState]]:
    """The worker's store and record, locked against other processes during the block.

    `share`: a folder in which the workers of a host keep the tensors of all versions once. Both may be `memory`.
    Raises: UsageError when a folder belongs to another worker, to another model or to a publisher, or for a bad id;
    StoreBusy when a live process uses it; StoreError; MalformedRecord.
    """
    if not WORKER_ID.match(worker):
        raise UsageError(f"worker id {worker!r} is not [A-Za-z0-9][A-Za-z0-9._-]{{0,63}}", next="choose one with --id")
    if not MODEL_NAME.match(model):
        raise UsageError(f"model name {model!r} is not [a-z0-9][a-z0-9._-]{{0,63}}", next="choose one with --model")
    folder = placed(state_dir, "worker", worker)
    shared = None if share is None else placed(share, "share").absolute() / model
    if shared and ((shared / "records").exists() or shared.resolve() == folder.resolve()):
        raise UsageError(
            f"{shared} is a store of its own: it can't be shared",
            next="name another folder with --share; it is made if it is not there",
        )
    with Store(folder, shared=shared) as store, store.lock("worker", holder=f"worker {worker}"):
        if store.record("publisher") is not None:
            raise UsageError(
                f"the state folder {folder} is a publisher's store", next="give the worker a --state folder of its own"
            )
        remembered = load(store, worker=worker, model=model, folder=folder)
        if shared_by(store) != shared:
            store.put_record(SHARE, os.fsencode(shared or ""))
        yield store, remembered


def shared_by(store: Store) -> Path | None:
    """Where the tensors of this worker's versions lie, if not in its own folder."""
    path = os.fsdecode(store.record(SHARE) or b"")
    return Path(path) if path else None


def save(store: Store, state: WorkerState) -> None:
    """Durable when this returns."""
    store.put_record(STATE, wire.pack(state))


def probe_name(build: str, fingerprint: bytes) -> str:
    """Name of the record that holds the outputs of this engine build at this version, seen first."""
    return f"probe-{digest_of(build.encode())[:8].hex()}-{fingerprint.hex()}"


def content_name(build: str, fingerprint: bytes) -> str:
    """Name of the record that holds what this engine build held as a whole at this version, seen first."""
    return f"content-{digest_of(build.encode())[:8].hex()}-{fingerprint.hex()}"


@dataclass(frozen=True, slots=True)
class Goal:
    """What to serve next, and the payload that was announced with it.

    `restructure`: names, dtypes or shapes may be others than the engine has.
    """

    serving: Serving
    payload: PayloadRef | None
    restructure: bool

    @classmethod
    def of(cls, state: WorkerState, release: Release) -> Goal:
        """The accepted `release`. If it was served here before, its structure was accepted then, and is again."""
        version = Serving(release.version, release.epoch, release.seq, release.fingerprint)
        return cls(version, release.payload, state.restructure or version == state.serving)


@dataclass(frozen=True, slots=True)
class Staged:
    """A complete version in the worker's store."""

    store: Store
    serving: Serving
    manifest: Manifest
    restructure: bool

    def read(self, name: str) -> memoryview:
        """Bytes of one tensor; DamagedTensor when the store lost them."""
        return self.store.read(self.manifest.by_name[name].digest, verify=False)

    def verify(self, names: Iterable[str]) -> None:
        """Re-hash these tensors on disk before anything touches the engine. Raises: DamagedTensor."""
        for name in names:
            try:
                self.store.read(self.manifest.by_name[name].digest, verify=True)
            except DamagedTensor as error:
                raise damaged(name, error) from error

    def recheck(self, name: str) -> None:
        """Hash this tensor wherever it is now, memory included. Raises: DamagedTensor."""
        try:
            self.store.recheck(self.manifest.by_name[name].digest)
        except DamagedTensor as error:
            raise damaged(name, error) from error


def damaged(name: str, error: DamagedTensor) -> DamagedTensor:
    """The same error, naming the tensor as people know it."""
    return DamagedTensor(
        f"tensor {name!r}: {error.what}", digest=error.digest, about=error.about, next=error.next, tensor=name
    )
