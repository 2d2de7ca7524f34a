"""A torch module of this process as an engine: new weights are written into the memory that it computes with."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from ..common.digest import digest_of, tensor_digest_of
from ..common.errors import DigestMismatch, NotRefittable, ProbeMismatch, RefitFailed, RefleetError, UsageError
from ..common.messages import Serving
from ..common.tensors import tensor_blocks, tensor_from
from ..common.types import Manifest, TensorSpec
from .device_digest import device_digests
from .engine import NEXT_SPECS, Digest, StagedVersion, check_specs
from .probe import ProbeInputs, run_probe
from .torch_state import LiveState, bits, live_state, put, unwrapped

#: what a factory returns: a module, or a module and its probe inputs
Made: TypeAlias = nn.Module | tuple[nn.Module, object]
NEXT_RESTRUCTURE = "restart the worker with a factory that makes the new module, or roll back"
#: puts a tensor of a staged version into a live one of the same dtype and shape; it may return before that is done
Write: TypeAlias = Callable[[StagedVersion, TensorSpec, torch.Tensor], None]
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class TorchEngine:
    """Updates parameters and persistent buffers in place: whoever holds the module serves the new weights.

    Args: a module, or a callable that returns one or (module, probe inputs); `probe_inputs`: a tuple of arguments or
    (arguments, keyword arguments), taken before a factory's own. `write` puts one staged tensor into a live one.
    Raises: NotRefittable for a module with state that a version can't carry, UsageError for anything but a module.
    """

    applied = ""  # there is only one way

    def __init__(
        self,
        module_or_factory: nn.Module | Callable[[], Made],
        *,
        probe_inputs: object = None,
        write: Write | None = None,
    ) -> None:
        made = module_or_factory if isinstance(module_or_factory, nn.Module) else module_or_factory()
        if isinstance(made, tuple) and len(made) == 2:
            made, own_inputs = made
            probe_inputs = own_inputs if probe_inputs is None else probe_inputs
        if not isinstance(made, nn.Module):
            raise UsageError(
                f"the factory returned a {type(made).__name__}, not a torch.nn.Module or (module, probe inputs)"
            )
        self.module: nn.Module = made
        self._write = write or _write
        self._inputs = None if probe_inputs is None else ProbeInputs.of(probe_inputs)
        self._state = live_state(made)
        self._holder = f"the module {type(unwrapped(made)).__name__}"
        self._structure = _structure_digest(made, self._state, self._inputs)

    @property
    def build(self) -> str:
        """Torch, devices, thread count, module class, and a digest of everything else that may change an output bit.

        Computed anew each time: threads, training mode and precision settings can change while the process runs.
        """
        kind = type(unwrapped(self.module))
        modes = bytes(part.training for part in self.module.modules())
        rest = digest_of(self._structure, modes, _numeric_settings().encode()).hex()[:16]
        devices = " + ".join([_cpu_name(), *(torch.cuda.get_device_name(device) for device in self._state.cuda)])
        name = f"{kind.__module__}.{kind.__qualname__}"
        return f"torch {torch.__version__}, {devices}, {torch.get_num_threads()} threads, {name} {rest}"

    def check(self, manifest: Manifest, *, restructure: bool = False) -> None:
        """Names, dtypes and shapes must be the module's; of tied tensors one name is enough, several must agree.

        Also with `restructure`: only a factory can make another module.
        """
        try:
            self._check(self._live(), manifest)
        except NotRefittable as error:
            if restructure:
                error.next = NEXT_RESTRUCTURE
            raise

    def prepare(self, staged: StagedVersion, changed: frozenset[str]) -> bool:  # noqa: ARG002
        """Nothing to do: the module computes with the only copy of its weights."""
        return False

    def apply(self, staged: StagedVersion, changed: frozenset[str]) -> None:
        # a wrong shape would be broadcast, not refused, by the copy below
        self.check(staged.manifest, restructure=staged.restructure)
        manifest, state, name = staged.manifest, self._state, ""
        try:
            self._synchronize(state)  # a request that returned may have left kernels running
            done: set[str] = set()
            for name in sorted(changed):
                if name in done:
                    continue
                done.update(state.ties.get(name, (name,)))
                self._write(staged, manifest.by_name[name].spec, state.tensors[name])
            self._synchronize(state)  # an error of a copy shows here
        except RefleetError:
            raise
        except Exception as error:  # torch raises what it likes: RuntimeError, out of memory, CUDA errors
            raise RefitFailed(
                f"writing tensor {name!r} failed: {type(error).__name__}: {error}",
                about=f"version {staged.serving.version}",
                tensor=name,
            ) from error

    def read_back(self, names: Iterable[str], digest: Digest = tensor_digest_of) -> Iterator[tuple[str, bytes]]:
        state, wanted = self._live(), list(names)
        tensors: dict[tuple[str, ...], torch.Tensor] = {}  # tied ones once
        for name in wanted:
            if name not in state.tensors:
                raise DigestMismatch(f"{self._holder} has no tensor {name!r}", tensor=name)
            tensors.setdefault(state.ties.get(name, (name,)), bits(state.tensors[name]))
        if digest is tensor_digest_of:
            digests = device_digests(tensors.values())  # where they are, many at once
        else:
            digests = (digest(tensor_blocks(tensor)) for tensor in tensors.values())
        found: dict[tuple[str, ...], bytes] = {}
        for name in wanted:
            group = state.ties.get(name, (name,))
            if group not in found:
                found[group] = next(digests)  # in the order of their first names
            yield name, found[group]

    def probe(self) -> bytes | None:
        """Runs the module in its present mode. Buffers that it updates (batch statistics) are put back."""
        if self._inputs is None:
            return None
        state = self._live()
        before = {n: t.detach().clone() for n, t in state.tensors.items() if not isinstance(t, nn.Parameter)}
        try:
            return run_probe(self.module, self._inputs, cuda=state.cuda)
        finally:
            after = self._live()
            for name, kept in before.items():
                if after.specs.get(name) != state.specs[name]:
                    raise ProbeMismatch(f"running the module changed the dtype or shape of its own tensor {name!r}")
                if not torch.equal(bits(after.tensors[name]), bits(kept)):
                    put(after.tensors[name], kept)

    def content_digest(self) -> bytes | None:
        """None: a module is its tensors, which are read back one by one."""
        return None

    def served(self, serving: Serving) -> str | None:  # noqa: ARG002
        """Nothing to do: requests see the module itself."""
        return None

    def close(self) -> None:
        """Nothing to release: the module belongs to whoever made it."""

    def _live(self) -> LiveState:
        """The tensors as they are now: the owner may have moved or replaced some since."""
        self._state = live_state(self.module, known=self._state)
        return self._state

    def _check(self, state: LiveState, manifest: Manifest) -> None:
        wanted = manifest.by_name
        spare = {name for name, group in state.ties.items() if any(other in wanted for other in group)}
        check_specs(manifest, state.specs, holder=self._holder, spare=spare)
        for group in set(state.ties.values()):
            present = [name for name in group if name in wanted]
            if len({wanted[name].digest for name in present}) > 1:
                raise NotRefittable(
                    f"{' and '.join(map(repr, present))} are one tensor in {self._holder}, but differ in the version",
                    next=NEXT_SPECS,
                    tensor=present[0],
                )

    def _synchronize(self, state: LiveState) -> None:
        for device in state.cuda:
            torch.cuda.synchronize(device)


def _write(staged: StagedVersion, spec: TensorSpec, live: torch.Tensor) -> None:
    put(live, tensor_from(staged.read(spec.name), spec))


def _structure_digest(module: nn.Module, state: LiveState, inputs: ProbeInputs | None) -> bytes:
    """What else decides the output bits: names and shapes, layers and their settings, code, probe inputs.

    Code, because after a fix of `forward` the digests recorded with the old code must not count as the truth.
    """
    files = {getattr(sys.modules.get(type(part).__module__), "__file__", None) for part in module.modules()}
    of_torch = str(Path(torch.__file__).parent)  # named by its version already
    code = []
    for file in sorted(file for file in files if file and not file.startswith(of_torch)):
        try:
            code.append(digest_of(Path(file).read_bytes()))
        except OSError:
            code.append(b"")  # a zipped or frozen module: its class name has to do
    specs = "\n".join(map(str, state.specs.values()))
    return digest_of(
        specs.encode(), ADDRESS.sub("", repr(module)).encode(), *code, b"" if inputs is None else inputs.digest()
    )


#: settings under torch.backends that choose between kernels with different rounding
_ROUNDING = attrgetter(
    "fp32_precision",
    "cuda.matmul.fp32_precision",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cudnn.conv.fp32_precision",
    "cudnn.benchmark",
    "mkldnn.matmul.fp32_precision",
)


def _numeric_settings() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    deterministic = torch.are_deterministic_algorithms_enabled()
    return repr((_ROUNDING(torch.backends), capability, torch.version.cuda, cudnn, deterministic))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
