"""How `--engine` names an engine, and making it.

torch:package.module:factory      a torch module in this process, made by calling `factory()`
tensorrt:package.module:factory   TensorRT engines in this process, compiled from the recipe that `factory()` returns
bundle:DIR                        TensorRT engines from a bundle that `refleet-worker build` made, without factory
file:PATH                         a safetensors file that another process reads
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from ..common.errors import RefleetError, UsageError
from .engine import Engine, named_few

EXAMPLES = (
    "for example torch:mypackage.serving:make_model, tensorrt:mypackage.serving:make_recipe, bundle:/srv/models/policy "
    "or file:/srv/models/current.safetensors"
)
KINDS = ("torch", "tensorrt", "bundle", "file")
APPLY = ("auto", "fast", "reference")


def load_engine(
    spec: str, *, on_serving: str | None = None, apply: str | None = None, contexts: int | None = None,
    bundle: Path | str | None = None, on_step: Callable[[str], None] = lambda _text: None,
) -> Engine:  # fmt: skip
    """The engine that `spec` names (see the top of this module). The current directory is importable.

    Args: `on_serving` command line that a file engine runs after each switch. For TensorRT engines: `apply` the way in
    which versions go in (auto), `contexts` how many requests run at once (1), `bundle` a folder that saves compiling:
    it is used if it fits, else written. `on_step` hears what takes time.
    Raises: UsageError saying what is wrong with `spec` or an argument; NotRefittable if the module has tensors that
    can't be refitted, or can't be compiled; with `bundle:` also MalformedRecord, DigestMismatch.
    """
    kind, colon, rest = spec.partition(":")
    if kind not in KINDS:
        raise UsageError(f"an engine spec starts with {_listed()}", about=f"engine {spec!r}", next=EXAMPLES)
    if not rest:
        raise UsageError(
            f"nothing follows {kind + colon!r} in the engine spec", about=f"engine {spec!r}", next=EXAMPLES
        )
    _check_arguments(kind, spec, on_serving=on_serving, apply=apply, contexts=contexts, bundle=bundle)
    if kind == "file":
        from .file_engine import FileEngine

        return FileEngine(rest, on_serving=on_serving)
    if kind == "torch":
        return _torch_engine(spec)
    factory = named_factory(spec) if kind == "tensorrt" else None
    from .trt_load import load_bundle, load_tensorrt

    given: dict[str, Any] = {"apply": apply or "auto", "contexts": contexts or 1, "on_step": on_step}
    try:
        if factory is None:
            return load_bundle(Path(rest), **given)
        return load_tensorrt(factory, bundle=None if bundle is None else Path(bundle), **given)
    except RefleetError as error:
        error.about = error.about or f"engine {spec!r}"
        raise


def _listed() -> str:
    return ", ".join(f"{kind}:" for kind in KINDS[:-1]) + f" or {KINDS[-1]}:"


def _check_arguments(
    kind: str, spec: str, *, on_serving: str | None, apply: str | None, contexts: int | None,
    bundle: Path | str | None,
) -> None:  # fmt: skip
    """Raise UsageError for what this kind of engine has no use for, before anything is loaded."""
    about = f"engine {spec!r}"
    if on_serving is not None and kind != "file":
        raise UsageError(
            f"a command after each switch is for file engines: a {kind} engine serves from this very process",
            about=about, next="leave --on-serving out",
        )  # fmt: skip
    if apply is not None and apply not in APPLY:
        raise UsageError(f"apply {apply!r}: choose {', '.join(APPLY)}", about=about)
    if contexts is not None and contexts < 1:
        raise UsageError(f"contexts {contexts}: at least one request must be possible", about=about)
    given = {"--apply": apply, "--contexts": contexts, "--bundle": bundle}
    named = " and ".join(name for name, value in given.items() if value is not None)
    if named and kind in ("torch", "file"):
        raise UsageError(
            f"only TensorRT engines know {named}, and this is a {kind} engine", about=about,
            next=f"leave {named} out, or choose --engine tensorrt:package.module:factory",
        )  # fmt: skip
    if kind == "bundle" and apply == "reference":
        raise UsageError(
            "the reference path compiles, and a bundle without its factory has nothing to compile", about=about,
            next="leave --apply out, or choose --engine tensorrt:package.module:factory",
        )  # fmt: skip
    if bundle is not None and kind == "bundle":
        raise UsageError(
            "the engine is a bundle already: --bundle names the one to use or write beside a factory", about=about,
            next="leave --bundle out, or choose --engine tensorrt:package.module:factory",
        )  # fmt: skip


def _torch_engine(spec: str) -> Engine:
    factory = named_factory(spec)
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


def named_factory(spec: str) -> Callable[..., Any]:
    """The callable that `kind:package.module:name` means. Raises: UsageError."""
    kind, _, rest = spec.partition(":")
    module_name, _, factory_name = rest.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *factory_name.split(".")]):
        kind = spec.partition(":")[0]
        raise UsageError(f"a {kind} engine is {kind}:package.module:factory", about=f"engine {spec!r}", next=EXAMPLES)
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
    made: Callable[..., Any] = factory  # what it returns is checked by the engine
    return made


def _unimportable(module_name: str, spec: str, error: Exception) -> UsageError:
    return UsageError(
        f"importing {module_name!r} failed: {type(error).__name__}: {error}",
        about=f"engine {spec!r}",
        next=f"python -c 'import {module_name}' shows where",
    )
