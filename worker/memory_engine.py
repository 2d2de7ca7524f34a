"""The memory twin of the engines: the same contract over a dict, with switches that make it fail on demand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..common.digest import digest_of, tensor_digest_of
from ..common.errors import DigestMismatch, RefitFailed
from ..common.messages import Serving
from ..common.types import Manifest, TensorSpec
from .engine import Digest, StagedVersion, check_specs


class MemoryEngine:
    """Holds the tensors `specs` as bytes, zero-filled at first; `specs=None` accepts any first version, and later ones
    of another structure where that is allowed, as files do.

    `prepares=True`: `prepare` reads the new tensors, `apply` only swaps them in. `fail_prepare`: the next `prepare`
    raises RefitFailed after its first tensor, once. `fail_after`: the next `apply` raises RefitFailed after so many
    tensors, once. `written`: every name in the order written. `told`: every `served` call. `probes=False`: an engine
    without probe inputs.
    """

    applied = ""

    def __init__(
        self,
        specs: Iterable[TensorSpec] | None = None,
        *,
        build: str = "memory",
        probes: bool = True,
        prepares: bool = False,
    ) -> None:
        self.build = build
        self.prepares = prepares
        self._rebuilds = specs is None
        self.specs = None if specs is None else {spec.name: spec for spec in specs}
        self.tensors = {name: bytes(spec.size_bytes) for name, spec in (self.specs or {}).items()}
        self.fail_prepare = False
        self.fail_after: int | None = None
        self.written: list[str] = []
        self.told: list[Serving] = []
        self._probes = probes
        #: prepared tensors that no `apply` swapped in yet, as a refitter collects them: only an `apply` empties it
        self._side: dict[str, bytes] = {}
        self._prepared: tuple[Manifest, frozenset[str]] | None = None

    def check(self, manifest: Manifest, *, restructure: bool = False) -> None:
        if self.specs is not None and not (restructure and self._rebuilds):
            check_specs(manifest, self.specs, holder="the engine")

    def prepare(self, staged: StagedVersion, changed: frozenset[str]) -> bool:
        if not self.prepares:
            return False
        self.check(staged.manifest, restructure=staged.restructure)
        fails, self.fail_prepare = self.fail_prepare, False
        self._prepared = None
        for name in sorted(changed):
            self._side[name] = _read(staged, name)
            if fails:
                raise RefitFailed("failing while preparing, as asked", tensor=name)
        self._prepared = staged.manifest, changed
        return True

    def apply(self, staged: StagedVersion, changed: frozenset[str]) -> None:
        self.check(staged.manifest, restructure=staged.restructure)
        limit, self.fail_after = self.fail_after, None
        swaps = self._prepared == (staged.manifest, changed)
        fresh, self._side, self._prepared = self._side if swaps else {}, {}, None
        for done, name in enumerate(sorted(fresh.keys() | changed)):
            if done == limit:
                raise RefitFailed(f"failing after {limit} tensors, as asked", tensor=name)
            self.tensors[name] = fresh[name] if swaps else _read(staged, name)
            self.written.append(name)
        if self._rebuilds:
            self.specs = staged.manifest.specs
            self.tensors = {name: data for name, data in self.tensors.items() if name in self.specs}

    def read_back(self, names: Iterable[str], digest: Digest = tensor_digest_of) -> Iterator[tuple[str, bytes]]:
        held = self.tensors | self._side
        for name in names:
            if name not in held:
                raise DigestMismatch(f"the engine holds no tensor {name!r}", tensor=name)
            yield name, digest([held[name]])

    def content_digest(self) -> bytes | None:
        """None: a dict has no serialized form of its own."""
        return None

    def probe(self) -> bytes | None:
        if not self._probes:
            return None
        return digest_of(*(digest_of(name.encode()) + digest_of(data) for name, data in sorted(self.tensors.items())))

    def served(self, serving: Serving) -> str | None:
        self.told.append(serving)
        return None

    def close(self) -> None:
        self.tensors.clear()


def _read(staged: StagedVersion, name: str) -> bytes:
    try:
        data = bytes(staged.read(name))
    except OSError as error:
        raise RefitFailed(f"tensor {name!r} could not be read: {error}", tensor=name) from error
    if len(data) != staged.manifest.by_name[name].spec.size_bytes:
        raise RefitFailed(f"tensor {name!r} has {len(data)} bytes", tensor=name)
    return data
