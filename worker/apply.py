"""Switch the engine from one version to another, whole or not at all.

gate closed -> apply -> read back -> probe -> persist -> gate open
any failure -> apply the previous version -> read back -> probe -> gate open with the previous version
that fails too -> gate closed for good: QUARANTINED
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..common.crashpoint import crash_point
from ..common.errors import ProbeMismatch, Quarantined, RefitFailed, RefleetError
from ..common.store import Store
from ..common.types import Manifest
from .engine import Engine
from .gate import Gate
from .state import Staged, probe_name


@dataclass(slots=True)
class Switched:
    """What a switch did: evidence and timings of one ack."""

    probe: bytes | None
    timings_ms: dict[str, float] = field(default_factory=dict)


class Clock:
    """Collects the duration of named phases in milliseconds."""

    def __init__(self) -> None:
        self.timings_ms: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = (time.perf_counter() - started) * 1000
            self.timings_ms[name] = round(self.timings_ms.get(name, 0.0) + spent, 3)


def verify(staged: Staged, *, holds: Manifest | None, clock: Clock) -> None:
    """Re-hash on disk what an engine that holds `holds` (None: unknown) would be given. Raises: DamagedTensor."""
    with clock.phase("verify"):
        staged.verify(entry.spec.name for entry in staged.manifest.changed_from(holds))


def switch(
    engine: Engine,
    gate: Gate,
    store: Store,
    staged: Staged,
    *,
    holds: Manifest | None,
    previous: Staged | None,
    persist: Callable[[], None],
    drain_s: float,
) -> Switched:
    """Put `staged`, proven by `verify`, into the engine and serve it.

    Args: `holds` what the engine is known to hold (None: unknown, everything is written); `previous` the version to go
    back to; `persist` makes the new state durable, called when everything is proven and before requests see it;
    `drain_s` how long requests in flight may take to end.
    Raises: RefitFailed, ProbeMismatch, DamagedTensor, StoreFull with the previous version serving as before;
    Quarantined with nothing serving.
    """
    clock = Clock()
    changed = frozenset(entry.spec.name for entry in staged.manifest.changed_from(holds))
    with gate.switching(timeout_s=drain_s) as hold:
        try:
            with clock.phase("apply"):
                engine.apply(staged, changed)
            crash_point("worker.applied")
            probe = _prove(engine, store, staged, changed, clock)
            with clock.phase("persist"):
                persist()
            crash_point("worker.persisted")
        except Exception as error:
            _restore(engine, gate, store, previous, changed, error)
            raise _as_apply_error(error) from error
        hold.to(staged.serving)
    clock.timings_ms["pause"] = round(hold.pause_s * 1000, 3)
    return Switched(probe, clock.timings_ms)


def first_difference(engine: Engine, manifest: Manifest, names: frozenset[str] | None = None) -> str | None:
    """The first tensor, by name, that the engine holds with other bytes than `manifest`; None: all are right."""
    wanted = manifest.by_name
    order = [name for name in wanted if names is None or name in names]
    for name, digest in engine.read_back(order):
        if digest != wanted[name].digest:
            return name
    return None


def _prove(engine: Engine, store: Store, staged: Staged, changed: frozenset[str], clock: Clock) -> bytes | None:
    """Read back what was written and run the probe. Raises: DamagedTensor, RefitFailed, ProbeMismatch."""
    with clock.phase("read_back"):
        name = first_difference(engine, staged.manifest, changed)
    if name is not None:
        staged.verify([name])  # bit rot between staging and applying is the store's fault, not the engine's
        raise RefitFailed(f"after the refit the engine holds other bytes in {name!r} than it was given", tensor=name)
    with clock.phase("probe"):
        probe = engine.probe()
        record = probe_name(engine.build, staged.manifest.fingerprint)
        before = store.record(record) if probe is not None else None
        if before is not None and before != probe:
            raise ProbeMismatch(
                f"the engine answers its probe differently than when {staged.serving.version!r} was first served here"
            )
        if probe is not None and before is None:
            store.put_record(record, probe)
    return probe


def _restore(
    engine: Engine, gate: Gate, store: Store, previous: Staged | None, changed: frozenset[str], error: Exception
) -> None:
    """Bring the previous version back, bit for bit. Raises: Quarantined when that can't be proven."""
    if previous is None:
        gate.close(f"the first version could not be applied: {error}")
        return
    try:
        engine.apply(previous, changed)
        _prove(engine, store, previous, changed, Clock())
    except Exception as second:
        reason = f"the engine's content is unknown: {error}; restoring {previous.serving.version!r} failed: {second}"
        gate.close(reason)
        raise Quarantined(
            reason,
            about=f"version {previous.serving.version!r}",
            serving="nothing",
            next="restart the worker: it applies its last version to a fresh engine",
            tensor=error.tensor if isinstance(error, RefleetError) else None,
        ) from second


def _as_apply_error(error: Exception) -> RefleetError:
    return (
        error if isinstance(error, RefleetError) else RefitFailed(f"the engine raised {type(error).__name__}: {error}")
    )
