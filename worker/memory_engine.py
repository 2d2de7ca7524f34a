"""The memory twin of the engines: the same contract over a dict, with switches that make it fail on demand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..common.digest import digest_of
from ..common.errors import DigestMismatch, RefitFailed
from ..common.messages import Serving
from ..common.types import Manifest, TensorSpec
from .engine import StagedVersion, check_specs


class MemoryEngine:
    """Holds the tensors `specs` as bytes, zero-filled at first; `specs=None` accepts any first version, as files do.

    `fail_after`: the next `apply` raises RefitFailed after so many tensors, once. `written`: every name in the order
    written. `told`: every `served` call. `probes=False`: an engine without probe inputs.
    """

    def __init__(
        self, specs: Iterable[TensorSpec] | None = None, *, build: str = "memory", probes: bool = True
    ) -> None:
        self.build = build
        self.specs = None if specs is None else {spec.name: spec for spec in specs}
        self.tensors = {name: bytes(spec.size_bytes) for name, spec in (self.specs or {}).items()}
        self.fail_after: int | None = None
        self.written: list[str] = []
        self.told: list[Serving] = []
        self._probes = probes

    def check(self, manifest: Manifest) -> None:
        if self.specs is not None:
            check_specs(manifest, self.specs, holder="the engine")

    def apply(self, staged: StagedVersion, changed: frozenset[str]) -> None:
        self.check(staged.manifest)
        limit, self.fail_after = self.fail_after, None
        for done, name in enumerate(sorted(changed)):
            if done == limit:
                raise RefitFailed(f"failing after {limit} tensors, as asked", tensor=name)
            try:
                data = bytes(staged.read(name))
            except OSError as error:
                raise RefitFailed(f"tensor {name!r} could not be read: {error}", tensor=name) from error
            if len(data) != staged.manifest.by_name[name].spec.size_bytes:
                raise RefitFailed(f"tensor {name!r} has {len(data)} bytes", tensor=name)
            self.tensors[name] = data
            self.written.append(name)
        if self.specs is None:
            self.specs = {entry.spec.name: entry.spec for entry in staged.manifest.tensors}

    def read_back(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            if name not in self.tensors:
                raise DigestMismatch(f"the engine holds no tensor {name!r}", tensor=name)
            yield name, digest_of(self.tensors[name])

    def probe(self) -> bytes | None:
        if not self._probes:
            return None
        return digest_of(*(digest_of(name.encode()) + digest_of(data) for name, data in sorted(self.tensors.items())))

    def served(self, serving: Serving) -> str | None:
        self.told.append(serving)
        return None

    def close(self) -> None:
        self.tensors.clear()
