"""What the worker needs of an inference engine, and how `--engine` names one.

torch:package.module:factory   a torch module in this process, made by calling `factory()`
file:PATH                      a safetensors file that another process reads
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..common.errors import NotRefittable, RefleetError, UsageError
from ..common.messages import Serving
from ..common.types import Manifest, TensorSpec

if TYPE_CHECKING:
    from .torch_engine import Made

EXAMPLES = "for example torch:mypackage.serving:make_model or file:/srv/models/current.safetensors"
NEXT_SPECS = (
    "publish a version with the names, dtypes and shapes that the engine has, or start the worker with its engine"
)


class StagedVersion(Protocol):
    """A complete version on this host, rebuilt and verified."""

    @property
    def serving(self) -> Serving: ...

    @property
    def manifest(self) -> Manifest: ...

    def read(self, name: str) -> memoryview:
        """The bytes of one tensor in C order, little-endian; valid while the version is staged."""
        ...


class Engine(Protocol):
    """Holds the weights that answer requests. Called by one thread at a time, and never while a request is running."""

    @property
    def build(self) -> str:
        """Identifies this build of this engine. Equal build and equal weights must answer bit-identically."""
        ...

    def check(self, manifest: Manifest) -> None:
        """Raise NotRefittable, naming the tensor and both sides, if the engine can't hold this version. No effect."""
        ...

    def apply(self, staged: StagedVersion, changed: frozenset[str]) -> None:
        """Put the `changed` tensors in; the engine holds the others already.

        Raises: RefitFailed or an error of `staged.read`. The engine may then be half-changed: the caller applies the
        previous version with every name in `changed`, which restores it bit for bit.
        """
        ...

    def read_back(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """(name, BLAKE3 digest) of what the engine really holds now, never of what it was given.

        Raises: DigestMismatch naming a tensor that it does not hold at all.
        """
        ...

    def probe(self) -> bytes | None:
        """Digest of every output on the engine's own fixed inputs, bit-exact; None without such inputs.

        Changes nothing. Raises: ProbeMismatch when the engine can't answer.
        """
        ...

    def served(self, serving: Serving) -> str | None:
        """Told after the gate switched and the worker's record is on disk. Returns a warning to show, or None."""
        ...

    def close(self) -> None: ...


def named_few(names: Iterable[str], *, at_most: int = 5) -> str:
    """The first few of `names` and how many more: messages stay readable for any number of tensors."""
    listed = list(names)
    more = f" and {len(listed) - at_most} more" if len(listed) > at_most else ""
    return ", ".join(repr(name) for name in listed[:at_most]) + more


def check_specs(manifest: Manifest, held: Mapping[str, TensorSpec], *, holder: str, spare: Container[str] = ()) -> None:
    """Raise NotRefittable unless the version's tensors are exactly those `held` by `holder` (words for messages).

    `spare`: names that the version may leave out, because another of its tensors is the same memory.
    """
    wanted = manifest.by_name
    extra = [name for name in wanted if name not in held]
    lacking = [name for name in held if name not in wanted and name not in spare]
    if extra or lacking:
        parts = [f"the version has {named_few(extra)}, which {holder} lacks"] if extra else []
        parts += [f"the version lacks {named_few(lacking)}, which {holder} has"] if lacking else []
        raise NotRefittable(
            f"{'; '.join(parts)}; {holder} has {len(held)} tensors: {named_few(sorted(held))}",
            next=NEXT_SPECS,
            tensor=(extra or lacking)[0],
        )
    for name, entry in wanted.items():
        parts, have = [], held[name]
        if entry.spec.dtype != have.dtype:
            parts.append(f"dtype {entry.spec.dtype} where {holder} has {have.dtype}")
        if entry.spec.shape != have.shape:
            parts.append(f"shape {list(entry.spec.shape)} where {holder} has {list(have.shape)}")
        if parts:
            raise NotRefittable(
                f"the version's tensor {name!r} has {' and '.join(parts)}", next=NEXT_SPECS, tensor=name
            )


def load_engine(spec: str, *, on_serving: str | None = None) -> Engine:
    """The engine that `spec` names (see the top of this module). The current directory is importable.

    Args: `on_serving` command line that a file engine runs after each switch.
    Raises: UsageError saying what is wrong with `spec`; NotRefittable if the module has tensors that can't be refitted.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "file" and rest:
        from .file_engine import FileEngine

        return FileEngine(rest, on_serving=on_serving)
    if kind == "torch" and rest:
        if on_serving is not None:
            raise UsageError(
                "a command after each switch is for file engines: a torch module serves from this very process",
                about=f"engine {spec!r}",
                next="leave --on-serving out",
            )
        factory = _factory(rest, spec)
        from .torch_engine import TorchEngine

        try:
            made = factory()
        except RefleetError:
            raise
        except Exception as error:  # the factory is the user's code
            raise UsageError(
                f"the factory raised {type(error).__name__}: {error}",
                about=f"engine {spec!r}",
                next="a factory takes no arguments and returns a module, or a module and its probe inputs",
            ) from error
        return TorchEngine(lambda: made)
    if kind in ("file", "torch"):
        raise UsageError(
            f"nothing follows {kind + colon!r} in the engine spec", about=f"engine {spec!r}", next=EXAMPLES
        )
    raise UsageError("an engine spec starts with torch: or file:", about=f"engine {spec!r}", next=EXAMPLES)


def _factory(rest: str, spec: str) -> Callable[[], Made]:
    """The callable that `package.module:name` means."""
    module_name, _, factory_name = rest.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *factory_name.split(".")]):
        raise UsageError("a torch engine is torch:package.module:factory", about=f"engine {spec!r}", next=EXAMPLES)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does: a user's own module is found where they stand
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only the module asked for, or a package above it: a missing import inside it is another mistake.
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise UsageError(
                f"there is no module {error.name!r} in {here} or on the import path",
                about=f"engine {spec!r}",
                next=EXAMPLES,
            ) from error
        raise _unimportable(module_name, spec, error) from error
    except Exception as error:  # whatever the user's module does when imported
        raise _unimportable(module_name, spec, error) from error
    try:
        factory = reduce(getattr, factory_name.split("."), module)
    except AttributeError:
        own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module_name)
        names = [name for name in own if callable(getattr(module, name)) and not name.startswith("_")]
        has = f"it has {named_few(names)}" if names else "it defines no callables"
        raise UsageError(
            f"module {module_name!r} has no {factory_name!r}; {has}", about=f"engine {spec!r}", next=EXAMPLES
        ) from None
    if not callable(factory):
        raise UsageError(
            f"{factory_name!r} in {module_name!r} is a {type(factory).__name__}, not a callable that makes a module",
            about=f"engine {spec!r}",
            next=EXAMPLES,
        )
    return factory  # what it returns is checked by TorchEngine


def _unimportable(module_name: str, spec: str, error: Exception) -> UsageError:
    return UsageError(
        f"importing {module_name!r} failed: {type(error).__name__}: {error}",
        about=f"engine {spec!r}",
        next=f"python -c 'import {module_name}' shows where",
    )
