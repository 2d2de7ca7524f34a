"""The version's tensors on the GPU: the memory of the reference module, from which engines are refitted.

They are written through pinned memory, or only where they change, and read back by a digest of what is really there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from torch import Tensor, nn

from ..common.digest import tensor_digest_of
from ..common.errors import NotRefittable, RefleetError
from ..common.types import Manifest, TensorSpec
from .device_copy import Staging, put_changed
from .engine import Digest, StagedVersion
from .torch_engine import TorchEngine


class DeviceTensors:
    """The parameters and persistent buffers of `module`, wherever they are."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._torch = TorchEngine(module, write=self._write)
        self._staging = Staging()
        self._given: dict[str, StagedVersion] = {}  # the version whose bytes each tensor was given

    def check(self, manifest: Manifest) -> None:
        """Raise NotRefittable, naming the tensor, unless names, dtypes and shapes are the version's."""
        self._torch.check(manifest)

    def fit(self, manifest: Manifest) -> bool:
        """Whether `check` passes."""
        try:
            self.check(manifest)
        except NotRefittable:
            return False
        return True

    def write(self, staged: StagedVersion, names: frozenset[str]) -> None:
        """Put these tensors in; they are there when this returns. Raises: RefitFailed, errors of `staged.read`."""
        self._torch.apply(staged, names)
        self._staging.finish()

    def read_back(self, names: Iterable[str], digest: Digest = tensor_digest_of) -> Iterator[tuple[str, bytes]]:
        """(name, digest) of what the memory holds. Raises: DigestMismatch naming a tensor that is not there."""
        return self._torch.read_back(names, digest)

    def _write(self, staged: StagedVersion, spec: TensorSpec, live: Tensor) -> None:
        """Of a tensor whose bytes are known, only what changed, where that is little."""
        new, before = staged.read(spec.name), self._given.get(spec.name)
        old = None
        if before is not None and before.manifest.by_name[spec.name].spec == spec:
            with suppress(RefleetError):  # retention may have dropped it
                old = before.read(spec.name)
        self._given.pop(spec.name, None)  # until it is written, it is neither
        if old is None:
            self._staging.copy(new, live, name=spec.name)
        else:
            put_changed(live, old, new, spec, self._staging)
        self._given[spec.name] = staged
