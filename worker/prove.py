"""What the engine really holds, proven: tensor by tensor, by its probe, and on demand cryptographically and as a whole.

Probe outputs and digests of whole engines are compared with what this engine build gave at this version the first time,
which the worker's store keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..common.digest import blake3_of, proof_of
from ..common.errors import DigestMismatch, NotServing, ProbeMismatch, RefitFailed, RefleetError, StoreError
from ..common.messages import Serving, Verified, VerifyRequest
from ..common.store import Store
from ..common.types import Manifest
from .engine import Engine
from .state import Staged, content_name, probe_name

NO_FORM = "this kind of engine has no serialized form to hash"


def first_difference(engine: Engine, manifest: Manifest, names: frozenset[str] | None = None) -> str | None:
    """The first tensor, by name, that the engine holds with other bytes than `manifest`; None: all are right."""
    wanted = manifest.by_name
    order = [name for name in wanted if names is None or name in names]
    for name, digest in engine.read_back(order):
        if digest != wanted[name].digest:
            return name
    return None


def prove_tensors(engine: Engine, staged: Staged, changed: frozenset[str]) -> None:
    """Read back what was written, or is about to be. Raises: DamagedTensor, RefitFailed, or what `read_back` raises."""
    name = first_difference(engine, staged.manifest, changed)
    if name is not None:
        staged.recheck(name)  # bit rot between staging and applying is the store's fault, not the engine's
        raise RefitFailed(f"after the refit the engine holds other bytes in {name!r} than it was given", tensor=name)


def prove_probe(engine: Engine, store: Store, staged: Staged) -> bytes | None:
    """The outputs on the engine's own inputs; None without such. Raises: ProbeMismatch."""
    probe = engine.probe()
    before = None if probe is None else store.record(probe_name(engine.build, staged.manifest.fingerprint))
    if before is not None and before != probe:
        raise ProbeMismatch(
            f"the engine answers its probe differently than when {staged.serving.version!r} was first served here"
        )
    return probe


def remember_probe(engine: Engine, store: Store, staged: Staged, probe: bytes | None) -> None:
    """What `prove_probe` compares with from now on, if there was nothing before. Raises: StoreFull."""
    record = probe_name(engine.build, staged.manifest.fingerprint)
    if probe is not None and store.record(record) is None:
        store.put_record(record, probe)


def answer(
    engine: Engine, store: Store, ask: VerifyRequest, serving: Serving | None, holds: Manifest | None, *,
    reason: str | None, warn: Callable[[str], None],
) -> tuple[Verified, RefleetError | None]:  # fmt: skip
    """Read back everything, and in a deep request prove its content by BLAKE3 and hash the engine as a whole; with the
    error if that is not as it must. Whether the proof is right only the publisher can tell.

    Args: `serving` and `holds` what is served, as its version and its tensors; `reason` why nothing is; `warn` hears
    when the digest of a whole engine could not be recorded.
    """
    if serving is None or holds is None:
        note = "nothing is served" if ask.deep else ""
        return Verified(ask.nonce, False, 0, None, None, note, None), NotServing(reason or "nothing is served")
    found = Verified(ask.nonce, True, len(holds.tensors), None, None, "", None)
    try:
        bad = first_difference(engine, holds)
        if bad is not None:
            what = f"the engine holds other bytes in {bad!r} than version {serving.version!r}"
            raise DigestMismatch(what, tensor=bad)
        if ask.deep:
            found = replace(found, proof=_proof(engine, holds))
            content = engine.content_digest()
            found = replace(found, engine=content, note="" if content else NO_FORM)
            if content and not _as_before(store, content_name(engine.build, holds.fingerprint), content, warn):
                raise DigestMismatch(
                    f"the engine as a whole is not what it was when {serving.version!r} was first verified here"
                )
        return found, None
    except RefleetError as raised:
        error = raised
    except Exception as raised:  # the engine is the user's code
        error = RefitFailed(f"the engine could not be read back: {type(raised).__name__}: {raised}")
    return replace(found, ok=False, first_bad=error.tensor), error


def _proof(engine: Engine, holds: Manifest) -> bytes:
    held = dict(engine.read_back([entry.spec.name for entry in holds.tensors], blake3_of))
    return proof_of((entry.spec, held[entry.spec.name]) for entry in holds.tensors)


def _as_before(store: Store, record: str, digest: bytes, warn: Callable[[str], None]) -> bool:
    """Whether `digest` is the recorded one; recorded now if there is none."""
    before = store.record(record)
    if before is None:
        try:
            store.put_record(record, digest)
        except StoreError as error:  # a full disk says nothing about the engine
            warn(f"could not record the digest of the engine: {error.what}")
        return True
    return before == digest
