"""The engine of a simulated worker: the production code's memory twin, with what a GPU and its driver do wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from refleet.common.digest import digest_of, tensor_digest_of
from refleet.common.types import TensorSpec
from refleet.worker.memory_engine import MemoryEngine

from .faults import Faults
from .kernel import kernel


class _Cells(dict[str, bytes]):
    """The engine's memory: others run between any two tensors that are written."""

    def __init__(self, engine: SimEngine, tensors: dict[str, bytes]):
        super().__init__(tensors)
        self._engine = engine

    def __setitem__(self, name: str, data: bytes) -> None:
        kernel().maybe()
        self._engine.changes += 1
        self._engine.rotten.pop(name, None)
        super().__setitem__(name, data)


class SimEngine(MemoryEngine):
    """`changes` counts every write. `watch` is told of every `prepare` and `apply`, and gives the version to
    read from."""

    def __init__(
        self, specs: Iterable[TensorSpec] | None, faults: Faults, *, prepares: bool, probes: bool, watch: Any,
        may_lie: Callable[[bytes], bool],
    ):  # fmt: skip
        super().__init__(specs, prepares=prepares, probes=probes)
        self._faults, self._watch = faults, watch
        self.changes = 0
        self.applying = False
        self.rotten: dict[str, float] = {}  # tensors that changed by themselves, and when; until they are written
        self.read_s: dict[str, float] = {}  # when each tensor was read back last
        self._may_lie, self._applied = may_lie, b""  # asked about the fingerprint applied last
        self.tensors = _Cells(self, self.tensors)

    def prepare(self, staged: Any, changed: frozenset[str]) -> bool:
        staged = self._watch("prepare", staged, changed)
        self.fail_prepare = self.prepares and self._faults.hit("engine.fails-prepare")
        return super().prepare(staged, changed)

    def apply(self, staged: Any, changed: frozenset[str]) -> None:
        staged = self._watch("apply", staged, changed)
        self._applied = staged.manifest.fingerprint
        faults, rng = self._faults, kernel().rng
        if faults.hit("engine.hangs"):
            kernel().sleep(rng.uniform(1.0, 20.0))
        if changed and faults.hit("engine.fails-apply"):
            self.fail_after = rng.randrange(len(changed))
        raises = faults.hit("engine.raises")
        # what was proven before it is put in is not read back again: a contract that engines have to keep
        may_halve = changed and self._prepared != (staged.manifest, changed)
        self.applying = True
        try:
            super().apply(staged, changed)
            self.tensors = _Cells(self, self.tensors)
            if raises:
                raise RuntimeError("the driver gave up")
            if may_halve and faults.hit("engine.half-applies"):
                self._turn_bit(rng.choice(sorted(changed)))
        finally:
            self.applying = False
            self.changes += 1

    def read_back(self, names: Iterable[str], digest: Any = tensor_digest_of) -> Iterator[tuple[str, bytes]]:
        for name, found in super().read_back(names, digest):
            self.read_s[name] = kernel().now
            kernel().maybe()
            yield name, digest_of(found) if self._faults.hit("engine.lies-read-back") else found

    def probe(self) -> bytes | None:
        found = super().probe()
        # with nothing to compare with nobody can tell, and nothing is promised
        if found is not None and self._may_lie(self._applied) and self._faults.hit("engine.lies-probe"):
            return digest_of(found)
        return found

    def true_probe(self) -> bytes | None:
        return super().probe()

    def rot(self) -> None:
        """A bit of its memory turns while it serves."""
        names = [name for name, data in self.tensors.items() if data]
        if names:
            name = kernel().rng.choice(names)
            self._turn_bit(name)
            self.rotten[name] = kernel().now

    def _turn_bit(self, name: str) -> None:
        data = bytearray(self.tensors[name])
        if data:
            data[kernel().rng.randrange(len(data))] ^= 1
            dict.__setitem__(self.tensors, name, bytes(data))
            self.changes += 1
