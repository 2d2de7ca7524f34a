"""Read a checkpoint once and compare it with the version before: what is the same, and what has to travel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ..common.crashpoint import crash_point
from ..common.delta import Input, as_bytes
from ..common.digest import tensor_digest, tensor_digest_of
from ..common.errors import DamagedTensor
from ..common.kernels import changed
from ..common.layout import Bytes
from ..common.lowrank import Factors
from ..common.memory import Memory
from ..common.store import Store
from ..common.threads import cores, in_order
from ..common.types import DeltaTensor, Manifest, TensorEntry, TensorSpec
from .checkpoint import Checkpoint

#: tensors that are read and compared at once: memory, not the processor, bounds it from here on
_READERS = 4
#: (phase, done, total) in bytes; phases are "send" and "compare"
OnBytes = Callable[[str, int, int], None]


def silent(_phase: str, _done: int, _total: int) -> None:
    """An `OnBytes` that tells nobody."""


def hashed(checkpoint: Checkpoint) -> Manifest:
    """The checkpoint's manifest. Reads every byte once, a block at a time. Raises: CheckpointChanged."""
    entries = [TensorEntry(spec, tensor_digest_of(checkpoint.blocks(name))) for name, spec in checkpoint.specs.items()]
    checkpoint.confirm()
    return Manifest.of(entries)


class RottenBaseError(Exception):
    """Bit rot took a tensor of the base while it was compared with; it counts as missing from now on."""


class Comparison:
    """One reading of a checkpoint against `base` in `store`: iterate `inputs()` once, then ask for the rest.

    `keep`: all tensors stay in `held`, by digest. Otherwise their memory is used again once they are encoded.
    `factors` of tensors that are about those of the base plus a product.
    """

    def __init__(
        self, checkpoint: Checkpoint, base: Manifest | None, store: Store | None, *, keep: bool = False,
        factors: Mapping[str, Factors] | None = None,
    ):  # fmt: skip
        self._factors = factors or {}
        self._checkpoint, self._store, self._keep = checkpoint, store, keep
        self._memory = store.memory if store else Memory()
        self._before = base.by_name if base and store else {}
        self._numbers = {name: number for number, name in enumerate(self._before)}
        self._at_hand = {e.digest for e in self._before.values() if store and store.has(e.digest)}
        self._entries: dict[str, TensorEntry] = {}
        self.changed: list[DeltaTensor] = []
        self.held: dict[bytes, Bytes] = {}
        self.read_bytes = 0

    def manifest(self) -> Manifest:
        """Of the checkpoint, once all of it was read."""
        return Manifest.of(self._entries.values())

    def inputs(self) -> Iterator[Input]:
        """Reads every tensor, in the order of a body, and gives those that have to travel.

        Raises: CheckpointErrors of the checkpoint, RottenBaseError.
        """
        specs = [(self._based(spec), spec) for spec in self._checkpoint.specs.values()]
        specs.sort(key=lambda found: (found[0], found[1].dtype, found[1].name.encode()))
        for entry, new, old in in_order(self._looked_at, specs, threads=min(cores(), _READERS)):
            self.read_bytes += new.size
            self._entries[entry.spec.name] = entry
            if self._keep:
                self.held[entry.digest] = new
            # the store may have lost a tensor that is as it was
            if entry != self._before.get(entry.spec.name) or entry.digest not in self._at_hand:
                yield from self._travelling(entry, new, old)

    def _looked_at(self, found: tuple[bool, TensorSpec]) -> tuple[TensorEntry, Bytes, Bytes | None]:
        """The tensor as it is now, and the base's where it can be sent relative to that. In one of several threads."""
        based, spec = found
        new = self._memory.take(spec.size_bytes)
        self._checkpoint.read_into(spec.name, new)
        if not based:
            return TensorEntry(spec, tensor_digest(new.data)), new, None
        before = self._before[spec.name]
        old = self._base(before.digest)
        return (TensorEntry(spec, tensor_digest(new.data)) if changed(new, old) else before), new, old

    def _travelling(self, entry: TensorEntry, new: Bytes, old: Bytes | None) -> Iterator[Input]:
        carried = entry.digest not in self._at_hand and new.size > 0
        self._at_hand.add(entry.digest)
        self.changed.append(DeltaTensor(entry.spec, entry.digest, carried, carried and old is not None))
        if carried:
            name = entry.spec.name
            yield Input(entry.spec.dtype, new, old, self._numbers.get(name, 0), self._factors.get(name))
        crash_point("publisher.stored-tensor")

    def _based(self, spec: TensorSpec) -> bool:
        """Whether it can be sent relative to the base's tensor."""
        earlier = self._before.get(spec.name)
        return earlier is not None and earlier.spec == spec and earlier.digest in self._at_hand and spec.size_bytes > 0

    def _base(self, digest: bytes) -> Bytes:
        assert self._store is not None
        try:
            return as_bytes(self._store.read(digest, verify=True))
        except DamagedTensor as damage:
            self._store.forget(digest)
            raise RottenBaseError from damage
