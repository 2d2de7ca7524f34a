"""Read a checkpoint into the store: hash everything, keep what is new. Nothing is published here."""

from __future__ import annotations

from collections.abc import Callable

from ..common.crashpoint import crash_point
from ..common.digest import tensor_digest_of
from ..common.errors import CheckpointChanged, DamagedTensor, DigestMismatch
from ..common.store import Store
from ..common.types import Manifest, TensorEntry
from .checkpoint import Checkpoint

#: (phase, done, total) in bytes
OnBytes = Callable[[str, int, int], None]


def silent(_phase: str, _done: int, _total: int) -> None:
    """An `OnBytes` that tells nobody."""


def hashed(checkpoint: Checkpoint, *, on_progress: OnBytes = silent) -> Manifest:
    """The checkpoint's manifest. Reads every byte once, a block at a time. Raises: CheckpointChanged."""
    total = sum(spec.size_bytes for spec in checkpoint.specs.values())
    done = 0
    entries = []
    for name, spec in checkpoint.specs.items():
        entries.append(TensorEntry(spec, tensor_digest_of(checkpoint.blocks(name))))
        done += spec.size_bytes
        on_progress("hash", done, total)
    checkpoint.confirm()
    return Manifest.of(entries)


def ingest(
    checkpoint: Checkpoint, manifest: Manifest, store: Store, *, serving: str, on_progress: OnBytes = silent
) -> None:
    """Put the tensors of `manifest` that `store` lacks, and then the manifest, into it.

    The second reading must hash to the same digests, so a version never mixes tensors of two checkpoints.
    Raises: CheckpointChanged, with `serving` as what is being served now; StoreFull.
    """
    missing = store.missing(manifest)
    total, done = sum(entry.spec.size_bytes for entry in missing), 0
    with store.writing():
        with store.batch() as batch:
            for entry in missing:
                try:
                    batch.add(checkpoint.blocks(entry.spec.name), expect=entry.digest)
                except DigestMismatch as error:
                    raise CheckpointChanged(
                        f"tensor {entry.spec.name!r} changed while it was read",
                        about=checkpoint.source,
                        serving=serving,
                        next="publish again when the trainer has finished writing",
                        tensor=entry.spec.name,
                    ) from error
                done += entry.spec.size_bytes
                on_progress("store", done, total)
                crash_point("publisher.stored-tensor")
        checkpoint.confirm()
        store.put_manifest(manifest)
    crash_point("publisher.stored")


def forget_damaged(manifest: Manifest, store: Store) -> None:
    """Give up the tensors of `manifest` that bit rot got at, so that the next `ingest` puts them in again."""
    with store.memory.pinned(manifest.digests):
        for entry in manifest.tensors:
            try:
                store.read(entry.digest, verify=True)
            except DamagedTensor:
                store.forget(entry.digest)
