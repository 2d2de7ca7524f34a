"""Switch the engine from one version to another, whole or not at all.

prepare (-> read back, if the engine can tell by then) -> gate closed -> apply -> read back if not done yet -> probe ->
persist -> gate open
a failure with the gate open -> prepare the previous version, which is served all the time
any other failure -> apply the previous version -> read back -> probe -> gate open with the previous version
that fails too -> gate closed for good: QUARANTINED
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from ..common.crashpoint import crash_point
from ..common.errors import Quarantined, RefitFailed, RefleetError, StoreError
from ..common.store import Store
from ..common.types import Manifest
from .engine import Engine
from .gate import Gate
from .prove import prove_probe, prove_tensors, remember_probe
from .state import Staged


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
    on_remnant: Callable[[], None],
) -> Switched:
    """Put `staged`, proven by `verify`, into the engine and serve it.

    Args: `holds` what the engine is known to hold (None: unknown, everything is written); `previous` the version to go
    back to; `persist` makes the new state durable, called when everything is proven and before requests see it;
    `drain_s` how long requests in flight may take to end; `on_remnant` called when what was prepared could not be
    undone: the engine still answers as `previous`, but the next switch has to write everything.
    Raises: RefitFailed, ProbeMismatch, DamagedTensor, StoreFull with the previous version serving as before;
    Quarantined with nothing serving.
    """
    clock = Clock()
    changed = frozenset(entry.spec.name for entry in staged.manifest.changed_from(holds))
    back = frozenset() if previous is None else _way_back(previous.manifest, staged.manifest, changed)
    with ExitStack() as switching:
        try:
            with clock.phase("prepare"):
                proven = engine.prepare(staged, changed)
            if proven:
                with clock.phase("read_back"):
                    prove_tensors(engine, staged, changed)
            crash_point("worker.prepared")
            hold = switching.enter_context(gate.switching(timeout_s=drain_s))
        except Exception as error:
            raise _undo(engine, gate, previous, back, error, on_remnant) from error
        try:
            with clock.phase("apply"):
                engine.apply(staged, changed)
            crash_point("worker.applied")
            if not proven:
                with clock.phase("read_back"):
                    prove_tensors(engine, staged, changed)
            with clock.phase("probe"):
                probe = prove_probe(engine, store, staged)
            with clock.phase("persist"):
                persist()
            crash_point("worker.persisted")
        except Exception as error:
            _restore(engine, gate, store, previous, back, error)
            raise _as_apply_error(error) from error
        hold.to(staged.serving)
    clock.timings_ms["pause"] = round(hold.pause_s * 1000, 3)
    with suppress(StoreError):  # requests need not wait for it, and without it the next time is the first again
        remember_probe(engine, store, staged, probe)
    return Switched(probe, clock.timings_ms)


def _way_back(previous: Manifest, target: Manifest, changed: frozenset[str]) -> frozenset[str]:
    """What of `previous` has to be written where `changed` of `target` was: that, and what `target` has no more."""
    return frozenset(name for name in previous.by_name if name in changed or name not in target.by_name)


def _undo(
    engine: Engine, gate: Gate, previous: Staged | None, back: frozenset[str], error: Exception,
    on_remnant: Callable[[], None],
) -> RefleetError:  # fmt: skip
    """Drop what was prepared; `previous` goes on being served either way. Gives the error to raise."""
    failed = _as_apply_error(error)
    if previous is None:
        gate.close(f"the first version could not be applied: {error}")
        return failed
    try:
        engine.prepare(previous, back)
    except Exception as second:
        on_remnant()
        failed.what += f"; undoing what was prepared failed: {second}"
    return failed


def _restore(
    engine: Engine, gate: Gate, store: Store, previous: Staged | None, back: frozenset[str], error: Exception
) -> None:
    """Bring the previous version back, bit for bit. Raises: Quarantined when that can't be proven."""
    if previous is None:
        gate.close(f"the first version could not be applied: {error}")
        return
    try:
        engine.apply(previous, back)
        prove_tensors(engine, previous, back)
        prove_probe(engine, store, previous)
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
